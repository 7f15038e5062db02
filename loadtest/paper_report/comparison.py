"""Each of the paper's figures beside ours. The sentences follow from the numbers; why they differ was written by
people, after seeing them (`reasons.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from common.messages.base import Record
from loadtest.paper_report.paper_figures import GROUPS, MODELS, PaperFigure, Unit
from loadtest.paper_report.reasons import REASONS
from loadtest.paper_report.targets import Figures, value

NO_EFFECT = 0.02
"""Closer than this to no effect is none."""
WITHIN = 0.1
"""Of the paper's value, or the ends of its range: the same."""
MISSING = "–"

Verdict = Literal[
    "as in the paper", "same direction", "no effect", "other direction", "lower", "higher", "not measured"
]
"""`lower` and `higher` are of figures without a direction."""


class Compared(Record, frozen=True, kw_only=True):
    """One figure of one model at one load."""

    group: str
    key: str
    title: str
    model: str
    load: str
    unit: Unit
    paper: tuple[float, float]
    ours: float | None
    verdict: Verdict
    sentence: str


def compare_all(figures: Figures) -> list[Compared]:
    """Of the paper's models, in the paper's order of figures."""
    return [
        _compared(group, figure, model, load, figure.read(policies))
        for group, members in GROUPS.items()
        for figure in members
        for model, loads in figures.items()
        if model in MODELS
        for load, policies in loads.items()
    ]


class Order(Record, frozen=True, kw_only=True):
    """Of the three methods that the paper compares, by one measure, best first."""

    measure: str
    model: str
    load: str
    paper: tuple[str, ...]
    ours: tuple[str, ...]
    """Empty: not all of them were run."""


_ORDERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], bool], ...] = (
    ("p99 short delay", ("short_delay_s", "p99"), ("pecsched", "fifo", "reservation"), False),
    ("short throughput", ("short_rps",), ("pecsched", "fifo", "reservation"), True),
    ("mean long JCT", ("long_jct_s", "mean"), ("reservation", "fifo", "pecsched"), False),
)
"""Measure, its keys, the paper's order (from its tables 1 and 2 and section 6.3), whether more is better."""


def orders(figures: Figures) -> list[Order]:
    """For every measure, model and load. Equal ones stand in the paper's order."""
    made = []
    for measure, keys, paper, more in _ORDERS:
        for model, loads in figures.items():
            for load, policies in loads.items():
                found = {policy: value(policies, policy, *keys) for policy in paper}
                ranks = {policy: -at if more else at for policy, at in found.items() if at is not None}
                ours = tuple(sorted(ranks, key=ranks.__getitem__)) if len(ranks) == len(paper) else ()
                made.append(Order(measure=measure, model=model, load=load, paper=paper, ours=ours))
    return made


def show(number: float | None, unit: Unit) -> str:
    """A figure as people read it."""
    if number is None:
        return MISSING
    if unit == "count":
        return f"{number:,.0f}"
    if unit == "times":
        return f"{number:,.0f}×" if abs(number) >= 1000 else f"{number:.3g}×"
    percent = number * 100
    sign = "+" if unit == "change" else ""
    return f"{percent:{sign},.0f} %" if abs(percent) >= 10 else f"{percent:{sign}.2g} %"


def show_paper(paper: tuple[float, float], unit: Unit) -> str:
    """One value or a range."""
    low, high = paper
    return show(low, unit) if low == high else f"{show(low, unit)} to {show(high, unit)}"


def summary_of(compared: list[Compared]) -> Iterator[tuple[str, int, int]]:
    """(title, how often ours points the way of the paper's, out of how many) for every figure with a direction."""
    directed: dict[str, list[bool]] = {}
    for one in compared:
        if one.verdict not in ("lower", "higher", "not measured") and _has_direction(one.key):
            directed.setdefault(one.title, []).append(one.verdict in ("as in the paper", "same direction"))
    for title, agree in directed.items():
        yield title, sum(agree), len(agree)


def _has_direction(key: str) -> bool:
    return any(figure.key == key and figure.neutral is not None for group in GROUPS.values() for figure in group)


def _compared(group: str, figure: PaperFigure, model: str, load: str, ours: float | None) -> Compared:
    paper = figure.paper(model)
    found = _verdict(figure, paper, ours)
    return Compared(
        group=group,
        key=figure.key,
        title=figure.title,
        model=model,
        load=load,
        unit=figure.unit,
        paper=paper,
        ours=ours,
        verdict=found,
        sentence=_sentence(figure, paper, ours, found),
    )


def _verdict(figure: PaperFigure, paper: tuple[float, float], ours: float | None) -> Verdict:
    if ours is None:
        return "not measured"
    low, high = paper
    if low - WITHIN * abs(low) <= ours <= high + WITHIN * abs(high):
        return "as in the paper"
    if figure.neutral is None:
        return "lower" if ours < low else "higher"
    effect = ours - figure.neutral
    if abs(effect) < NO_EFFECT:
        return "no effect"
    return "same direction" if (effect > 0) == (low > figure.neutral) else "other direction"


def _sentence(figure: PaperFigure, paper: tuple[float, float], ours: float | None, found: Verdict) -> str:
    if ours is None:
        return "Not measured."
    if found == "as in the paper":
        return "As in the paper."
    return " ".join(filter(None, (_difference(figure, paper, ours, found), REASONS.get(figure.key, ""))))


def _difference(figure: PaperFigure, paper: tuple[float, float], ours: float, found: Verdict) -> str:
    low, high = paper
    if found == "same direction":
        assert figure.neutral is not None
        weakest, strongest = sorted((abs(low - figure.neutral), abs(high - figure.neutral)))
        effect = abs(ours - figure.neutral)
        size = "weaker" if effect < weakest else "stronger" if effect > strongest else "about as strong"
        return f"Same direction, {size}."
    if found == "no effect":
        return "Next to no difference here."
    if found == "other direction":
        if figure.lower_is_better is None:
            return "The other way round here."
        better = (ours < low) == figure.lower_is_better
        return "The other way round here, and better." if better else "The other way round here, and worse."
    nearest = low if ours < low else high
    times = f" ({ours / nearest:.2g}× the paper's)" if nearest else ""
    return f"{found.capitalize()} here{times}."
