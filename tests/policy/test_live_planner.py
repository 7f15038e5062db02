"""Which scheme a group of live workers gets, by what its workers measured; what each of them sets aside for it."""

from __future__ import annotations

import math
from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages.cluster import (
    CoordinatorHeartbeat,
    ExchangeCost,
    LayerShape,
    StepCost,
    WorkerHeartbeat,
    WorkerProfile,
)
from common.messages.groups import GATHERED_RING, RING, GroupScheme
from common.messages.scheduling import RequestSubmitted
from common.messages.sp import FormGroup, GroupFinished, GroupFormed, GroupPrefillFinished
from common.policy import costs
from common.policy.cluster import Cluster
from common.policy.live_costs import WAITING, LiveModel, scheme_times
from common.policy.live_planner import GroupPlan, MeasuredPlanner, Rank, plan_group
from common.policy.model_shapes import HeadSplit, split_heads
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.sequence_plan import choices_of
from common.policy.sp_shares import Mesh, head_shares, kv_of_rank
from tests.policy.scenario import profile, spec

COST = StepCost(pass_s=0.05, token_s=0.42e-3, pair_s=2.0e-7)
FAST = ExchangeCost(message_s=1e-5, byte_s=2e-10, merge_element_s=5e-10)
SLOW = ExchangeCost(message_s=1e-5, byte_s=2e-7, merge_element_s=5e-10)
LAYERS = 30
TOKENS = 7_500

ULYSSES_2 = GroupScheme(per_node=2)


def worker(
    name: str = "a", node: str = "n0", *, heads: tuple[int, int] = (8, 4), exchange: ExchangeCost | None = FAST
) -> WorkerProfile:
    query_heads, kv_heads = heads
    layer = LayerShape(query_heads=query_heads, kv_heads=kv_heads, head_dim=64, hidden=576, intermediate=1536)
    return msgspec.structs.replace(
        profile(name, node=node),
        step_cost=COST,
        layers=LAYERS,
        kv_bytes_per_token=LAYERS * 2 * kv_heads * 64 * 2,
        layer=layer,
        exchange=exchange,
        group_address=f"{name}:9",
    )


def plan(*ranks: WorkerProfile, free: int = 100_000, kv_tokens: int = 8_000, **settings: object) -> GroupPlan:
    config = SchedulerConfig(**({"group_gathers": False} | settings))
    return plan_group(TOKENS, kv_tokens, [Rank(each, free) for each in ranks], config)


def pair(**options: object) -> list[WorkerProfile]:
    return [worker(name, **options) for name in "ab"]


# --- which one is the cheapest ---------------------------------------------------------------------


def test_even_heads_are_split_between_two_and_uneven_ones_are_not():
    assert plan(*pair(heads=(8, 4))).scheme == ULYSSES_2, "a ring's first part of each chunk has more to attend to"
    assert plan(*pair(heads=(9, 3))).scheme == RING, "five heads against four"


def test_where_links_are_slow_the_scheme_wins_that_moves_less():
    """A ring of two moves queries and outputs of 9 heads; Ulysses of its 5, and 2 KV heads, twice."""
    estimates = dict(plan(*pair(heads=(9, 3), exchange=SLOW)).estimates)
    fast = dict(plan(*pair(heads=(9, 3))).estimates)
    assert estimates["ulysses 2"] < estimates["ring 2"]
    assert fast["ring 2"] < fast["ulysses 2"]
    assert all(estimates[name] > fast[name] for name in fast)


def test_between_slow_nodes_only_rows_exchange():
    ranks = [worker(f"w{number}", f"n{number // 2}") for number in range(4)]
    assert plan(*ranks, internode_bytes_s=1e8).scheme.per_node == 2, (
        "half of the heads go to one other row, not to three"
    )
    slow, same = plan(*ranks, internode_bytes_s=1e8), plan(*ranks)
    assert dict(slow.estimates)["ring 4"] > dict(same.estimates)["ring 4"]
    one_node = [worker(f"w{number}") for number in range(4)]
    assert plan(*one_node, internode_bytes_s=1e8).estimates == plan(*one_node).estimates, "that link is not used"


def test_gathering_whole_hidden_states_moves_more_than_heads():
    """Weights are whole everywhere, so Megatron has nothing to gain but heads that divide as badly."""
    estimates = dict(plan(*pair()).estimates)
    assert estimates["ulysses 2"] < estimates["ulysses/megatron 2"] < estimates["megatron 2"]
    assert estimates["ulysses 2"] < estimates["megatron/ulysses 2"] < estimates["megatron 2"]


