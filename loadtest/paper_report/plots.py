"""Plots as SVG text, to stand inside a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.paper_report.comparison import Compared, show
from loadtest.paper_report.targets import Policies, value
from loadtest.paper_report.variants import SWEEP_VARIANTS, VARIANTS
from loadtest.plotting import TITLE_Y, WIDTH, panels_of, svg

PAPER_COLOUR = "#444444"
LOAD_COLOURS = ("#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b", "#b279a2")
"""One per load; more loads than that use them again."""
SWEEP_STYLES = {"no_longs": ("#54a24b", "--"), "pecsched": ("#4c78a8", "-"), "fifo": ("#e45756", "-")}

Bar = tuple[str, Callable[[Policies, str], float | None], bool]
"""Title, how a policy's figure is read, whether the axis is logarithmic."""


def _reader(*keys: str) -> Callable[[Policies, str], float | None]:
    return lambda policies, policy: value(policies, policy, *keys)


BARS: tuple[Bar, ...] = (
    ("p99 short delay, s", _reader("short_delay_s", "p99"), True),
    ("shorts served per second", _reader("short_rps"), True),
    ("mean long JCT, s", _reader("long_jct_s", "mean"), False),
    ("p99 of long JCT, s", _reader("long_jct_s", "p99"), False),
    ("GPU idle rate", _reader("gpu_idle"), False),
    ("preemptions", _reader("preemptions"), False),
    ("longs starved", _reader("starved"), False),
    ("scheduling / JCT, p99 of shorts", _reader("sched_over_jct_p99", "short"), True),
)


def delays(loads: Mapping[str, Policies]) -> str:
    """Short queueing delay per policy, a panel per load: line p1 to p99, box p25 to p75, tick at the median."""
    figure = Figure(figsize=(WIDTH, 3.8))
    figure.subplots_adjust(left=0.07, right=0.99, top=0.92, bottom=0.28, wspace=0.06)
    panels = panels_of(figure, 1, len(loads), sharey=True)
    for panel, (load, policies) in zip(panels, loads.items(), strict=True):
        for place, policy in enumerate(policies):
            _range_bar(panel, place, policies[policy]["short_delay_s"])
        panel.set_yscale("log")
        panel.set_title(load, y=TITLE_Y)
        _name_policies(panel, list(policies))
    panels[0].set_ylabel("queueing delay of shorts, s")
    return svg(figure, "delays")


def bars(loads: Mapping[str, Policies]) -> str:
    """Every figure by policy, a bar per load."""
    figure = Figure(figsize=(WIDTH, 11.0))
    figure.subplots_adjust(left=0.07, right=0.99, top=0.97, bottom=0.09, wspace=0.16, hspace=0.62)
    panels = panels_of(figure, 4, 2)
    policies = list(dict.fromkeys(policy for found in loads.values() for policy in found))
    for panel, (title, read, logarithmic) in zip(panels, BARS, strict=True):
        _grouped(panel, policies, {load: [read(found, policy) for policy in policies] for load, found in loads.items()})
        panel.set_title(title, y=TITLE_Y)
        if logarithmic:
            panel.set_yscale("log")
        _name_policies(panel, policies)
    panels[0].legend(fontsize=8, title="load", title_fontsize=8)
    return svg(figure, "bars")


def sweep(shares: Sequence[float], found: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> str:
    """p99 and median short delay, and mean long JCT, over the load. `found`: policy → figures per share."""
    figure = Figure(figsize=(WIDTH, 3.4))
    figure.subplots_adjust(left=0.06, right=0.99, top=0.91, bottom=0.15, wspace=0.2)
    panels = panels_of(figure, 1, 3)
    readers = (
        ("p99 short delay, s", ("short_delay_s", "p99")),
        ("median short delay, s", ("short_delay_s", "p50")),
        ("mean long JCT, s", ("long_jct_s", "mean")),
    )
    for panel, (title, keys) in zip(panels, readers, strict=True):
        for policy in SWEEP_VARIANTS:
            line = [_dig(figures, keys) for figures in found.get(policy, ())]
            points = [(share * 100, y) for share, y in zip(shares, line, strict=False) if y is not None]
            if points:
                colour, style = SWEEP_STYLES[policy]
                label = VARIANTS[policy].title
                panel.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=label)
        panel.set_title(title, y=TITLE_Y)
        panel.set_yscale("log")
        panel.set_xlabel("load, % of short capacity")
    panels[0].legend(fontsize=8)
    return svg(figure, "sweep")


