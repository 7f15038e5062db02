"""Over how many live workers a long goes, and in which order they stand."""

from __future__ import annotations

import msgspec
import pytest

from common.policy.cluster import Cluster
from common.policy.live_costs import RANK_GAIN
from common.policy.live_planner import MeasuredPlanner
from common.policy.placement import in_rank_order, kv_share
from common.policy.scheduler_config import SchedulerConfig
from common.policy.sp_shares import reserved_tokens
from tests.policy.scenario import profile


def cluster_of(*names: str, door: bool = True) -> Cluster:
    cluster = Cluster()
    for name in names:
        address = f"{name}:9" if door else ""
        cluster.add_worker(msgspec.structs.replace(profile(name), group_address=address), 0.0)
    return cluster


def planner_of(cluster: Cluster, group_max: int = 64) -> MeasuredPlanner:
    return MeasuredPlanner(cluster, SchedulerConfig(group_max=group_max))


def test_as_many_as_there_are_since_each_shortens_the_prefill():
    planner = planner_of(cluster_of("a", "b", "c"))
    assert [planner.degree(8_000, 8_016, [free], 32_768) for free in (0, 1, 2, 3)] == [0, 1, 2, 3]
    took_s = [planner.prefill_s(8_000, (degree,)) for degree in (1, 2, 3)]
    assert took_s[0] > took_s[1] > took_s[2]
    assert took_s[1] == pytest.approx(took_s[0] / (1 + RANK_GAIN), rel=0.1), "what each pass costs is paid by each"
    assert planner.prefill_s(8_000, (2, 1)) == took_s[2]


def test_no_more_than_may_share_a_long():
    planner = planner_of(cluster_of("a", "b", "c"), group_max=2)
    assert planner.degree(8_000, 8_016, [3], 32_768) == 2
    assert planner.degree(8_000, 8_016, [3], 3_000) == 0, "its KV would need three"


def test_at_least_as_many_as_hold_its_kv():
    planner = planner_of(cluster_of("a", "b", "c"))
    assert planner.degree(8_000, 8_000, [3], 2_667) == 3
    assert planner.degree(8_000, 8_000, [3], 2_666) == 0
    assert planner.degree(8_000, 8_000, [2], 3_000) == 0
    assert planner.degree(8_000, 8_000, [1], 8_000) == 1, "one alone needs nothing to spare"


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7])
def test_what_the_scheduler_sets_aside_is_what_a_rank_reserves(degree: int):
    for tokens in range(100, 130):
        assert kv_share(tokens, degree) == reserved_tokens(tokens, degree)


def test_workers_without_a_door_for_groups_serve_longs_alone():
    planner = planner_of(cluster_of("a", "b", door=False))
    assert planner.degree(8_000, 8_016, [2], 32_768) == 1
    assert planner.degree(8_000, 8_016, [2], 5_000) == 0


def test_nobody_is_there():
    planner = planner_of(Cluster())
    assert planner.prefill_s(8_000, (1,)) == 0.0
    assert planner.degree(8_000, 8_016, [], 32_768) == 0


def test_members_stand_in_the_order_of_their_nodes_and_names_in_every_group():
    cluster = cluster_of("b", "c", "a")
    assert in_rank_order(cluster, ("c", "a")) == (("a", "c"), ("a:9", "c:9"))
    assert in_rank_order(cluster, ("b",)) == (("b",), ()), "a group of one is reached by nobody"
    assert in_rank_order(cluster_of("b", "a", door=False), ("b", "a")) == (("b", "a"), ())
    for name, node in (("d", "n1"), ("e", "n0")):
        cluster.add_worker(msgspec.structs.replace(profile(name, node=node), group_address=f"{name}:9"), 0.0)
    assert in_rank_order(cluster, ("d", "e", "a"))[0] == ("a", "e", "d"), "a node's one after another"