def test_every_scheme_that_nodes_allow_is_weighed():
    def names(*nodes: str) -> list[str]:
        found = plan(*(worker(f"w{at}", node) for at, node in enumerate(nodes)))
        return [name for name, _ in found.estimates]

    four = ["ulysses", "ulysses/megatron", "megatron/ulysses", "megatron"]
    assert names("n0", "n1") == ["ring 2"], "a row stands in one node"
    assert names("n0", "n0", "n1") == ["ring 3"]
    assert names("n0", "n0", "n0") == ["ring 3", *(f"{each} 3" for each in four)]
    assert names("n0", "n0", "n1", "n1") == ["ring 4", *(f"ring 2 x {each} 2" for each in four)]
    assert len(names("n0", "n0", "n0", "n0")) == 1 + 4 + 4


# --- what cannot be --------------------------------------------------------------------------------


def test_more_ranks_than_heads_is_refused_with_the_reason():
    found = plan(*(worker(f"w{at}", heads=(3, 3)) for at in range(4)))
    assert ("ulysses 4", "3 heads do not reach for 4 processors of a node") in found.refused
    assert "ulysses 4 not: 3 heads do not reach for 4 processors of a node" in found.why
    assert "ring 4" in dict(found.estimates)


def test_a_ring_gathers_its_kv_where_rank_0_has_room_for_all_of_it():
    ranks = pair(heads=(9, 3))
    found = plan(*ranks, free=8_000, group_gathers=True)
    assert (found.scheme, found.reserved) == (GATHERED_RING, (8_000, 4_000))
    full = plan_group(TOKENS, 8_000, [Rank(ranks[0], 7_999), Rank(ranks[1], 9_000)], SchedulerConfig())
    assert (full.scheme, full.reserved) == (RING, (4_000, 4_000))
    assert plan(*ranks, free=8_000).scheme == RING, "told not to"
    assert plan(*pair(heads=(8, 4)), group_gathers=True).scheme == ULYSSES_2, "each rank has its heads' KV"


def test_a_share_for_which_a_rank_has_no_room_is_refused():
    """Two KV heads of three are two thirds of the KV."""
    ranks = pair(heads=(9, 3), exchange=SLOW)
    assert plan(*ranks, free=6_000, kv_tokens=9_000).scheme.per_node == 2
    tight = plan(*ranks, free=5_999, kv_tokens=9_000)
    assert tight.scheme == RING
    assert tight.reserved == (4_500, 4_500)
    assert ("ulysses 2", "a has room for 5999 tokens of KV, not for 6000") in tight.refused


@pytest.mark.parametrize("unsaid", ["layer", "exchange"])
def test_workers_that_do_not_say_enough_form_a_ring(unsaid: str):
    ranks = [msgspec.structs.replace(each, **{unsaid: None}) for each in pair()]
    assert plan(*ranks).scheme == RING
    assert 0.0 < plan(*ranks).prefill_s < costs.prefill_s(COST, TOKENS, 512)


def test_with_one_that_does_not_say_its_heads_the_others_split_none():
    first, second = pair()
    assert plan(first, msgspec.structs.replace(second, layer=None)).scheme == RING
    assert plan(msgspec.structs.replace(first, layer=None), second).scheme == RING


def test_a_plan_explains_itself():
    found = plan(*pair())
    assert found.why.startswith(f"{TOKENS} tokens on 2 workers by ulysses 2 (")
    for name, seconds in found.estimates:
        assert f"{name} {seconds:.2f} s" in found.why
    assert found.prefill_s == min(seconds for _, seconds in found.estimates)


# --- the estimates ---------------------------------------------------------------------------------


def test_one_rank_alone_takes_what_it_measured():
    """The stage costs of the simulator's plans, fed by a worker's own figures, are these figures."""
    one = worker()
    assert one.layer is not None
    model = LiveModel(one, one.layer, FAST, 1, ring_bytes_s=math.inf)
    for chunk, past in ((512, 0), (100, 7_000)):
        choices, refused = choices_of(model, chunk, (1,), past=past)
        assert not refused
        assert len(choices) == 4
        for choice in choices:
            assert choice.prefill_s == pytest.approx(costs.pass_s(COST, chunk, past))
    assert scheme_times(one, TOKENS, (1,)).possible == ((RING, costs.prefill_s(COST, TOKENS, 512)),)


