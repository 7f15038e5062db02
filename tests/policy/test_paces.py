"""What prefills really take, by degree; and that the planner heeds it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.paces import HEARD, TIMES_MAX, TIMES_MIN, Paces


def test_what_was_never_heard_of_takes_what_was_estimated_and_groups_as_long_as_the_next_of_another_size():
    paces = Paces()
    assert [paces.of(degree) for degree in (1, 2, 8)] == [1.0, 1.0, 1.0]
    paces.heard(1, 1.5)
    assert [paces.of(degree) for degree in (1, 2)] == [1.5, 1.0], "a group is no worker alone"
    paces.heard(2, 3.0)
    paces.heard(8, 2.0)
    assert paces.of(3) == paces.of(2) > 2.8
    assert paces.of(6) == paces.of(8) == 2.0


def test_the_latest_weighs_most_and_one_alone_does_not_decide():
    paces = Paces()
    paces.heard(2, 1.0)
    paces.heard(2, 3.0)
    assert paces.of(2) == 1.0 + 2.0 * HEARD
    paces.heard(2, 1e6)
    assert paces.of(2) < TIMES_MAX


def test_what_is_not_chosen_is_forgotten_and_tried_again():
    paces = Paces()
    paces.heard(2, 2.0)
    tries = 0
    while paces.of(2) > 1.5:
        paces.heard(1, 1.0)
        tries += 1
    assert 5 < tries < 30


@given(heard=st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 1e9)), max_size=30), degree=st.integers(1, 12))
def test_it_stays_within_bounds(heard: list[tuple[int, float]], degree: int):
    paces = Paces()
    for each, times in heard:
        paces.heard(each, times)
    assert TIMES_MIN <= paces.of(degree) <= TIMES_MAX


@pytest.mark.parametrize("degree", [1, 2])
def test_as_estimated_changes_nothing(degree: int):
    paces = Paces()
    for _ in range(5):
        paces.heard(degree, 1.0)
    assert paces.of(1) == paces.of(2) == 1.0
