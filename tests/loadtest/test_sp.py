"""What `loadtest sp` measures, and what it makes of the times."""

from __future__ import annotations

import pytest

from common.messages.cluster import ExchangeCost
from common.policy.live_planner import GroupPlan
from loadtest.sp import SpOptions, plan_of, schemes_of, summed_up
from services.engine.measure_groups import ALONE, APART, WayTimes
from services.engine.timed_language import TimedShape


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


def test_the_plan_is_held_against_the_best_as_measured() -> None:
    schemes = schemes_of(2)
    found = {
        ALONE: WayTimes(wall_s=[8.0], wait_share=[0.0], tokens={5}),
        APART: WayTimes(wall_s=[10.0], wait_share=[0.0], tokens={5}),
    }
    for number, scheme in enumerate(schemes):
        found[scheme.name(2)] = WayTimes(wall_s=[5.0 + number], wait_share=[0.1], tokens={5})
    estimates = tuple((scheme.name(2), 4.0) for scheme in schemes)
    chosen = GroupPlan(scheme=schemes[1], reserved=(1, 1), prefill_s=4.0, estimates=estimates, why="so")
    figures = summed_up(SpOptions(), schemes, found, chosen)
    assert figures["plan"] == {"scheme": "ulysses 2", "ranks": 2, "chosen_by": "cost", "why": "so"}
    assert (figures["best"], figures["over_best"]) == ("ring 2", pytest.approx(1.2))
    assert figures["speedup"] == pytest.approx(8 / 6)
    assert figures["ceiling"] == pytest.approx(2 * 8 / 10), "two prompts in ten seconds, one in eight"
    assert figures["of_ceiling"] == pytest.approx(8 / 6 / 1.6)
    assert figures["ways"]["megatron 2"]["estimate_s"] == 4.0


def test_the_scheduler_would_choose_by_what_the_processes_say() -> None:
    def chosen(query_heads: int, kv_heads: int) -> str:
        exchange = ExchangeCost(message_s=1e-5, byte_s=2e-10, merge_element_s=5e-10)
        shape = TimedShape(query_heads=query_heads, kv_heads=kv_heads, exchange=exchange)
        plan = plan_of(SpOptions(), [shape.profile(rows_max=1)] * 2)
        assert {name for name, _ in plan.estimates} == {scheme.name(2) for scheme in schemes_of(2)}
        return plan.scheme.name(2)

    assert chosen(9, 3) == "ring 2"
    assert chosen(8, 4) == "ulysses 2"


def test_the_fastest_by_its_median_is_the_plan() -> None:
    schemes = schemes_of(2)
    found = {way: WayTimes(wall_s=[8.0, 9.0, 10.0], wait_share=[0.0] * 3, tokens={5}) for way in (ALONE, APART)}
    for number, scheme in enumerate(schemes):
        times = [5.0 + abs(number - 2), 1.0, 20.0]
        found[scheme.name(2)] = WayTimes(wall_s=times, wait_share=[0.1 * number] * 3, tokens={5})
    figures = summed_up(SpOptions(), schemes, found)
    assert figures["plan"] == {"scheme": "ulysses/megatron 2", "ranks": 2, "chosen_by": "measured", "why": ""}
    assert figures["over_best"] == 1.0
    assert (figures["speedup"], figures["comm_share"]) == (pytest.approx(9 / 5), pytest.approx(0.2))
    assert figures["ways"]["ring 2"]["wall_s"] == 7.0
    assert figures["same_first_token"]
