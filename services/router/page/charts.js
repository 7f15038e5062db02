// Two charts over the last minutes: time to first token by class, and what waits.

import uPlot from "./uPlot.esm.js";
import { seconds } from "./words.js";

const HEIGHT_PX = 170;

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
    const time = (scale) => ({
      width: this.width(scale), height: HEIGHT_PX, legend: { live: true }, cursor: { drag: { x: false, y: false }, sync: { key: "pecsched" } },
    });
    this.ttft = new uPlot(
      { ...time("ttft"), scales: { y: { distr: 3, range: decades } }, axes: axes(colours, (u, ticks) => ticks.map((v) => (v === null ? "" : seconds(v)))), series: series(colours, seconds) },
      [[], [], []],
      this.places.ttft,
    );
    const whole = (u, v) => (v === null || v === undefined ? "–" : String(v));
    this.queue = new uPlot(
      { ...time("queue"), scales: { y: { range: (u, low, high) => [0, Math.max(4, high * 1.1)] } }, axes: axes(colours, (u, ticks) => ticks.map((v) => (Number.isInteger(v) ? String(v) : ""))), series: series(colours, (v) => whole(null, v), uPlot.paths.stepped({ align: 1 })) },
      [[], [], []],
      this.places.queue,
    );
    this.update();
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
    const column = (i) => history.map((row) => row[i]);
    this.ttft.setData([walls, column(3), column(4)]);
    this.queue.setData([walls, column(1), column(2)]);
  }
}

function series(colours, say, paths) {
  const line = (label, stroke, dash) => ({ label, stroke, dash, width: 2, points: { show: false }, paths, value: (u, v) => say(v) });
  return [{ value: (u, v) => (v === null || v === undefined ? "–" : new Date(v * 1000).toLocaleTimeString()) }, line("shorts", colours.short), line("longs", colours.long, [6, 4])];
}

function axes(colours, values) {
  const common = { stroke: colours.muted, grid: { stroke: colours.line, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  return [{ ...common, space: 90 }, { ...common, size: 56, values }];
}

/** Whole decades around the data, two at least. */
function decades(u, low, high) {
  if (low === null || high === null) return [0.01, 1];
  const from = Math.floor(Math.log10(Math.max(low, 1e-4)));
  const to = Math.max(from + 2, Math.ceil(Math.log10(Math.max(high, 1e-4))));
  return [10 ** from, 10 ** to];
}
