"""The pause benchmark on a timed engine and virtual time: what it counts is what happened."""

from __future__ import annotations

import pytest

from common.runtime.virtual_time import run_virtual
from loadtest import pause_groups
from loadtest.pause import PauseOptions, measure


def test_pauses_are_counted_and_the_long_is_the_same() -> None:
    options = PauseOptions(engine="timed", tokens=3_000, pauses=30, seed=2)
    figures = run_virtual(measure(options))
    assert figures["pauses"] == 30
    assert figures["same_first_token"]
    assert figures["same_steps"]
    for key in ("at_worker_s", "outside_s", "short_waited_s"):
        assert 0 <= figures[key]["p50"] <= figures[key]["p99"] <= figures[key]["max"]
    # Nothing is between the worker and this test: its own measure is that from outside.
    assert figures["outside_s"]["max"] == pytest.approx(figures["at_worker_s"]["max"], abs=1e-6)
    assert figures["long_compute_s"]["ratio"] == pytest.approx(1.0, rel=0.05)


def test_more_pauses_than_one_prefill_has_room_for() -> None:
    figures = run_virtual(measure(PauseOptions(engine="timed", tokens=500, pauses=12, seed=1)))
    assert figures["pauses"] == 12
    assert figures["long_runs"]["paused"] > 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_pauses_of_a_group(ranks: int) -> None:
    figures = run_virtual(pause_groups.measure(PauseOptions(engine="timed", tokens=3_000, pauses=20, ranks=ranks)))
    assert (figures["pauses"], figures["ranks"]) == (20, ranks)
    assert figures["same_first_token"]
    assert figures["same_steps"]
    assert figures["outside_s"]["p99"] >= figures["at_worker_s"]["p99"] > 0
    alone = run_virtual(measure(PauseOptions(engine="timed", tokens=3_000, pauses=1)))
    assert alone.keys() == figures.keys()
    assert figures["long_compute_s"]["undisturbed"] < 0.7 * alone["long_compute_s"]["undisturbed"]