@pytest.mark.parametrize(("heads", "sizes"), [((8, 4), (2,)), ((8, 8), (4,)), ((8, 8), (2, 2))])
def test_with_free_exchanges_even_heads_share_all_work(heads: tuple[int, int], sizes: tuple[int, ...]):
    free = ExchangeCost(message_s=0.0, byte_s=0.0, merge_element_s=0.0)
    degree, one = sum(sizes), worker(heads=heads, exchange=free)
    times = dict(scheme_times(one, TOKENS, sizes).possible)
    chunks = math.ceil(TOKENS / (512 * degree))
    work_s = COST.token_s * TOKENS + COST.pair_s * TOKENS * TOKENS / 2
    least_s = (COST.pass_s * chunks + work_s / degree) * (1 + WAITING)
    whole = [seconds for scheme, seconds in times.items() if scheme.per_node == degree]
    assert whole == pytest.approx([least_s] * len(whole), rel=1e-6)
    assert all(seconds > least_s * (1 - 1e-6) for seconds in times.values())
    assert times[RING] == max(times.values()), "the first part of each chunk has the most to attend to"


@given(
    heads=st.sampled_from([(9, 3), (8, 8), (8, 2), (4, 1), (6, 3)]),
    sizes=st.sampled_from([(1, 1), (2,), (3,), (2, 2), (4,), (3, 1), (6,)]),
    tokens=st.integers(2_000, 60_000),
    byte_s=st.floats(1e-11, 1e-7),
)
def test_estimates_are_longer_for_longer_prompts_and_dearer_bytes(heads, sizes, tokens, byte_s):
    def times(length: int, price: float) -> dict[GroupScheme, float]:
        exchange = ExchangeCost(message_s=1e-5, byte_s=price, merge_element_s=1e-9)
        return dict(scheme_times(worker(heads=heads, exchange=exchange), length, sizes).possible)

    here = times(tokens, byte_s)
    assert RING in here
    assert here.keys() == times(tokens + 4_096, byte_s).keys()
    for scheme, seconds in here.items():
        assert 0.0 < seconds < times(tokens + 4_096, byte_s)[scheme]
        assert seconds < times(tokens, 2 * byte_s)[scheme]


# --- over how many ---------------------------------------------------------------------------------


def planner_of(*workers: WorkerProfile) -> MeasuredPlanner:
    cluster = Cluster()
    for each in workers:
        cluster.add_worker(each, 0.0)
    return MeasuredPlanner(cluster, SchedulerConfig(group_max=64))


def test_a_rank_that_would_do_more_for_others_is_left_to_them():
    fast = planner_of(*(worker(f"w{at}", heads=(8, 8)) for at in range(8)))
    slow = planner_of(*(worker(f"w{at}", heads=(8, 8), exchange=SLOW) for at in range(8)))
    assert fast.degree(20_000, 20_100, [8], 100_000) >= 4
    assert slow.degree(20_000, 20_100, [8], 100_000) == 1
    assert slow.degree(20_000, 20_100, [8], 7_000) == 3, "but its KV must lie somewhere"


def test_ranks_that_share_cores_gain_nothing_beyond_them():
    """Six workers on the two cores of a node; of one node, or of three."""
    one_node = [msgspec.structs.replace(worker(f"w{at}", heads=(8, 8)), core_share=0.5) for at in range(6)]
    assert planner_of(*one_node).degree(20_000, 20_100, [6], 100_000) == 2
    assert planner_of(*one_node).degree(20_000, 20_100, [6], 6_000) == 4, "but its KV must lie somewhere"
    assert planner_of(*one_node).degree(20_000, 20_100, [2, 2, 2], 100_000) == 6
    assert plan(*one_node[:4]).prefill_s == pytest.approx(
        2 * plan(*(worker(f"w{at}", heads=(8, 8)) for at in range(4))).prefill_s
    )


def test_the_estimate_of_a_layout_is_that_of_its_plan():
    ranks = [worker(f"w{number}", f"n{number // 2}") for number in range(4)]
    planner = planner_of(*ranks)
    assert planner.prefill_s(TOKENS, (2, 2)) == plan(*ranks).prefill_s
    assert planner.prefill_s(TOKENS, (2,)) == plan(*ranks[:2]).prefill_s
    assert planner.prefill_s(TOKENS, (1,)) == costs.prefill_s(COST, TOKENS, 512)


