// The connection to the router: server-sent events by fetch (an EventSource cannot send a key), again and again.

const SILENCE_MS = 5000;
const AGAIN_MS = [500, 1000, 2000, 4000];
const KEY = "pecsched.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  headers: () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {}),
};

/** Calls `hear(name, data)` for every event and `tell(state, words)` when the connection changes: "live", "lost", "key".
 *  Returns a function that tries at once. */
export function connect(hear, tell) {
  let tries = 0;
  let wake = () => {};
  const pause = (ms) =>
    new Promise((done) => {
      wake = done;
      setTimeout(done, ms);
    });

  async function once() {
    const ending = new AbortController();
    let timer = setTimeout(() => ending.abort(), SILENCE_MS);
    try {
      const answer = await fetch("/activity", { headers: key.headers(), signal: ending.signal, cache: "no-store" });
      if (answer.status === 401) return { state: "key", words: key.get() ? "That key is not this router’s." : "" };
      if (!answer.ok) return { state: "lost", words: await reason(answer) };
      for await (const [name, data] of events(answer.body)) {
        clearTimeout(timer);
        timer = setTimeout(() => ending.abort(), SILENCE_MS);
        if (name === "end") return { state: "lost", words: `The router closed the stream: ${data}.` };
        tries = 0;
        hear(name, data);
        tell("live", "");
      }
      return { state: "lost", words: "The router closed the stream." };
    } catch (error) {
      const silent = error.name === "AbortError";
      return { state: "lost", words: silent ? "The router says nothing." : "The router does not answer." };
    } finally {
      clearTimeout(timer);
      ending.abort();
    }
  }

  (async () => {
    for (;;) {
      const { state, words } = await once();
      const wait = state === "key" ? 3_600_000 : AGAIN_MS[Math.min(tries, AGAIN_MS.length - 1)];
      tries += 1;
      tell(state, words);
      await pause(wait);
    }
  })();
  return () => wake();
}

/** Server-sent events of a body: [name, parsed data]. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const lines = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field("data");
      if (data === "[DONE]") return;
      if (data !== undefined) yield [field("event") ?? "message", JSON.parse(data)];
    }
  }
}

/** What an error answer says. */
export async function reason(answer) {
  try {
    const said = await answer.json();
    return said.error?.message ?? `The router answered ${answer.status}.`;
  } catch {
    return `The router answered ${answer.status}.`;
  }
}
