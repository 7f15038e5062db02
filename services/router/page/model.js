// What the router said, as the page knows it: lanes, segments, requests. Draws nothing, asks nobody.

/** Seconds of ended segments that are kept, whatever the zoom shows. */
export const KEPT_S = 150;
/** The right edge is so far behind what was heard last: changes come ten times a second, and a short's prefill is told
 *  when it is done. */
const LAG_S = 0.25;
const HISTORY_MAX = 600;

/** @typedef {{id: number, lane: number, kind: string, request: number, begin: number, end: number|null,
 *             detail: number}} Segment */
/** @typedef {{id: number, name: string, role: string, node: string, here: boolean, kv: number, kvMax: number,
 *             queued: number, segments: Map<number, Segment>}} Lane */
/** @typedef {{id: number, name: string, long: boolean, tokens: number, submitted: number|null}} Request */

export class Model {
  constructor() {
    this.listeners = new Set();
    this.reset();
  }

  reset() {
    /** @type {Map<number, Lane>} */ this.lanes = new Map();
    /** @type {Lane[]} in the order they are drawn */ this.order = [];
    /** @type {Map<number, Request>} */ this.requests = new Map();
    /** @type {Map<string, Request>} */ this.byName = new Map();
    this.summary = null;
    /** Rows [at, queued shorts, queued longs, p99 of shorts, p99 of longs]. */ this.history = [];
    this.model = "";
    this.version = 0;
    this.offset = null;
    this.heardAt = 0;
  }

  /** @param {{model: string, change: object, history: Array}} state */
  begin(state) {
    this.reset();
    this.model = state.model;
    this.history = state.history.slice(-HISTORY_MAX);
    this.apply(state.change, true);
  }

  apply(change, isWhole = false) {
    this.tune(change.now_s);
    if (change.summary !== null) this.summarize(change.summary, isWhole);
    for (const [id, name, kind, tokens, submitted] of change.requests) {
      this.learn({ id, name, long: kind === "long", tokens, submitted });
    }
    for (const row of change.segments) this.place(row);
    this.version += 1;
    for (const listener of this.listeners) listener(change);
  }

  learn(request) {
    this.requests.set(request.id, request);
    this.byName.set(request.name, request);
  }

  place([id, laneId, kind, request, begin, end, detail]) {
    const lane = this.lane(laneId);
    if (end !== null && end <= begin) lane.segments.delete(id);
    else lane.segments.set(id, { id, lane: laneId, kind, request, begin, end, detail });
  }

  lane(id) {
    let lane = this.lanes.get(id);
    if (lane === undefined) {
      lane = { id, name: "", role: "prefill", node: "", here: true, kv: 0, kvMax: 0, queued: 0, segments: new Map() };
      this.lanes.set(id, lane);
    }
    return lane;
  }

  summarize(summary, isWhole) {
    this.summary = summary;
    const told = new Set();
    for (const [id, name, role, node, here, kv, kvMax, queued] of summary.lanes) {
      told.add(id);
      Object.assign(this.lane(id), { name, role, node, here, kv, kvMax, queued });
    }
    for (const [id, lane] of this.lanes) if (!told.has(id) && lane.name !== "") this.lanes.delete(id);
    this.order = [...this.lanes.values()].filter((lane) => lane.name !== "").sort(inOrder);
    if (!isWhole) this.history.push(summary.sample);
    if (this.history.length > HISTORY_MAX) this.history.shift();
    this.forget(this.now() - KEPT_S);
  }

  /** Drop what ended before then. */
  forget(before) {
    const used = new Set();
    for (const lane of this.lanes.values()) {
      for (const [id, segment] of lane.segments) {
        if (segment.end !== null && segment.end < before) lane.segments.delete(id);
        else used.add(segment.request);
      }
    }
    for (const [id, request] of this.requests) {
      if (used.has(id)) continue;
      this.requests.delete(id);
      if (this.byName.get(request.name) === request) this.byName.delete(request.name);
    }
  }

  /** Segments of one request, in order of time. */
  segmentsOf(requestId) {
    const found = [];
    for (const lane of this.lanes.values()) {
      for (const segment of lane.segments.values()) if (segment.request === requestId) found.push(segment);
    }
    return found.sort((a, b) => a.begin - b.begin || a.id - b.id);
  }

  /** The router's clock from this page's: the least delayed message tells the truth, slowly forgotten. */
  tune(nowS) {
    this.heardAt = performance.now() / 1000;
    const offset = nowS - this.heardAt;
    this.offset = this.offset === null ? offset : Math.max(offset, this.offset - 0.005);
  }

  /** What the right edge shows, in the router's seconds. */
  now() {
    return this.offset === null ? 0 : performance.now() / 1000 + this.offset - LAG_S;
  }

  /** Seconds since 1970 of one of the router's. */
  wall(at) {
    return Date.now() / 1000 - this.now() + at;
  }
}

function inOrder(a, b) {
  const roles = (lane) => (lane.role === "decode" ? 1 : 0);
  return roles(a) - roles(b) || compare(a.node, b.node) || compare(a.name, b.name);
}

const compare = new Intl.Collator("en", { numeric: true }).compare;
