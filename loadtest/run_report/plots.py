"""The plots of a run: distributions, what happened over time, and what every worker did."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from loadtest.plotting import WIDTH, panels_of, svg
from loadtest.run_report.record import METRICS, Recorded
from loadtest.simulator.outputs import natural
from loadtest.simulator.result import Span
from loadtest.stats import percentile

SHORT, LONG = "#e07b39", "#3b6ea8"
PAUSED, DECODE = "#f2d9c9", "#9bbfa3"
GRID = "#d9d9d9"
STYLES = ("-", "--", ":", "-.")
"""One per run; further runs use them again."""
CURVE_POINTS = 400
VECTORS_MAX = 1_500
"""More marks than that in a plot are drawn as pixels."""
SMALLEST_S = 1e-3
"""Of a logarithmic axis."""
DECADES_FEW = 2.2
WINDOWS = 40
"""Over a run, in which its percentiles are taken."""
LANES_MAX = 24
PAUSES_SHOWN = 5
LABELS = {"ttft_s": "TTFT, s", "itl_s": "ITL, s", "jct_s": "JCT, s"}
COLOURS = {"long prefill": LONG, "paused": PAUSED, "long decode": "#8fb3d9", "short prefill": SHORT}
"""Kind of span → its colour; those drawn later lie on top."""


def latencies(runs: Sequence[Recorded]) -> str:
    """Distributions of TTFT, ITL and JCT: a colour per class, a style per run."""
    figure = Figure(figsize=(WIDTH, 3.5))
    figure.subplots_adjust(left=0.06, right=0.99, top=0.9, bottom=0.16, wspace=0.16)
    for panel, (metric, title) in zip(panels_of(figure, 1, 3), LABELS.items(), strict=True):
        for number, run in enumerate(runs):
            for long, colour in ((False, SHORT), (True, LONG)):
                values = [value for o in run.good(long=long) if (value := METRICS[metric](o)) is not None]
                label = f"{'longs' if long else 'shorts'}{f', {run.label}' if len(runs) > 1 else ''}"
                _curve(panel, values, colour, STYLES[number % len(STYLES)], label)
        panel.set_xscale("log")
        _seconds(panel.xaxis)
        panel.set_ylim(0.0, 1.0)
        panel.set_yticks([0.0, 0.25, 0.5, 0.75, 0.9, 1.0], ["0", ".25", ".5", ".75", ".9", "1"])
        panel.set_xlabel(title)
        _plain(panel)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, ncols=len(names), loc="upper right")
    return svg(figure, "latencies")


def over_time(run: Recorded) -> str:
    """Queueing delay (or TTFT, where it is not known) of every answer at its arrival; below, the arrivals."""
    metric = "queueing_delay_s" if run.listened else "ttft_s"
    figure = Figure(figsize=(WIDTH, 4.0))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    figure.subplots_adjust(left=0.06, right=0.99, top=0.92, bottom=0.11, hspace=0.1)
    for long, colour, size, name in ((False, SHORT, 14, "shorts"), (True, LONG, 30, "longs")):
        points = [(o.arrived_s, value) for o in run.good(long=long) if (value := METRICS[metric](o)) is not None]
        if not points:
            continue
        times, values = [at_s for at_s, _ in points], [max(value, SMALLEST_S) for _, value in points]
        marks = upper.scatter(
            times, values, s=size, color=colour, alpha=0.55, linewidths=0, marker="D" if long else "o", label=name
        )
        marks.set_rasterized(len(points) > VECTORS_MAX)
        if not long:
            upper.plot(*_rolling(points, 90), color=SHORT, linewidth=1.4, label="shorts, p90")
    upper.set_yscale("log")
    _seconds(upper.yaxis)
    upper.set_ylabel("queueing delay, s" if run.listened else "TTFT, s")
    figure.legend(fontsize=8, frameon=False, ncols=3, loc="upper right")
    _arrivals(lower, run)
    for panel in (upper, lower):
        _plain(panel)
    lower.set_xlabel("s")
    return svg(figure, f"over time {run.label}")


def lanes(run: Recorded) -> str:
    """The whole run."""
    return _lanes(run, 0.0, max(span.end_s for span in run.spans), f"lanes {run.label}")


def lanes_around_pauses(run: Recorded) -> str:
    """A stretch with some pauses of the long that was paused most; empty without pauses."""
    window = pauses_window(run.spans)
    return "" if window is None else _lanes(run, *window, f"pauses {run.label}")


def pauses_window(spans: Sequence[Span]) -> tuple[float, float] | None:
    """Of the request with the most pauses, from before the first to after the last of a few of them that stand
    closest together; None: nothing was paused."""
    by_request: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        if span.kind == "paused":
            by_request.setdefault((span.request_id, span.lane), []).append(span)
    if not by_request:
        return None
    most = max(by_request.values(), key=lambda own: len(own))
    pauses = sorted(most, key=lambda span: span.begin_s)
    few = min(PAUSES_SHOWN, len(pauses))
    first = min(range(len(pauses) - few + 1), key=lambda at: pauses[at + few - 1].end_s - pauses[at].begin_s)
    begin_s, end_s = pauses[first].begin_s, pauses[first + few - 1].end_s
    margin_s = max(0.15 * (end_s - begin_s), 1e-3)
    return max(0.0, begin_s - margin_s), end_s + margin_s


def lanes_shown(spans: Iterable[Span]) -> list[str]:
    """The workers to draw, prefill before decode, in the order of their names: all of them or, of many, those with the
    most pauses, then the most longs."""
    weights: dict[str, list[int]] = {}
    for span in spans:
        weight = weights.setdefault(span.lane, [0, 0, 0])
        weight[0] += span.kind == "paused"
        weight[1] += span.kind == "long prefill"
        weight[2] += 1
    chosen = sorted(weights, key=lambda lane: weights[lane], reverse=True)[:LANES_MAX]
    return sorted(chosen, key=lambda lane: (lane.endswith(" decode"), natural(lane)))


def _lanes(run: Recorded, begin_s: float, end_s: float, name: str) -> str:
    inside = [span for span in run.spans if span.end_s > begin_s and span.begin_s < end_s]
    shown = lanes_shown(run.spans)
    hidden = len({span.lane for span in run.spans}) - len(shown)
    height = 0.34 * len(shown) + 0.95
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.13, right=0.99, top=1 - 0.4 / height, bottom=0.45 / height)
    panel = figure.subplots()
    for row, lane in enumerate(shown):
        own = [span for span in inside if span.lane == lane]
        if any(span.kind == "short decode" for span in own):
            _held(panel, row, own, begin_s, end_s)
            own = [span for span in own if span.kind != "short decode"]
        _bars(panel, row, own)
    panel.set_xlim(begin_s, end_s)
    panel.set_ylim(len(shown) - 0.4, -0.6)
    panel.set_yticks(range(len(shown)), shown, fontsize=8)
    panel.set_xlabel("s" if not hidden else f"s ({hidden} further lanes, with fewer pauses and longs, are left out)")
    panel.tick_params(axis="y", length=0)
    _plain(panel)
    panel.grid(axis="y", visible=False)
    names = [*COLOURS.items(), ("short decode (sequences held)", DECODE)]
    handles = [Patch(facecolor=colour, label=kind) for kind, colour in names]
    figure.legend(handles=handles, fontsize=8, ncols=len(names), frameon=False, loc="upper right")
    return svg(figure, name)


def _bars(panel: Axes, row: int, spans: Sequence[Span]) -> None:
    """Later kinds of `COLOURS` lie on earlier ones."""
    for kind, colour in COLOURS.items():
        boxes = [(span.begin_s, span.end_s - span.begin_s) for span in spans if span.kind == kind]
        if not boxes:
            continue
        thick = 0.62 if kind == "short prefill" else 0.8
        bars = panel.broken_barh(boxes, (row - thick / 2, thick), facecolors=colour, linewidth=0)
        if kind == "paused":
            bars.set(edgecolor=LONG, linewidth=0.3)
        bars.set_rasterized(len(boxes) > VECTORS_MAX // 4)


def _held(panel: Axes, row: int, spans: Sequence[Span], begin_s: float, end_s: float) -> None:
    """How many sequences decode, as an area that fills the lane at most."""
    changes: dict[float, int] = {}
    for span in spans:
        if span.kind == "short decode":
            changes[max(span.begin_s, begin_s)] = changes.get(max(span.begin_s, begin_s), 0) + 1
            changes[min(span.end_s, end_s)] = changes.get(min(span.end_s, end_s), 0) - 1
    held, steps = 0, []
    for at_s in sorted(changes):
        steps.append((at_s, held))
        held += changes[at_s]
        steps.append((at_s, held))
    most = max((held for _, held in steps), default=0) or 1
    floor = row + 0.4
    outline = [(at_s, floor - 0.8 * held / most) for at_s, held in steps]
    area = PolyCollection([[(steps[0][0], floor), *outline, (steps[-1][0], floor)]], facecolors=DECODE, linewidths=0)
    area.set_rasterized(len(steps) > VECTORS_MAX)
    panel.add_collection(area)
    panel.text(end_s, row - 0.38, f"max {most} ", fontsize=6.5, color="#555555", ha="right", va="top")


def _arrivals(panel: Axes, run: Recorded) -> None:
    """Per second, in windows."""
    width_s = (run.load.duration_s or 1.0) / (2 * WINDOWS)
    for long, colour in ((False, SHORT), (True, LONG)):
        counts = [0] * (2 * WINDOWS + 1)
        for outcome in run.outcomes:
            if outcome.long == long:
                counts[int(outcome.arrived_s / width_s)] += 1
        panel.bar(
            [place * width_s for place in range(len(counts))],
            [count / width_s for count in counts],
            width=width_s,
            align="edge",
            color=colour,
            linewidth=0,
        )
    panel.set_ylabel("arrivals/s", fontsize=8)
    panel.set_xlim(left=0.0)


def _curve(panel: Axes, values: Sequence[float], colour: str, style: str, label: str) -> None:
    """A cumulative distribution, of no more points than can be told apart."""
    if not values:
        return
    ordered = sorted(max(value, SMALLEST_S) for value in values)
    number = len(ordered)
    places = (
        range(number) if number <= CURVE_POINTS else [i * (number - 1) // CURVE_POINTS for i in range(CURVE_POINTS + 1)]
    )
    panel.plot(
        [ordered[0], *(ordered[place] for place in places)],
        [0.0, *((place + 1) / number for place in places)],
        style,
        color=colour,
        linewidth=1.6,
        label=f"{label} ({number})",
        drawstyle="steps-post",
    )


def _rolling(points: Sequence[tuple[float, float]], percent: float) -> tuple[list[float], list[float]]:
    """A percentile around each of some moments: of the answers within a window's length of it."""
    ordered = sorted(points)
    times = [at_s for at_s, _ in ordered]
    reach_s = (times[-1] - times[0]) / WINDOWS or 1.0
    moments, values = [], []
    for number in range(WINDOWS + 1):
        at_s = times[0] + number * reach_s
        near = ordered[bisect.bisect_left(times, at_s - reach_s) : bisect.bisect_right(times, at_s + reach_s)]
        found = percentile([value for _, value in near], percent)
        if found is not None:
            moments.append(at_s)
            values.append(max(found, SMALLEST_S))
    return moments, values


def _seconds(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, of few decades more of them."""
    low, high = sorted(axis.get_view_interval())
    few = math.log10(high / low) < DECADES_FEW
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1.0 else f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def _plain(panel: Axes) -> None:
    panel.grid(color=GRID, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, color=GRID)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#aaaaaa")
