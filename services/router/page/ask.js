// The box: sends a prompt through the OpenAI API, shows the answer as it comes, and the request's way.

import { events, key, reason } from "./stream.js";
import { short, summary, way } from "./words.js";

const FILLER = "The quick brown fox jumps over the lazy dog while the patient river carries small boats to the sea. ";
const WAY_STEPS_MAX = 60;

export class Ask {
  /** `watch(request name or null)` makes a request stand out on the lanes. */
  constructor(model, at, watch) {
    this.model = model;
    this.at = at;
    this.watch = watch;
    this.name = null;
    this.ending = null;
    at("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    at("stop").addEventListener("click", () => this.ending?.abort());
    at("unwatch").addEventListener("click", () => this.show(null));
    at("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.send();
    });
    at("story").addEventListener("toggle", () => this.tell());
  }

  /** Make this request the one that is watched. */
  show(name) {
    this.name = name;
    this.at("watched").hidden = name === null;
    this.at("watched-name").textContent = name === null ? "" : short(name);
    this.at("watched-name").title = name ?? "";
    this.at("answer").textContent = this.at("sum").textContent = "";
    this.at("story-lines").textContent = "";
    this.at("way").replaceChildren();
    this.watch(name);
    this.update();
  }

  async send() {
    const words = Number(this.at("length").value);
    const typed = this.at("prompt").value.trim();
    if (typed === "") return this.complain("Type a prompt first.");
    const filler = words ? `\n\n${FILLER.repeat(Math.ceil(words / FILLER.split(" ").length))}` : "";
    const name = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
    this.ending?.abort();
    this.ending = new AbortController();
    this.complain("");
    this.show(name);
    this.at("stop").hidden = false;
    try {
      await this.stream(name, typed + filler, this.ending.signal);
    } catch (error) {
      if (error.name !== "AbortError" && this.name === name) this.complain("The connection to the router was lost.");
    } finally {
      if (this.name === name) this.at("stop").hidden = true;
      if (this.name === name) this.tell();
    }
  }

  async stream(name, content, signal) {
    const messages = [{ role: "user", content }];
    const body = { messages, max_tokens: Number(this.at("tokens").value), temperature: 0, stream: true };
    const answer = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { ...key.headers(), "Content-Type": "application/json", "X-Request-Id": name },
      body: JSON.stringify(body),
      signal,
    });
    if (!answer.ok) return this.complain(await reason(answer));
    for await (const [, data] of events(answer.body)) {
      if (this.name !== name) continue;
      if (data.error) this.complain(data.error.message);
      this.at("answer").textContent += data.choices?.[0]?.delta?.content ?? "";
    }
  }

  complain(words) {
    this.at("ask-error").textContent = words;
  }

  /** Its way so far, from the same segments as the lanes. */
  update() {
    const request = this.name === null ? undefined : this.model.byName.get(this.name);
    if (request === undefined) return;
    this.at("sum").textContent = summary(this.model, request);
    const steps = way(this.model, request).slice(-WAY_STEPS_MAX);
    const said = JSON.stringify(steps);
    if (said === this.said) return;
    this.said = said;
    this.at("way").replaceChildren(
      ...steps.map(({ what, where, kind, took }) => {
        const item = document.createElement("li");
        item.dataset.kind = kind;
        item.append(part("what", what), part("took", took), part("where", where));
        return item;
      }),
    );
    this.at("way").scrollTop = this.at("way").scrollHeight;
  }

  /** The scheduler's own story, when somebody wants to read it. */
  async tell() {
    const name = this.name;
    if (name === null || !this.at("story").open) return;
    try {
      const answer = await fetch(`/v1/requests/${encodeURIComponent(name)}/story`, { headers: key.headers() });
      const lines = answer.ok ? (await answer.json()).lines : [await reason(answer)];
      if (this.name === name) this.at("story-lines").textContent = lines.join("\n");
    } catch {
      this.at("story-lines").textContent = "The router does not answer.";
    }
  }
}

function part(name, text) {
  const span = document.createElement("span");
  span.className = name;
  span.textContent = text;
  return span;
}