def beside_paper(title: str, compared: Sequence[Compared]) -> str:
    """One of the paper's figures: a group per model, its value or range in front, ours behind it per load."""
    figure = Figure(figsize=(WIDTH / 2, 2.5))
    figure.subplots_adjust(left=0.14, right=0.98, top=0.89, bottom=0.1)
    panel = figure.subplots()
    models = list(dict.fromkeys(one.model for one in compared))
    loads = list(dict.fromkeys(one.load for one in compared))
    groups: dict[str, list[float | None]] = {"paper": [], **{load: [] for load in loads}}
    ranges = []
    for model in models:
        own = {one.load: one for one in compared if one.model == model}
        low, high = next(iter(own.values())).paper
        groups["paper"].append((low + high) / 2)
        ranges.append((high - low) / 2)
        for load in loads:
            groups[load].append(own[load].ours if load in own else None)
    _grouped(panel, models, groups, first=PAPER_COLOUR, errors=ranges)
    panel.axhline(0.0, color="#999999", linewidth=0.6)
    panel.set_title(title, fontsize=9, y=TITLE_Y)
    panel.set_xticks(range(len(models)), models, fontsize=8)
    unit = compared[0].unit
    numbers = [abs(y) for ys in groups.values() for y in ys if y]
    if numbers and max(numbers) > 30 * min(numbers):
        panel.set_yscale("symlog", linthresh=min(numbers))
    panel.yaxis.set_major_formatter(lambda y, _: show(y, unit))
    panel.tick_params(axis="y", labelsize=7)
    panel.minorticks_off()
    panel.legend(fontsize=7)
    return svg(figure, title)


def _range_bar(panel: Axes, place: int, delay: Mapping[str, float | None]) -> None:
    p1, p25, p50, p75, p99 = (delay[name] for name in ("p1", "p25", "p50", "p75", "p99"))
    if p1 is None or p25 is None or p50 is None or p75 is None or p99 is None:
        return
    panel.plot([place, place], [p1, p99], color="#4c78a8", linewidth=1)
    panel.plot([place, place], [p25, p75], color="#4c78a8", linewidth=7, solid_capstyle="butt")
    panel.plot([place - 0.3, place + 0.3], [p50, p50], color="#222222", linewidth=1.2)
    panel.plot([place], [p99], "^", color="#e45756", markersize=4)


def _grouped(
    panel: Axes,
    names: Sequence[str],
    groups: Mapping[str, Sequence[float | None]],
    *,
    first: str | None = None,
    errors: Sequence[float] = (),
) -> None:
    """A bar per group beside each name; what is None has no bar. `first`: colour of the first group, whose bars get
    these errors."""
    width = 0.8 / max(1, len(groups))
    colours = [LOAD_COLOURS[place % len(LOAD_COLOURS)] for place in range(len(groups))]
    if first is not None:
        colours = [first, *colours]
    for number, (label, ys) in enumerate(groups.items()):
        places = [place - 0.4 + width * (number + 0.5) for place, y in enumerate(ys) if y is not None]
        panel.bar(places, [y for y in ys if y is not None], width, color=colours[number], label=label)
        if errors and number == 0:
            centres = [y or 0.0 for y in ys]
            panel.errorbar(places, centres, yerr=list(errors), fmt="none", ecolor="#000000", capsize=3, linewidth=0.8)
    panel.set_xlim(-0.6, len(names) - 0.4)


def _name_policies(panel: Axes, policies: Sequence[str]) -> None:
    panel.set_xticks(range(len(policies)), list(policies), rotation=40, ha="right", fontsize=7, rotation_mode="anchor")
    panel.tick_params(axis="y", labelsize=8)
    panel.title.set_fontsize(9)
    panel.grid(axis="y", linewidth=0.3)


def _dig(figures: Mapping[str, Any] | None, keys: Sequence[str]) -> float | None:
    found: Any = figures
    for key in keys:
        found = None if found is None else found[key]
    return None if found is None else float(found)
