// Numbers and segments in words.

const NAMES = {
  waiting: "short at its worker, waiting or running",
  prefill: "short prefill",
  handoff: "KV handoff",
  decode: "decode",
  forming: "long: its workers meet",
  part: "long prefill",
  pause: "long paused, shorts run",
  long_decode: "long decodes",
};

const TOGETHER_S = 0.05;

export const count = new Intl.NumberFormat("en").format;

/** 0.0123 → "12 ms", 3.21 → "3.2 s"; null → "–". */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return `${(value * 1000).toFixed(2)} ms`;
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

export function short(name) {
  return name.length <= 18 ? name : `${name.slice(0, 10)}…${name.slice(-6)}`;
}

/** One segment, in a line. */
export function describe(model, segment) {
  const request = model.requests.get(segment.request);
  const lane = model.lanes.get(segment.lane);
  const parts = [NAMES[segment.kind] ?? segment.kind, lasting(model, segment)];
  if (segment.kind === "handoff") parts.push(`to ${model.lanes.get(segment.detail)?.name || "its decode worker"}`);
  parts.push(`on ${lane?.name ?? "a worker"}`);
  if (request) parts.push(`${count(request.tokens)} tokens`, short(request.name));
  return parts.join(" · ");
}

export function lasting(model, segment) {
  const length = Math.max(0, (segment.end ?? model.now()) - segment.begin);
  return segment.end === null ? `${seconds(length)} so far` : seconds(length);
}

/** What a worker does, for who does not see the lanes. */
export function doing(model, lane) {
  if (!lane.here) return "gone";
  const open = [...lane.segments.values()].filter((segment) => segment.end === null);
  const of = (kind) => open.filter((segment) => segment.kind === kind);
  const name = (segment) => short(model.requests.get(segment.request)?.name ?? "a request");
  const said = [];
  for (const segment of of("part")) said.push(`prefills the long ${name(segment)}`);
  for (const segment of of("pause")) said.push(`the long ${name(segment)} is paused here`);
  for (const segment of of("forming")) said.push(`meets others for the long ${name(segment)}`);
  if (of("long_decode").length) said.push(`decodes ${plural(of("long_decode").length, "long")}`);
  if (of("decode").length) said.push(`decodes ${plural(of("decode").length, "request")}`);
  if (of("waiting").length) said.push(`${plural(of("waiting").length, "short")} in hand`);
  return said.join(", ") || "idle";
}

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** A request's way in one sentence; empty: nothing is known yet. */
export function summary(model, request) {
  const total = new Map();
  for (const { kind, lane, begin, end } of model.segmentsOf(request.id)) {
    const sum = total.get(kind) ?? { took: 0, times: 0, lane };
    if (sum.lane !== lane) continue; // of a group, one rank speaks for all
    sum.took += (end ?? model.now()) - begin;
    sum.times += 1;
    total.set(kind, sum);
  }
  const said = [];
  const say = (kind, words) => total.has(kind) && said.push(words(total.get(kind)));
  say("prefill", ({ took }) => `prefilled in ${seconds(took)}`);
  say("part", ({ took, times }) => `prefilled in ${seconds(took)}${times > 1 ? `, in ${times} parts` : ""}`);
  say("pause", ({ took, times }) => `paused ${times === 1 ? "once" : `${times} times`}, ${seconds(took)} in all`);
  say("decode", ({ took }) => `decoded for ${seconds(took)}`);
  say("long_decode", ({ took }) => `decoded for ${seconds(took)}`);
  return said.join("; ");
}

/** A request's way as steps: [what, where, how long]. */
export function way(model, request) {
  const steps = [];
  const segments = model.segmentsOf(request.id).filter((segment) => segment.kind !== "waiting" || segment.end === null);
  const first = segments[0];
  if (request.submitted !== null && first) {
    const took = seconds(Math.max(0, first.begin - request.submitted));
    steps.push({ what: "queued at the scheduler", where: "", kind: "queued", took });
  }
  for (const segment of segments) {
    const { kind, begin } = segment;
    const where = model.lanes.get(segment.lane)?.name ?? "";
    const last = steps[steps.length - 1];
    if (last?.kind === kind && Math.abs(last.begin - begin) < TOGETHER_S && !last.where.includes(where)) {
      last.where += `, ${where}`; // the ranks of a group
      continue;
    }
    const to = kind === "handoff" ? ` → ${model.lanes.get(segment.detail)?.name ?? ""}` : "";
    steps.push({ what: NAMES[kind], where: where + to, kind, took: lasting(model, segment), begin });
  }
  return steps;
}

/** Time of day of seconds since 1970; with tenths where a step is shorter than a second. */
export function clock(wall, step) {
  const date = new Date(wall * 1000);
  const two = (n) => String(n).padStart(2, "0");
  const whole = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  return step < 1 ? `${whole}.${Math.round(date.getMilliseconds() / 100) % 10}` : whole;
}
