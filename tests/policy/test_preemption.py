from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.preemption import EPSILON_S, PauseAccount, PauseBounds

BOUNDS = PauseBounds(pause_max_s=2.0, share_max=0.5, immunity_s=0.1, remaining_min_s=0.5)


def account(**more: float) -> PauseAccount:
    return PauseAccount(started_s=0.0, estimate_s=100.0, **more)


def test_at_the_start_a_share_of_one_pause_may_be_yielded_at_once():
    assert account().budget_s(0.0, BOUNDS) == pytest.approx(0.5 * 2.0)


def test_a_pause_that_fits_the_budget_may_begin_now_and_one_that_does_not_when_it_is_earned():
    fresh = account()
    assert fresh.pausable_from_s(0.0, 0.8, BOUNDS) == 0.0
    assert fresh.pausable_from_s(0.0, 1.5, BOUNDS) == pytest.approx(1.0)  # 1.0 + 0.5·t = 1.5


def test_after_a_pause_it_is_immune_for_a_while():
    yielded = account()
    yielded.paused(1.0)
    yielded.resumed(1.2, BOUNDS)
    assert yielded.pausable_from_s(1.2, 0.1, BOUNDS) == pytest.approx(1.3)


def test_what_is_nearly_done_is_not_paused():
    assert PauseAccount(started_s=0.0, estimate_s=10.0).pausable_from_s(9.6, 0.1, BOUNDS) == pytest.approx(10.0)


def test_its_own_word_counts_for_more_than_the_estimate():
    slow = PauseAccount(started_s=0.0, estimate_s=10.0)
    slow.paused(6.0, done_share=0.3)  # at this pace the whole takes 20 s
    slow.resumed(7.0, BOUNDS)
    assert slow.pausable_from_s(10.8, 0.1, BOUNDS) == 10.8, "by the estimate it would be nearly done"
    assert slow.pausable_from_s(20.7, 0.1, BOUNDS) == pytest.approx(21.0), "it ran for 19.7 of 20 s"


def test_what_runs_for_longer_than_foretold_may_be_paused():
    assert PauseAccount(started_s=0.0, estimate_s=10.0).pausable_from_s(12.0, 0.1, BOUNDS) == 12.0


def test_a_share_of_zero_forbids_every_pause():
    assert account().pausable_from_s(50.0, 0.1, PauseBounds(2.0, 0.0, 0.1, 0.95)) is None


def test_a_pause_is_bounded_by_its_own_length_and_by_the_budget():
    long_running = PauseAccount(started_s=0.0, estimate_s=1e6)
    long_running.paused(1_000.0)
    assert long_running.pause_left_s(1_000.0, BOUNDS) == pytest.approx(2.0)
    assert long_running.pause_left_s(1_001.5, BOUNDS) == pytest.approx(0.5)
    young = PauseAccount(started_s=0.0, estimate_s=1e6)
    young.paused(0.2)  # budget 1.1, falls by half a second per second of pause
    assert young.pause_left_s(0.2, BOUNDS) == pytest.approx(2.0)
    poor = PauseAccount(started_s=0.0, estimate_s=1e6, suspended_s=1.0)
    poor.paused(0.2)
    assert poor.pause_left_s(0.2, BOUNDS) == pytest.approx(0.2)


@given(
    share=st.floats(0.05, 0.9),
    pause_max_s=st.floats(0.05, 5.0),
    wishes=st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.01, 5.0)), max_size=40),
)
def test_whatever_is_wished_the_sum_of_pauses_keeps_its_bound(
    share: float, pause_max_s: float, wishes: list[tuple[float, float]]
):
    bounds = PauseBounds(pause_max_s=pause_max_s, share_max=share, immunity_s=0.05, remaining_min_s=0.0)
    yielding = PauseAccount(started_s=0.0, estimate_s=1e9)
    now_s = 0.0
    for wait_s, wish_s in wishes:
        now_s += wait_s
        start_s = yielding.pausable_from_s(now_s, wish_s, bounds)
        assert start_s is not None
        now_s = max(now_s, start_s)
        yielding.paused(now_s)
        length_s = min(wish_s, yielding.pause_left_s(now_s, bounds))
        assert length_s <= pause_max_s + EPSILON_S
        now_s += length_s
        yielding.resumed(now_s, bounds)
        assert yielding.suspended_s <= share * now_s + share * pause_max_s + 40 * EPSILON_S
