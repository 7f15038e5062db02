"""When the next decode step may begin."""

from __future__ import annotations

import pytest

from common.policy.decode_pace import GATHERED_ROWS, HOLD_S, WAITED_SHARE, Pace


def pace_after(waited_share: float, *, itl_s: float = 0.25, step_s: float = 0.04) -> Pace:
    """One step was done, from 0 to `step_s`."""
    pace = Pace(itl_s)
    pace.step_began(0.0)
    pace.step_ended(waited_share * step_s, step_s)
    return pace


def test_alone_the_next_step_follows_at_once() -> None:
    assert Pace(0.25).next_step_s(1, 3.0) == 3.0
    assert pace_after(0.0).next_step_s(1, 0.04) == 0.04
    assert pace_after(WAITED_SHARE * 0.99).next_step_s(1, 0.04) == 0.04, "a little waiting is no crowd"


def test_after_waiting_for_a_core_steps_keep_their_distance_for_a_while() -> None:
    pace = pace_after(WAITED_SHARE * 1.01)
    assert pace.next_step_s(1, 0.04) == pytest.approx(0.25)
    pace.step_began(0.25)
    pace.step_ended(0.0, 0.29)
    assert pace.next_step_s(1, 0.29) == pytest.approx(0.5), "it had a core at once this time"
    assert pace.next_step_s(1, 0.04 + HOLD_S) == 0.04 + HOLD_S


def test_a_step_longer_than_the_distance_is_followed_at_once() -> None:
    pace = pace_after(0.9, step_s=0.4)
    assert pace.next_step_s(1, 0.4) <= 0.4


def test_who_has_gathered_enough_waits_for_nobody() -> None:
    pace = pace_after(0.9)
    assert pace.next_step_s(GATHERED_ROWS - 1, 0.04) > 0.04
    assert pace.next_step_s(GATHERED_ROWS, 0.04) == 0.04


def test_no_distance_is_none() -> None:
    assert pace_after(0.9, itl_s=0.0).next_step_s(1, 0.04) <= 0.04
