"""The figures of one policy in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest import report
from loadtest.paper_report.variants import VARIANTS

COLUMNS = (
    "policy",
    "short delay p50",
    "p75",
    "p99",
    "shorts/s",
    "long JCT mean",
    "p99",
    "starved",
    "not begun at end of arrivals",
    "preemptions",
    "GPUs idle",
    "idle while requests come",
    "scheduling / JCT p99: shorts",
    "longs",
    "decision p99",
)
SHOWN = (0, 1, 3, 4, 5, 6, 7, 9, 10, 12)
"""Of these, on a console."""
CONSOLE_COLUMNS = ("policy", "p50", "p99", "shorts/s", "JCT mean", "p99", "starved", "preempt.", "idle", "sched/JCT")


def cells(policy: str, found: Mapping[str, Any]) -> list[str]:
    """A policy's figures in the order of `COLUMNS`."""
    delay, jct, overhead = found["short_delay_s"], found["long_jct_s"], found["sched_over_jct_p99"]
    return [
        VARIANTS[policy].title,
        *(_time(delay[name]) for name in ("p50", "p75", "p99")),
        report.MISSING if found["short_rps"] is None else f"{found['short_rps']:.2f}",
        _time(jct["mean"]),
        _time(jct["p99"]),
        str(found["starved"]),
        str(found["not_begun_at_end_of_arrivals"]),
        f"{found['preemptions']:,}",
        _share(found["gpu_idle"], 1),
        _share(found["gpu_idle_arrivals"], 1),
        _share(overhead["short"], 3),
        _share(overhead["long"], 3),
        report.MISSING if found["decision_s"]["p99"] is None else f"{found['decision_s']['p99'] * 1e6:.0f} µs",
    ]


def console_cells(policy: str, found: Mapping[str, Any]) -> list[str]:
    """Under `CONSOLE_COLUMNS`."""
    every = cells(policy, found)
    return [every[place] for place in SHOWN]


def _time(seconds: float | None) -> str:
    return report.s(seconds) if seconds is None or seconds >= 1.0 else report.ms(seconds)


def _share(part: float | None, digits: int) -> str:
    return report.MISSING if part is None else f"{part:.{digits}%}"
