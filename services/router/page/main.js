// Wires the parts of the page: the stream feeds the model, the model is drawn.

import { Ask } from "./ask.js";
import { Charts } from "./charts.js";
import { Lanes } from "./lanes.js";
import { Model } from "./model.js";
import { connect, key } from "./stream.js";
import { count, describe, doing, plural, seconds } from "./words.js";

const at = (id) => document.getElementById(id);
const model = new Model();
const still = matchMedia("(prefers-reduced-motion: reduce)");
const lanes = new Lanes(model, at("canvas"), at("labels"), still);
const charts = new Charts(model, at("ttft"), at("queue"));
const ask = new Ask(model, at, (name) => {
  watchedName = name;
});
let watchedName = null;
let frames = 0;

// --- what is heard ---

const again = connect(
  (name, data) => (name === "state" ? model.begin(data) : model.apply(data)),
  (state, words) => {
    const pill = at("link");
    if (pill.dataset.state !== state) {
      pill.dataset.state = state;
      pill.textContent = { live: "live", lost: "connection lost, trying again", key: "key needed" }[state];
    }
    at("key-form").hidden = state !== "key";
    at("key-error").textContent = state === "key" ? words : "";
    if (state === "key" && words === "") at("key").focus();
    link = { state, words };
    notice();
  },
);
let link = { state: "connecting", words: "" };

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value);
  again();
});

model.listeners.add((change) => {
  if (change.summary !== null) {
    figures(change.summary);
    charts.update();
    table();
    notice();
  }
  lanes.watched = watchedName === null ? null : (model.byName.get(watchedName)?.id ?? null);
  ask.update();
});

function figures(summary) {
  const [, shorts, longs, shortTtft, longTtft] = summary.sample;
  const here = model.order.filter((lane) => lane.here);
  const prefill = here.filter((lane) => lane.role === "prefill").length;
  const known = summary.scheduler_answers;
  const put = (id, text) => {
    if (at(id).textContent !== text) at(id).textContent = text;
  };
  put("f-workers", `${prefill} + ${here.length - prefill}`);
  at("f-workers").title = `${plural(prefill, "prefill worker")}, ${plural(here.length - prefill, "decode worker")}`;
  put("f-running", known ? count(summary.requests_running) : "–");
  put("f-queued-short", known ? count(shorts) : "–");
  put("f-queued-long", known ? count(longs) : "–");
  put("f-ttft-short", seconds(shortTtft));
  put("f-ttft-long", seconds(longTtft));
  put("f-pauses", known ? count(summary.counters.pauses ?? 0) : "–");
  put("f-decision", known ? seconds(summary.decision_p99_s) : "–");
  put("about", known ? `${model.model} · policy ${summary.policy}` : model.model);
}

/** What is wrong, or missing, in words. */
function trouble() {
  const summary = model.summary;
  if (link.state === "lost") return `${link.words} What is drawn was heard before; the page tries again by itself.`;
  if (link.state !== "live") return "";
  if (summary === null) return "Listening.";
  if (!summary.scheduler_answers)
    return "No scheduler answers. What runs goes on and is shown; new requests wait for one, some seconds at most.";
  if (!model.order.some((lane) => lane.here))
    return "No workers are here yet. They appear as they start: pecsched prefill-worker, pecsched decode-worker.";
  if (!summary.coordinator_present) return "No SP coordinator is here: long prompts wait for one.";
  const strangers = summary.strangers.map(([name, why]) => `${name} (${why})`);
  return strangers.length ? `Kept out: ${strangers.join("; ")}.` : "";
}

function notice() {
  const words = trouble();
  at("notice").hidden = words === "";
  if (at("notice").textContent !== words) at("notice").textContent = words;
}

