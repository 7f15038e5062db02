"""Figures of a simulated run, under the keys of the reports.

    short_delay_s      {p1 p25 p50 p75 p99} of shorts: arrival to the start of the pass with the first token
    short_rps          shorts served, over the time from the first arrival to the last short's last token
    long_jct_s         {mean p99} of longs: arrival to last token
    starved            longs the policy kept waiting (not: the load); the definition stands in `usage.py`
    preemptions        pauses of longs' prefills, and where shorts share no steps, of longs' decodes
    gpu_idle           share of all GPU time, from the first arrival to the last token, in which nothing ran; a paused
                       long keeps no GPU busy
    sched_over_jct_p99 {short long}: p99 of real time in the scheduler's core over simulated completion time

and beside them what helps to read them. A figure without samples is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loadtest.simulator.result import Outcome, SimResult
from loadtest.stats import mean, percentile, percentiles

PREEMPTION_COUNTERS = ("pauses", "decode_pauses")


def summarize(result: SimResult) -> dict[str, Any]:
    """One policy's figures, ready for JSON."""
    shorts = [outcome for outcome in result.outcomes if not outcome.long]
    longs = [outcome for outcome in result.outcomes if outcome.long]
    long_jcts = _present(outcome.jct_s for outcome in longs)
    return {
        "short_delay_s": percentiles(_present(o.queueing_delay_s for o in shorts), 1, 25, 50, 75, 99),
        "short_rps": _short_rps(result, shorts),
        "long_jct_s": {"mean": mean(long_jcts), "p99": percentile(long_jcts, 99)},
        "starved": sum(outcome.starved for outcome in longs),
        "preemptions": sum(result.counters.get(name, 0) for name in PREEMPTION_COUNTERS),
        "gpu_idle": result.gpu_idle,
        "sched_over_jct_p99": {"short": _sched_share_p99(shorts), "long": _sched_share_p99(longs)},
        "short_ttft_s": percentiles(_present(o.ttft_s for o in shorts), 50, 99),
        "short_jct_s": percentiles(_present(o.jct_s for o in shorts), 50, 99),
        "long_delay_s": percentiles(_present(o.queueing_delay_s for o in longs), 50, 99),
        "long_suspended_s": {"mean": mean([outcome.suspended_s for outcome in longs if outcome.jct_s is not None])},
        "gpu_idle_arrivals": result.gpu_idle_arrivals,
        "shorts": len(shorts),
        "longs": len(longs),
        "failed": sum(outcome.failure is not None for outcome in result.outcomes),
        "unfinished": sum(o.finished_s is None and o.failure is None for o in result.outcomes),
        "not_begun_at_end_of_arrivals": _not_begun(longs, result.arrivals_end_s),
        "not_begun_at_last_short": _not_begun(longs, max(_present(o.finished_s for o in shorts), default=0.0)),
        "ended_s": result.ended_s,
        "decision_s": percentiles(result.decision_s, 50, 99),
    }


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _short_rps(result: SimResult, shorts: Sequence[Outcome]) -> float | None:
    ends = _present(outcome.finished_s for outcome in shorts)
    if not ends:
        return None
    seconds = max(ends) - result.outcomes[0].arrived_s
    return len(ends) / seconds if seconds > 0.0 else None


def _sched_share_p99(outcomes: Iterable[Outcome]) -> float | None:
    return percentile((o.sched_s / o.jct_s for o in outcomes if o.jct_s), 99)


def _not_begun(longs: Iterable[Outcome], at_s: float) -> int:
    """Longs that had come by then, and whose prefill had not begun."""
    return sum(
        outcome.arrived_s <= at_s and (outcome.prefill_started_s is None or outcome.prefill_started_s > at_s)
        for outcome in longs
    )
