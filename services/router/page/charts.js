// Two charts over the last minutes: time to first token by class, and what waits.

import uPlot from "./uPlot.esm.js";
import { clock, seconds } from "./words.js";

const HEIGHT_PX = 170;
const SPAN_MIN_S = 60;
const WHOLE_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000];

export class Charts {
  constructor(model, ttft, queue) {
    this.model = model;
    this.places = { ttft, queue };
    this.dress();
    new ResizeObserver(() => this.fit()).observe(ttft);
  }

  /** uPlot takes its colours when it is made. */
  dress() {
    this.ttft?.destroy();
    this.queue?.destroy();
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    const colours = { short: of("short"), long: of("long"), muted: of("muted"), line: of("line") };
    this.ttft = this.make("ttft", {
      scales: { y: { distr: 3, range: decades } },
      axes: axes(colours, seconds, tens),
      series: series(colours, seconds),
    });
    this.queue = this.make("queue", {
      scales: { y: { range: (u, low, high) => [0, Math.max(4, (high ?? 0) * 1.1)] } },
      axes: axes(colours, String, undefined, WHOLE_STEPS),
      series: series(
        colours,
        (v) => (v === null || v === undefined ? "–" : String(v)),
        uPlot.paths.stepped({ align: 1 }),
      ),
    });
    this.update();
  }

  make(name, options) {
    const cursor = { drag: { x: false, y: false }, sync: { key: "pecsched" } };
    return new uPlot(
      { width: this.width(name), height: HEIGHT_PX, cursor, ...options },
      [[], [], []],
      this.places[name],
    );
  }

  width(name) {
    return Math.max(200, this.places[name].clientWidth);
  }

  fit() {
    this.ttft.setSize({ width: this.width("ttft"), height: HEIGHT_PX });
    this.queue.setSize({ width: this.width("queue"), height: HEIGHT_PX });
  }

  update() {
    const history = this.model.history;
    const walls = history.map(([at]) => this.model.wall(at));
    const last = walls.at(-1) ?? Date.now() / 1000;
    // A minute at least, so that a young page does not look busy.
    const before = last - (walls[0] ?? last) < SPAN_MIN_S ? [last - SPAN_MIN_S] : [];
    walls.unshift(...before);
    const column = (i) => [...before.map(() => null), ...history.map((row) => row[i])];
    this.ttft.setData([walls, column(3), column(4)]);
    this.queue.setData([walls, column(1), column(2)]);
  }
}

function series(colours, say, paths) {
  const value = (u, v) => say(v);
  const line = (label, stroke, dash) => ({ label, stroke, dash, paths, value, width: 2, points: { show: false } });
  return [{}, line("shorts", colours.short), line("longs", colours.long, [6, 4])];
}

function axes(colours, say, splits, incrs) {
  const grid = { stroke: colours.line, width: 1 };
  const common = { stroke: colours.muted, grid, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const time = (u, ticks) => ticks.map((v) => clock(v, 1));
  const value = (u, ticks) => ticks.map((v) => say(v));
  return [
    { ...common, space: 100, size: 30, values: time },
    { ...common, size: 58, splits, incrs, values: value },
  ];
}

function tens(u, axis, low, high) {
  const found = [];
  const last = Math.round(Math.log10(high));
  for (let power = Math.round(Math.log10(low)); power <= last; power += 1) found.push(10 ** power);
  return found;
}

/** Whole decades around the data, two at least. */
function decades(u, low, high) {
  if (low === null || high === null) return [0.01, 1];
  const from = Math.floor(Math.log10(Math.max(low, 1e-4)));
  const to = Math.max(from + 2, Math.ceil(Math.log10(Math.max(high, 1e-4))));
  return [10 ** from, 10 ** to];
}
