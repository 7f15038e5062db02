"""What the project promised, and whether a run of the experiments holds it. Computed, never asserted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common.messages.base import Record
from loadtest.stats import ratio

SHORT_P99_RATIO_MAX = 1.25
SHORT_P99_MORE_S_MAX = 0.05
"""Either of the two is enough."""
LONG_MEAN_RATIO_MAX = 0.8
LONG_P99_RATIO_MAX = 1.25
PREEMPTIONS_RATIO_MAX = 0.45
SCHED_SHARE_MAX = 0.001

Policies = Mapping[str, Mapping[str, Any]]
"""Policy → figures, of one model at one load."""
Figures = Mapping[str, Mapping[str, Policies]]
"""Model → load → policies."""


class Check(Record, frozen=True, kw_only=True):
    """One promise, for one model at one load."""

    model: str
    load: str
    name: str
    found: str
    """In words, with the bound."""
    met: bool | None
    """None: not measured."""


def check_all(figures: Figures) -> list[Check]:
    """In order of models and loads."""
    return [
        Check(model=model, load=load, name=name, found=found, met=met)
        for model, loads in figures.items()
        for load, policies in loads.items()
        for name, found, met in _checks(policies)
    ]


def verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "MISSED"


def _checks(policies: Policies) -> Iterator[tuple[str, str, bool | None]]:
    yield _short_p99(policies)
    yield _at_most(
        "mean long JCT, PecSched over FIFO",
        ratio(value(policies, "pecsched", "long_jct_s", "mean"), value(policies, "fifo", "long_jct_s", "mean")),
        LONG_MEAN_RATIO_MAX,
    )
    yield _at_most(
        "p99 of long JCT, PecSched over FIFO",
        ratio(value(policies, "pecsched", "long_jct_s", "p99"), value(policies, "fifo", "long_jct_s", "p99")),
        LONG_P99_RATIO_MAX,
    )
    starved = value(policies, "pecsched", "starved")
    yield "longs starved under PecSched", _words(starved, "{:.0f}", 0), None if starved is None else starved == 0
    yield _at_most(
        "preemptions, PecSched over /FSP",
        ratio(value(policies, "pecsched", "preemptions"), value(policies, "no_fast_sp", "preemptions")),
        PREEMPTIONS_RATIO_MAX,
    )
    for length in ("short", "long"):
        share = value(policies, "pecsched", "sched_over_jct_p99", length)
        met = None if share is None else share <= SCHED_SHARE_MAX
        yield f"scheduling time over JCT, p99 of {length}s", _words(share, "{:.4%}", SCHED_SHARE_MAX), met


def _short_p99(policies: Policies) -> tuple[str, str, bool | None]:
    name = "p99 short delay, PecSched over the same without longs"
    mixed = value(policies, "pecsched", "short_delay_s", "p99")
    alone = value(policies, "no_longs", "short_delay_s", "p99")
    if mixed is None or alone is None:
        return name, "not measured", None
    more_s = mixed - alone
    met = more_s <= SHORT_P99_MORE_S_MAX or mixed <= SHORT_P99_RATIO_MAX * alone
    times = f"{mixed / alone:.2f}× " if alone else ""
    bound = f"at most {SHORT_P99_RATIO_MAX:g}×, or {SHORT_P99_MORE_S_MAX * 1e3:.0f} ms more"
    return name, f"{times}({mixed:.3f} s and {alone:.3f} s; {bound})", met


def _at_most(name: str, found: float | None, bound: float) -> tuple[str, str, bool | None]:
    return name, _words(found, "{:.3f}", bound), None if found is None else found <= bound


def _words(found: float | None, form: str, bound: float) -> str:
    return "not measured" if found is None else f"{form.format(found)} (at most {form.format(bound)})"


def value(policies: Policies, policy: str, *keys: str) -> float | None:
    """A figure of a policy; None where it was not run, or has no samples."""
    found: Any = policies.get(policy)
    for key in keys:
        if found is None:
            return None
        found = found[key]
    return None if found is None else float(found)
