from __future__ import annotations

import json
from array import array

import pytest

from loadtest.simulator.result import Outcome, SimResult
from loadtest.simulator.summary import summarize

ISSUE_KEYS = {
    "short_delay_s",
    "short_rps",
    "long_jct_s",
    "starved",
    "preemptions",
    "gpu_idle",
    "sched_over_jct_p99",
}


def outcome(number: int, *, long: bool = False, at: float = 0.0, delay: float = 1.0, jct: float = 2.0, **more: object):
    about = {
        "prefill_started_s": at + delay,
        "first_token_s": at + delay + 0.5,
        "finished_s": at + jct,
        "sched_s": 0.001,
        **more,
    }
    return Outcome(f"r{number}", long, at, 100_000 if long else 100, 10, **about)


def result(outcomes: list[Outcome], **more: object) -> SimResult:
    about = {
        "policy": "pecsched",
        "arrivals_end_s": 10.0,
        "ended_s": 20.0,
        "gpus": 8,
        "gpu_idle": 0.25,
        "gpu_idle_arrivals": 0.1,
        "replica_busy_s": {},
        "counters": {"pauses": 7, "decode_pauses": 3, "placed_idle": 100},
        "decision_s": array("d", [1e-5] * 100),
        **more,
    }
    return SimResult(outcomes=outcomes, **about)


def test_the_keys_are_those_of_the_report_and_json_takes_them():
    summary = summarize(result([outcome(0), outcome(1, long=True)]))
    assert summary.keys() >= ISSUE_KEYS
    assert summary["short_delay_s"].keys() == {"p1", "p25", "p50", "p75", "p99"}
    assert summary["long_jct_s"].keys() == {"mean", "p99"}
    assert summary["sched_over_jct_p99"].keys() == {"short", "long"}
    assert json.loads(json.dumps(summary)) == summary


def test_delays_and_completion_times_are_of_their_class():
    shorts = [outcome(n, at=float(n), delay=0.1 * n, jct=1.0) for n in range(11)]
    longs = [outcome(20 + n, long=True, delay=50.0, jct=100.0 + n) for n in range(3)]
    summary = summarize(result([*shorts, *longs]))
    assert summary["short_delay_s"]["p50"] == pytest.approx(0.5)
    assert summary["short_delay_s"]["p99"] == pytest.approx(0.99)
    assert summary["long_jct_s"]["mean"] == pytest.approx(101.0)
    assert summary["long_jct_s"]["p99"] == pytest.approx(101.98)
    assert summary["sched_over_jct_p99"] == {
        "short": pytest.approx(0.001),
        "long": pytest.approx(0.001 / 100, rel=0.02),
    }


def test_short_throughput_is_up_to_the_end_of_the_last_short():
    outcomes = [outcome(0, at=2.0, jct=1.0), outcome(1, at=4.0, jct=4.0), outcome(2, long=True, jct=500.0)]
    assert summarize(result(outcomes))["short_rps"] == pytest.approx(2 / 6.0)


def test_pauses_of_prefills_and_of_decodes_are_preemptions():
    assert summarize(result([outcome(0)]))["preemptions"] == 10
    assert summarize(result([outcome(0)], counters={}))["preemptions"] == 0


def test_who_is_starved():
    longs = [
        outcome(0, long=True),
        outcome(1, long=True, denied=True),  # it ran in the end, when no more requests came
        outcome(2, long=True, prefill_started_s=None, first_token_s=None, finished_s=None),
        outcome(3, long=True, prefill_started_s=None, first_token_s=None, finished_s=None, failure="refused"),
        outcome(4, long=True, at=5.0, delay=7.0, jct=9.0),  # load alone kept it waiting
    ]
    summary = summarize(result([*longs, outcome(5, denied=True), outcome(6, jct=11.0)]))
    assert summary["starved"] == 2
    assert summary["failed"] == 1
    assert summary["unfinished"] == 1
    assert summary["not_begun_at_end_of_arrivals"] == 3
    assert summary["not_begun_at_last_short"] == 3


def test_without_samples_figures_are_null():
    summary = summarize(result([outcome(0, prefill_started_s=None, first_token_s=None, finished_s=None)]))
    assert summary["short_delay_s"]["p50"] is None
    assert summary["short_rps"] is None
    assert summary["long_jct_s"] == {"mean": None, "p99": None}
    assert summary["sched_over_jct_p99"] == {"short": None, "long": None}
    assert summarize(result([]))["starved"] == 0
