// The lanes on their canvas: time runs to the left, what is new comes in at the right edge.
// A frame is drawn only if something moved by a device pixel, or changed.

import { clock } from "./words.js";

const SPANS_S = [5, 10, 20, 30, 60, 120];
const AXIS_PX = 20;
const COMET_S = 0.8; // how long a handoff shows where it went
const STEPS_S = [0.5, 1, 2, 5, 10, 20, 30];
const SHORT_MIN_PX = 1.5;
const COLOURS = ["card", "ink", "muted", "line", "stripe", "short", "long", "decode", "handoff", "waiting", "focus"];
const DIMMED = 0.35; // what is not the request that stands out

export class Lanes {
  /** @param {import("./model.js").Model} model */
  constructor(model, canvas, labels, still) {
    this.model = model;
    this.canvas = canvas;
    this.labels = labels;
    this.still = still; // a media query: motion in whole seconds only
    this.spanS = 30;
    this.heldAt = null; // router's seconds at the right edge while time is held
    this.edge = 0; // what the right edge showed when it was drawn last
    this.chosen = null; // lane index, by keyboard
    this.hovered = null; // segment
    this.watched = null; // request id
    this.frames = 0;
    this.drawn = "";
    this.rows = [];
    this.context = canvas.getContext("2d", { alpha: false });
    this.dress();
    new ResizeObserver(() => this.layOut()).observe(canvas.parentElement);
  }

  // --- time ---

  /** Router's seconds at the right edge by now. */
  get right() {
    const now = this.heldAt ?? this.model.now();
    return this.still.matches && this.heldAt === null ? Math.floor(now) : now;
  }

  hold(isHeld) {
    this.heldAt = isHeld ? this.edge : null;
    if (!isHeld) this.hovered = null;
  }

  move(share) {
    if (this.heldAt === null) this.hold(true);
    this.heldAt = Math.min(this.model.now(), this.heldAt + share * this.spanS);
  }

  zoom(by) {
    const at = SPANS_S.indexOf(this.spanS) + by;
    this.spanS = SPANS_S[Math.max(0, Math.min(SPANS_S.length - 1, at))];
  }

  x(at) {
    return this.width - (this.edge - at) * (this.width / this.spanS);
  }

  at(x) {
    return this.edge - (this.width - x) * (this.spanS / this.width);
  }

  // --- where a lane is ---

  /** Heights by the number of lanes: all on one screen if they can be read there. */
  layOut() {
    const order = this.model.order;
    const decoders = order.filter((lane) => lane.role === "decode").length;
    const prefillers = order.length - decoders;
    const room = Math.max(240, window.innerHeight - 330);
    const unit = Math.max(10, Math.min(26, Math.floor(room / (prefillers + 2 * decoders || 1))));
    let y = AXIS_PX;
    this.rows = order.map((lane, i) => {
      const previous = order[i - 1];
      if (previous && previous.role !== lane.role) y += 10;
      else if (previous && previous.node !== lane.node) y += 5;
      const height = lane.role === "decode" ? Math.min(44, 2 * unit) : unit;
      const row = { lane, y, height };
      y += height;
      return row;
    });
    this.byId = new Map(this.rows.map((row) => [row.lane.id, row]));
    this.width = Math.max(200, this.canvas.parentElement.clientWidth);
    this.height = Math.max(AXIS_PX + 60, y + 4);
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.canvas.style.height = `${this.height}px`;
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.name();
    this.drawn = "";
  }

  name() {
    this.labels.style.height = `${this.height}px`;
    this.labels.replaceChildren(
      ...this.rows.map(({ lane, y, height }, i) => {
        const item = document.createElement("li");
        item.textContent = lane.name;
        item.title = `${lane.name} (${lane.role}, ${lane.node})`;
        item.style.top = `${y}px`;
        item.style.lineHeight = item.style.height = `${height}px`;
        item.style.fontSize = `${Math.min(12, Math.max(9, (lane.role === "decode" ? height / 2 : height) - 1.5))}px`;
        item.classList.toggle("gone", !lane.here);
        item.classList.toggle("chosen", i === this.chosen);
        return item;
      }),
    );
  }