# --- what is set aside -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(9, 3), (8, 8), (4, 1), (6, 2)])
@pytest.mark.parametrize(("size", "per_node"), [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4), (6, 3)])
def test_the_books_hold_every_token_in_every_head_that_a_rank_keeps(heads, size, per_node):
    layer = worker(heads=heads).layer
    assert layer is not None
    scheme, mesh = GroupScheme(per_node=per_node), Mesh(size // per_node, per_node)
    for kv_tokens in (1, 97, 1_000, 8_191):
        for rank in range(size):
            share = head_shares(*heads, per_node)[mesh.place(rank)]
            kept = mesh.owned_tokens(kv_tokens, mesh.node(rank)) * share.kv_heads
            booked = kv_of_rank(scheme, size, rank, kv_tokens, layer) * heads[1]
            assert kept <= booked < kept + share.kv_heads + heads[1], "no less, and rounded up by a token"
        every = sum(kv_of_rank(scheme, size, rank, kv_tokens, layer) for rank in range(size))
        assert every >= kv_tokens, "somebody keeps each"
    assert kv_of_rank(scheme, size, 0, 1_000, None) == mesh.reserved_tokens(1_000)


@given(st.sampled_from([(9, 3), (8, 8), (8, 2), (4, 1), (40, 10)]), st.integers(1, 8))
def test_ranks_deal_out_heads_as_the_formulas_say(heads, places):
    query_heads, kv_heads = heads
    places = min(places, query_heads)
    shares = head_shares(query_heads, kv_heads, places)
    kv = [share.kv_heads for share in shares]
    split = HeadSplit(max(share.query_heads for share in shares), max(kv), sum(kv))
    assert split_heads(query_heads, kv_heads, places) == split


def test_a_group_is_ordered_with_its_scheme_and_the_story_tells_why():
    scheduler = Scheduler(SchedulerConfig(group_max=4), epoch=1)
    for name, node in product("ab", ("n0", "n1")):
        scheduler.handle(WorkerHeartbeat(profile=worker(f"{name}-{node}", node)), 0.0)
    scheduler.handle(CoordinatorHeartbeat(coordinator_id="c", incarnation="1"), 0.0)
    commands = scheduler.handle(RequestSubmitted(spec=spec("L", TOKENS)), 0.1)
    scheduler.check()
    (order,) = [command for command in commands if isinstance(command, FormGroup)]
    assert order.members == ("a-n0", "b-n0", "a-n1", "b-n1")
    assert order.scheme == GroupScheme(per_node=2)
    assert order.why in "".join(scheduler.story(order.spec.request_id))
    for replica in scheduler.cluster.replicas.values():
        rank = order.members.index(replica.worker_id)
        kv_tokens = order.spec.kv_tokens
        assert replica.kv_reserved == kv_of_rank(order.scheme, 4, rank, kv_tokens, replica.profile.layer)


def test_groups_that_take_far_longer_than_estimated_are_not_chosen_until_that_is_forgotten():
    planner = planner_of(*pair(heads=(8, 8)))
    estimate_s = planner.prefill_s(TOKENS, (2,))
    assert planner.degree(TOKENS, 8_000, [2], 100_000) == 2
    planner.took(2, 0.5, 5.0)
    assert planner.prefill_s(TOKENS, (2,)) == estimate_s, "too short to say anything"
    planner.took(2, estimate_s, 2.0 * estimate_s)
    assert planner.prefill_s(TOKENS, (2,)) == 2.0 * estimate_s
    assert planner.degree(TOKENS, 8_000, [2], 100_000) == 1
    planner.took(2, 2.0 * estimate_s, 2.0 * estimate_s)
    assert planner.prefill_s(TOKENS, (2,)) == 2.0 * estimate_s, "it was expected to"
    alone_s = planner.prefill_s(TOKENS, (1,))
    for _ in range(50):
        planner.took(1, alone_s, alone_s)
    assert planner.degree(TOKENS, 8_000, [2], 100_000) == 2


def test_where_everything_is_slow_groups_are_worth_what_they_were():
    planner = planner_of(*pair(heads=(8, 8)))
    for degree in (1, 2):
        planner.took(degree, 10.0, 20.0)
    assert planner.degree(TOKENS, 8_000, [2], 100_000) == 2


def test_the_scheduler_tells_how_long_a_group_ran_pauses_not_counted():
    scheduler = Scheduler(SchedulerConfig(group_max=2, elastic=False, lease_s=1e3), epoch=1)
    for name in "ab":
        scheduler.handle(WorkerHeartbeat(profile=worker(name, heads=(8, 8))), 0.0)
    scheduler.handle(CoordinatorHeartbeat(coordinator_id="c", incarnation="1"), 0.0)

    def long(name: str, at_s: float, takes_s: float) -> FormGroup:
        commands = scheduler.handle(RequestSubmitted(spec=spec(name, TOKENS)), at_s)
        (order,) = [command for command in commands if isinstance(command, FormGroup)]
        about = {"request_id": order.spec.request_id, "attempt": 0}
        scheduler.handle(GroupFormed(**about), at_s)
        scheduler.handle(GroupPrefillFinished(**about, compute_s=0.0), at_s + takes_s)
        scheduler.handle(GroupFinished(**about, finish_reason="stop", generated=1), at_s + takes_s)
        scheduler.check()
        return order

    assert len(long("slow", 1.0, 20.0).members) == 2
    assert len(long("next", 30.0, 9.0).members) == 1
