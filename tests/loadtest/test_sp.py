"""What `loadtest sp` measures, and what it makes of the times."""

from __future__ import annotations

import pytest

from loadtest.sp import SpOptions, schemes_of, summed_up
from services.engine.measure_groups import ALONE, WayTimes


def test_all_schemes_of_so_many_ranks() -> None:
    assert [scheme.name(2) for scheme in schemes_of(2)] == [
        "ring 2",
        "ulysses 2",
        "ulysses/megatron 2",
        "megatron/ulysses 2",
        "megatron 2",
    ]
    assert len(schemes_of(3)) == 5
    names = [scheme.name(4) for scheme in schemes_of(4)]
    assert {"ring 4", "ring 2 x ulysses 2", "ring 2 x megatron/ulysses 2", "megatron 4"} <= set(names)
    assert len(set(names)) == 9


def test_the_fastest_by_its_median_is_the_plan() -> None:
    schemes = schemes_of(2)
    found = {ALONE: WayTimes(wall_s=[8.0, 9.0, 10.0], wait_share=[0.0] * 3, tokens={5})}
    for number, scheme in enumerate(schemes):
        times = [5.0 + abs(number - 2), 1.0, 20.0]
        found[scheme.name(2)] = WayTimes(wall_s=times, wait_share=[0.1 * number] * 3, tokens={5})
    figures = summed_up(SpOptions(), schemes, found)
    assert figures["plan"] == {"scheme": "ulysses/megatron 2", "ranks": 2, "chosen_by": "measured"}
    assert (figures["speedup"], figures["comm_share"]) == (pytest.approx(9 / 5), pytest.approx(0.2))
    assert figures["ways"]["ring 2"]["wall_s"] == 7.0
    assert figures["same_first_token"]