  /** The order of lanes, or who is here, is another than what was laid out. */
  get isStale() {
    const order = this.model.order;
    const isOther = (lane, i) => this.rows[i].lane !== lane || this.rows[i].here !== lane.here;
    return order.length !== this.rows.length || order.some(isOther);
  }

  // --- colours ---

  dress() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = Object.fromEntries(COLOURS.map((name) => [name, of(name)]));
    this.hatch = hatched(this.context, this.colours.long, this.colours.card);
    this.drawn = "";
  }

  // --- drawing ---

  draw() {
    if (this.isStale) {
      this.layOut();
      for (const row of this.rows) row.here = row.lane.here;
    }
    this.edge = this.right;
    const ratio = window.devicePixelRatio || 1;
    const pixel = Math.round((this.edge * this.width * ratio) / this.spanS);
    const lit = this.lit();
    const state = `${pixel} ${this.model.version} ${this.spanS} ${lit} ${this.chosen} ${this.hovered?.id}`;
    if (state === this.drawn) return false;
    this.drawn = state;
    this.frames += 1;
    const c = this.context;
    c.fillStyle = this.colours.card;
    c.fillRect(0, 0, this.width, this.height);
    this.drawGrid();
    const shown = this.sort();
    const decodeMax = Math.max(4, ...shown.decoders.map(([, spans]) => mostAtOnce(spans)));
    for (const [row, spans] of shown.decoders) this.drawBatch(row, spans, decodeMax, lit);
    for (const isLit of lit === null ? [true] : [false, true]) {
      c.globalAlpha = isLit ? 1 : DIMMED;
      this.drawBars(shown.bars, (segment) => lit === null || (segment.request === lit) === isLit);
    }
    c.globalAlpha = 1;
    this.drawComets(shown.handoffs, lit);
    this.drawChosen();
    return true;
  }

  /** The request that stands out. */
  lit() {
    return this.hovered?.request ?? this.watched;
  }

  /** Segments in view, by how they are drawn. */
  sort() {
    const bars = { forming: [], part: [], pause: [], waiting: [], prefill: [], long_decode: [] };
    const handoffs = [];
    const decoders = [];
    const left = this.at(0);
    const right = this.edge;
    for (const row of this.rows) {
      const batch = [];
      for (const segment of row.lane.segments.values()) {
        if (segment.begin > right || (segment.end !== null && segment.end < left)) continue;
        if (segment.kind === "handoff") handoffs.push(segment);
        else if (segment.kind === "decode") batch.push(segment);
        else bars[segment.kind]?.push(segment);
      }
      if (row.lane.role === "decode" || batch.length) decoders.push([row, batch]);
    }
    return { bars, handoffs, decoders };
  }

  drawGrid() {
    const c = this.context;
    const step = STEPS_S.find((s) => (s * this.width) / this.spanS >= 90) ?? 30;
    const heard = Math.max(0, this.x(0)); // left of it, nobody listened
    c.fillStyle = this.colours.stripe;
    for (const { y, height } of this.rows) c.fillRect(heard, y + 1, this.width - heard, height - 2);
    const wallRight = this.model.wall(this.edge);
    c.strokeStyle = this.colours.line;
    c.fillStyle = this.colours.muted;
    c.lineWidth = 1;
    c.font = "11px system-ui, sans-serif";
    c.textAlign = "center";
    c.textBaseline = "middle";
    c.beginPath();
    for (let wall = Math.floor(wallRight / step) * step; wall > wallRight - this.spanS - step; wall -= step) {
      const x = Math.round(this.width - (wallRight - wall) * (this.width / this.spanS)) + 0.5;
      c.moveTo(x, AXIS_PX);
      c.lineTo(x, this.height);
      if (x > 28 && x < this.width - 28) c.fillText(clock(wall, step), x, AXIS_PX / 2);
    }
    c.stroke();
  }

  drawBars(bars, isShown) {
    const c = this.context;
    const { long, short, waiting } = this.colours;
    const fill = (segments, colour, part) => {
      c.fillStyle = colour;
      for (const segment of segments) if (isShown(segment)) c.fillRect(...part(this.box(segment)));
    };
    const whole = ([x, y, w, h]) => [x, y, w, h];
    const foot =
      (share) =>
      ([x, y, w, h]) => [x, y + h * (1 - share), w, h * share];
    this.drawForming(bars.forming.filter(isShown));
    fill(bars.part, long, whole);
    this.drawPauses(bars.pause.filter(isShown));
    fill(bars.waiting, waiting, foot(0.22));
    fill(bars.prefill, short, ([x, y, w, h]) => [x, y, Math.max(SHORT_MIN_PX, w), h]);
    fill(bars.long_decode, this.colours.stripe, foot(0.42));
    fill(bars.long_decode, long, foot(0.3));
  }

  drawForming(segments) {
    const c = this.context;
    c.strokeStyle = this.colours.long;
    c.setLineDash([2, 2]);
    for (const segment of segments) {
      const [x, y, w, h] = this.box(segment);
      c.strokeRect(x + 0.5, y + 0.5, Math.max(1, w - 1), h - 1);
    }
    c.setLineDash([]);
  }

  /** The long's bar is open here: hatched, between two rails, so that the shorts in it stand out. */
  drawPauses(segments) {
    const c = this.context;
    this.hatch.setTransform(new DOMMatrix().translate(this.x(0) % HATCH_PX, 0));
    for (const segment of segments) {
      const [x, y, w, h] = this.box(segment);
      c.fillStyle = this.hatch;
      c.fillRect(x, y, w, h);
      c.fillStyle = this.colours.long;
      c.fillRect(x, y, w, 1);
      c.fillRect(x, y + h - 1, w, 1);
    }
  }

  /** What decodes at once, as a mountain; of the request that stands out, a line at its foot. */
  drawBatch({ y, height, lane }, spans, most, lit) {
    const c = this.context;
    const room = (lane.role === "decode" ? height - 4 : height * 0.3) / most;
    const bottom = y + height - 2;
    const right = this.width;
    const edges = spans.flatMap((s) => [
      [this.x(s.begin), 1],
      [Math.min(right, s.end === null ? right : this.x(s.end)), -1],
    ]);
    edges.sort((a, b) => a[0] - b[0]);
    c.globalAlpha = lit === null ? 1 : DIMMED;
    c.fillStyle = this.colours.decode;
    let depth = 0;
    for (let i = 0; i < edges.length - 1; i += 1) {
      depth += edges[i][1];
      const x = Math.max(0, edges[i][0]);
      const width = edges[i + 1][0] - x;
      if (depth > 0 && width > 0) c.fillRect(x, bottom - depth * room, width, depth * room);
    }
    c.globalAlpha = 1;
    for (const segment of spans) {
      if (segment.request !== lit) continue;
      const [x, , w] = this.box(segment);
      c.fillRect(x, bottom - Math.max(4, room), Math.max(2, w), Math.max(4, room));
    }
  }

  /** Handoffs: a tick where they end; the newest, and those of the request that stands out, show where they went. */
  drawComets(segments, lit) {
    const c = this.context;
    c.fillStyle = c.strokeStyle = this.colours.handoff;
    for (const segment of segments) {
      const isLit = segment.request === lit;
      const [x, y, w, h] = this.box(segment);
      c.globalAlpha = lit === null || isLit ? 1 : DIMMED;
      c.fillRect(x, y, Math.max(1.5, w), h);
      const age = this.edge - (segment.end ?? this.edge);
      const glow = isLit ? 0.9 : this.still.matches ? 0 : 0.4 * (1 - age / COMET_S);
      const to = this.byId.get(segment.detail);
      if (glow <= 0.02 || !to || age < 0) continue;
      c.globalAlpha = lit === null || isLit ? glow : glow * 0.3;
      c.lineWidth = isLit ? 1.8 : 1;
      const end = x + Math.max(1.5, w);
      c.beginPath();
      c.moveTo(end, y + h / 2);
      c.bezierCurveTo(end - 22, y + h / 2 + 20, end - 22, to.y, end, to.y + to.height / 2);
      c.stroke();
    }
    c.globalAlpha = 1;
    c.lineWidth = 1;
  }

  drawChosen() {
    if (this.chosen === null || !this.rows[this.chosen]) return;
    const { y, height } = this.rows[this.chosen];
    this.context.strokeStyle = this.colours.focus;
    this.context.lineWidth = 1.5;
    this.context.strokeRect(1, y + 0.5, this.width - 2, height - 1);
    this.context.lineWidth = 1;
  }

  /** [x, y, width, height] of a segment within what is seen. */
  box(segment) {
    const row = this.byId.get(segment.lane);
    const x = Math.max(-2, this.x(segment.begin));
    const end = this.x(Math.min(this.edge, segment.end ?? this.edge));
    return [x, row.y + 1, Math.max(0.75, end - x), row.height - 2];
  }

  // --- finding ---

  /** The segment under a point of the canvas; null: none. */
  find(px, py) {
    const row = this.rows.find(({ y, height }) => py >= y && py < y + height);
    if (!row) return null;
    const slack = (3 * this.spanS) / this.width;
    const at = this.at(px);
    let best = null;
    for (const segment of row.lane.segments.values()) {
      if (segment.begin - slack > at || (segment.end ?? this.edge) + slack < at) continue;
      if (best === null || length(segment) < length(best)) best = segment;
    }
    return best;
  }

  /** The next segment of the chosen lane, in this direction from the one that is looked at. */
  step(direction) {
    const row = this.rows[this.chosen ?? 0];
    if (!row) return null;
    this.chosen ??= 0;
    const isSeen = (s) => (s.end ?? this.edge) >= this.at(0) && s.begin <= this.edge;
    const inView = [...row.lane.segments.values()].filter(isSeen);
    inView.sort((a, b) => a.begin - b.begin || a.id - b.id);
    const from = inView.indexOf(this.hovered);
    const to = from < 0 ? (direction > 0 ? 0 : inView.length - 1) : from + direction;
    this.hovered = inView[Math.max(0, Math.min(inView.length - 1, to))] ?? null;
    return this.hovered;
  }

  choose(by) {
    const before = this.chosen;
    if (!this.rows.length) return null;
    this.chosen = before === null ? 0 : Math.max(0, Math.min(this.rows.length - 1, before + by));
    this.hovered = null;
    this.name();
    return this.rows[this.chosen].lane;
  }
}

const HATCH_PX = 6;

function hatched(context, line, ground) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = HATCH_PX;
  const c = tile.getContext("2d");
  c.fillStyle = ground;
  c.fillRect(0, 0, HATCH_PX, HATCH_PX);
  c.strokeStyle = line;
  c.globalAlpha = 0.65;
  c.lineWidth = 1.2;
  c.beginPath();
  for (const at of [-HATCH_PX, 0, HATCH_PX]) {
    c.moveTo(at, HATCH_PX);
    c.lineTo(at + HATCH_PX, 0);
  }
  c.stroke();
  return context.createPattern(tile, "repeat");
}

function mostAtOnce(spans) {
  const edges = spans.flatMap((s) => [
    [s.begin, 1],
    [s.end ?? Infinity, -1],
  ]);
  edges.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  let depth = 0;
  let most = 0;
  for (const [, by] of edges) most = Math.max(most, (depth += by));
  return most;
}

function length(segment) {
  return (segment.end ?? Infinity) - segment.begin;
}