function table() {
  if (!at("table").open) return;
  at("rows").replaceChildren(
    ...model.order.map((lane) => {
      const row = document.createElement("tr");
      const cell = (text, name) => {
        const made = document.createElement(name ?? "td");
        made.textContent = text;
        return made;
      };
      const head = cell(lane.name, "th");
      head.scope = "row";
      const kv = `${count(lane.kv)} of ${count(lane.kvMax)}`;
      row.append(head, ...[lane.role, lane.node, doing(model, lane), kv, count(lane.queued)].map((text) => cell(text)));
      for (const number of [4, 5]) row.children[number].className = "num";
      return row;
    }),
  );
}
at("table").addEventListener("toggle", table);

// --- frames ---

function frame() {
  frames += 1;
  lanes.draw();
  requestAnimationFrame(frame);
}
requestAnimationFrame(frame);

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  lanes.dress();
  charts.dress();
});
window.addEventListener("resize", () => lanes.layOut());

// --- time, by button and key ---

function follow(isHeld) {
  lanes.hold(isHeld);
  if (!isHeld) at("tip").hidden = true;
  showTime();
}

function showTime() {
  const isHeld = lanes.heldAt !== null;
  at("follow").classList.toggle("held", isHeld);
  at("follow").textContent = isHeld ? "Follow" : "Hold";
  at("span").textContent = `${lanes.spanS} s`;
}

function zoom(by) {
  lanes.zoom(by);
  showTime();
}

at("follow").addEventListener("click", () => follow(lanes.heldAt === null));
at("zoom-in").addEventListener("click", () => zoom(-1));
at("zoom-out").addEventListener("click", () => zoom(1));

const KEYS = {
  " ": () => follow(lanes.heldAt === null),
  "+": () => zoom(-1),
  "=": () => zoom(-1),
  "-": () => zoom(1),
  ArrowLeft: () => {
    lanes.move(-0.25);
    showTime();
  },
  ArrowRight: () => {
    lanes.move(0.25);
    showTime();
  },
  ArrowUp: () => chosen(lanes.choose(-1)),
  ArrowDown: () => chosen(lanes.choose(1)),
  ".": () => looked(lanes.step(1)),
  ",": () => looked(lanes.step(-1)),
  Enter: () => watchHovered(),
  Escape: () => letGo(),
};

at("lanes").addEventListener("keydown", (event) => {
  const act = KEYS[event.key];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
});

document.addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    at("prompt").focus();
  }
});

function letGo() {
  lanes.chosen = null;
  lanes.name();
  ask.show(null);
  follow(false);
}

function chosen(lane) {
  at("tip").hidden = true;
  if (lane) say(`${lane.name}: ${doing(model, lane)}`);
}

function looked(segment) {
  if (lanes.heldAt === null) follow(true); // what is looked at must not run away
  lanes.name();
  say(segment ? describe(model, segment) : "nothing in view on this lane");
  if (segment) {
    const [x, y, w, h] = lanes.box(segment);
    const canvas = at("canvas").getBoundingClientRect();
    tip(segment, canvas.left + x + w / 2, canvas.top + y + h);
  }
}

function say(words) {
  at("said").textContent = words;
}

function watchHovered() {
  const request = model.requests.get(lanes.hovered?.request);
  if (!request) return;
  ask.show(request.name);
  ask.tell();
}

// --- pointer ---

function tip(segment, x, y) {
  const box = at("tip");
  box.hidden = segment === null;
  if (segment === null) return;
  box.textContent = describe(model, segment);
  const left = Math.min(x + 12, innerWidth - box.offsetWidth - 8);
  box.style.left = `${Math.max(8, left) + scrollX}px`;
  box.style.top = `${y + 14 + scrollY}px`;
}

at("canvas").addEventListener("pointermove", (event) => {
  lanes.hovered = lanes.find(event.offsetX, event.offsetY);
  tip(lanes.hovered, event.clientX, event.clientY);
});
at("canvas").addEventListener("pointerleave", () => {
  lanes.hovered = null;
  at("tip").hidden = true;
});
at("canvas").addEventListener("click", watchHovered);

/** For tests, and for the curious at the console. */
window.pecsched = { model, lanes, charts, frames: () => frames };
