from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy import sequence_plan
from common.policy.cost_model import MODELS, CostModel, ModelShape
from common.policy.processors import Coefficients, Link
from common.policy.sequence_costs import (
    HeadSplit,
    attention_stage,
    decode_exchange_s,
    exchanged_elements,
    fetched_elements,
    gathered_elements,
    mlp_stage,
    split_heads,
)
from common.policy.sequence_plan import GRID_BITS, PlanRefused, SpPlanner, decode_step_s, layout_of, plan_prefill

GPU = Coefficients(
    name="made-up",
    source="",
    sources={},
    memory_bytes=80_000_000_000,
    peak_flops=300e12,
    memory_share=0.9,
    linear_flops=220e12,
    memory_bytes_s=1.6e12,
    layer_s=20e-6,
    other_s=10e-6,
    other_tokens=100,
    norm_element_s=1e-11,
    activation_element_s=4e-12,
    attention_flops=180e12,
    all_reduce=Link(latency_s=40e-6, bytes_s=160e9),
    intra_node=Link(latency_s=10e-6, bytes_s=200e9),
    inter_node=Link(latency_s=25e-6, bytes_s=50e9),
)

FREE = Link(latency_s=0.0, bytes_s=1e30)
NOTHING = msgspec.structs.replace(
    GPU,
    linear_flops=1e30,
    memory_bytes_s=1e30,
    attention_flops=1e30,
    layer_s=0.0,
    other_s=0.0,
    norm_element_s=0.0,
    activation_element_s=0.0,
    all_reduce=FREE,
    intra_node=FREE,
    inter_node=FREE,
)
"""A processor on which everything is free: a test takes one price out of it."""

SMALL = ModelShape(
    name="small", layers=2, hidden=128, heads=8, kv_heads=4, head_dim=16, ffn=256, vocab=1000, gated=True
)
"""qkv 128·(8 + 2·4)·16 = 32,768 weights, output 16,384, MLP 3·128·256 = 98,304; 256 bytes of KV per layer."""

TP = {"mistral-7b": 1, "phi-3-14b": 2, "yi-34b": 4, "llama-3.1-70b": 4}


def model(name: str = "mistral-7b", **options: object) -> CostModel:
    return CostModel(MODELS[name], GPU, TP[name], 8, **options)


def free_but(tp: int, shape: ModelShape = SMALL, *, step_s_max: float = 1e9, **prices: object) -> CostModel:
    return CostModel(shape, msgspec.structs.replace(NOTHING, **prices), tp, 8, step_s_max=step_s_max)


MODELS_DRAWN = st.sampled_from(sorted(TP)).map(model)
LONGS = st.integers(100_000, 500_000)


@st.composite
def grown(draw):
    """A model and a layout that its nodes can have."""
    chosen = draw(MODELS_DRAWN)
    nodes = draw(st.lists(st.integers(1, 8 // chosen.tp), min_size=1, max_size=5))
    return chosen, tuple(sorted(nodes, reverse=True))


# The table of volumes: s = 10 tokens per processor, T = 2, G = 4, worked out by hand.


def test_volumes_are_those_of_the_corrected_table():
    assert 4 * gathered_elements(SMALL, 2, 10) == 2 * 10 * 128 * 1 * 4 == 10_240
    assert 4 * exchanged_elements(SMALL, 4, 10) == 2 * 10 * (8 + 4) * 16 * 3 == 11_520
    assert 4 * fetched_elements(SMALL.qkv_weights + SMALL.out_weights, 2) == 49_152 * 4 / 2
    assert 4 * fetched_elements(SMALL.mlp_weights, 2) == 98_304 * 4 / 2


def test_the_time_of_an_exchange_is_what_one_processor_moves_over_its_link():
    moving = free_but(2, all_reduce=Link(latency_s=0.0, bytes_s=1.0), intra_node=Link(latency_s=0.0, bytes_s=1.0))
    # 40 tokens on two replicas of two: 10 each.
    assert mlp_stage(moving, 40, 2, "megatron").seconds == pytest.approx(2 * 2_560)
    assert mlp_stage(moving, 40, 2, "ulysses").seconds == pytest.approx(2 * 49_152)
    assert attention_stage(moving, 40, (2,), "ulysses").seconds == pytest.approx(2 * (2_880 + 24_576))
    # Megatron's replicas form a ring: 20 tokens of KV, half of the heads on each link.
    assert attention_stage(moving, 40, (2,), "megatron").seconds == pytest.approx(2 * 2_560 + 20 * 256 / 2)


def test_every_scheme_computes_the_same_matmuls():
    computing = free_but(2, linear_flops=2.0)  # one multiply-add per second
    for scheme in ("megatron", "ulysses"):
        assert mlp_stage(computing, 40, 2, scheme).seconds == pytest.approx(10 * 98_304)
        assert attention_stage(computing, 40, (2,), scheme).seconds == pytest.approx(10 * 49_152)


def test_attention_is_causal_and_covers_what_arrives_round_the_ring():
    attending = free_but(1, attention_flops=4 * 16.0)  # one pair in one head per second
    tokens = 1 << 24  # so many that the last wave of tiles does not show
    whole = attention_stage(attending, tokens, (1,), "ulysses").seconds
    assert whole == pytest.approx(8 * tokens**2 / 2, rel=1e-2)
    for layout in ((2,), (4,), (2, 2), (2, 1, 1)):
        for scheme in ("megatron", "ulysses"):
            shared = attention_stage(attending, tokens, layout, scheme).seconds
            assert shared == pytest.approx(whole / sum(layout), rel=2e-2)


def test_a_contiguous_ring_waits_for_its_last_member():
    attending = free_but(1, attention_flops=4 * 16.0)
    for members in (2, 4, 8):
        balanced, contiguous = (
            attention_stage(attending, 1 << 26, (members,), "megatron", order).seconds
            for order in ("zigzag", "contiguous")
        )
        assert contiguous / balanced == pytest.approx(2 - 1 / members, rel=1e-2)


def test_a_ring_step_takes_the_longer_of_computing_and_transfer():
    # Three nodes of one processor, 300 tokens: blocks of 100. Half a wave of tiles reads 3/4 of a block's keys.
    kernel_s = 8 * 100 * 100 / 2 + 0.5 * 128 * 120 * 75
    block_bytes = 100 * 256
    for hop_s in (kernel_s / 2, kernel_s * 3):
        ring = free_but(
            1, attention_flops=4 * 16.0, inter_node=Link(latency_s=1.0, bytes_s=block_bytes / (hop_s - 1.0))
        )
        expected = 2 * max(kernel_s, hop_s) + kernel_s
        for scheme in ("megatron", "ulysses"):
            assert attention_stage(ring, 300, (1, 1, 1), scheme).seconds == pytest.approx(expected)


def test_efficiencies_of_rings_that_others_measured():
    """ring-flash-attention, forward on 8 x A100 with NVLink, 32/8 heads of 128, 8K tokens each: of a single GPU's
    kernel the zigzag reaches 81.7 %, the contiguous ring 51.4 %."""
    shape = msgspec.structs.replace(MODELS["mistral-7b"], name="attention of it")
    gpu = msgspec.structs.replace(GPU, linear_flops=1e30, attention_flops=205e12)
    ring = CostModel(shape, gpu, 1, 8, step_s_max=10.0)
    kernel_s = ring.attention_s(8192**2 / 2, 32)
    for order, measured in (("zigzag", 0.817), ("contiguous", 0.514)):
        efficiency = 8 * kernel_s / attention_stage(ring, 8 * 8192, (8,), "megatron", order).seconds
        assert efficiency == pytest.approx(measured, rel=0.15)


# Heads.


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts", "split"),
    [
        (32, 8, 8, HeadSplit(4, 1, 8)),
        (40, 10, 8, HeadSplit(5, 2, 16)),  # 5 heads straddle groups of 4
        (64, 8, 16, HeadSplit(4, 1, 16)),  # fewer KV heads than processors: each on two
        (9, 3, 2, HeadSplit(5, 2, 4)),
        (32, 8, 5, HeadSplit(7, 3, 11)),  # 0-6, 7-13, 14-19, 20-25, 26-31: 2 + 3 + 2 + 2 + 2
    ],
)
def test_heads_are_dealt_out_with_the_kv_heads_they_need(heads, kv_heads, parts, split):
    assert split_heads(heads, kv_heads, parts) == split


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 64))
def test_a_head_split_leaves_nobody_without(kv_heads, group, parts):
    heads = kv_heads * group
    if parts > heads:
        with pytest.raises(PlanRefused, match=f"{heads} heads"):
            split_heads(heads, kv_heads, parts)
        return
    split = split_heads(heads, kv_heads, parts)
    assert split.heads_max == -(-heads // parts)
    assert max(kv_heads, parts) <= split.kv_copies <= kv_heads + parts - 1
    assert -(-split.kv_copies // parts) <= split.kv_heads_max <= min(kv_heads, split.heads_max)


# Plans.


@settings(max_examples=60)
@given(grown(), LONGS)
def test_estimates_are_positive_and_the_cheapest_is_taken(drawn, tokens):
    chosen, layout = drawn
    if tokens > sum(layout) * chosen.kv_capacity_tokens:
        with pytest.raises(PlanRefused, match=f"^{tokens:,} tokens"):
            plan_prefill(chosen, tokens, layout)
        return
    plan = plan_prefill(chosen, tokens, layout)
    assert [name for name, _ in plan.estimates] == [
        f"{attention}/{mlp}" for attention in ("ulysses", "megatron") for mlp in ("ulysses", "megatron")
    ]
    assert all(seconds > 0 for _, seconds in plan.estimates)
    assert plan.prefill_s == min(seconds for _, seconds in plan.estimates)
    assert dict(plan.estimates)[f"{plan.attention}/{plan.mlp}"] == plan.prefill_s
    assert 0 < plan.step_s <= plan.prefill_s
    assert plan == plan_prefill(chosen, tokens, layout)
    assert all(f"{name} {seconds:.2f} s" in plan.why for name, seconds in plan.estimates)


@settings(max_examples=40)
@given(MODELS_DRAWN, LONGS)
def test_more_replicas_of_a_node_are_never_slower(chosen, tokens):
    planner = SpPlanner(chosen)
    times = [planner.prefill_s(tokens, (degree,)) for degree in range(1, 8 // chosen.tp + 1)]
    assert all(more <= fewer * 1.01 for fewer, more in pairwise(times))


@settings(max_examples=40)
@given(grown(), LONGS)
def test_a_group_is_faster_than_one_but_not_beyond_its_size(drawn, tokens):
    chosen, layout = drawn
    planner = SpPlanner(chosen)
    alone, together = planner.prefill_s(tokens, (1,)), planner.prefill_s(tokens, layout)
    # A replica alone is cut into more pieces, each of which costs some: 5 % with this bound.
    assert alone / sum(layout) * 0.95 <= together <= alone


@settings(max_examples=40)
@given(grown(), LONGS)
def test_a_plain_ring_is_no_faster_and_a_zigzag_one_no_slower_than_contiguous(drawn, tokens):
    chosen, layout = drawn
    fast, balanced, contiguous = (
        SpPlanner(chosen, fast_sp=fast_sp, plain_ring=order).prefill_s(tokens, layout)
        for fast_sp, order in ((True, "zigzag"), (False, "zigzag"), (False, "contiguous"))
    )
    assert fast <= balanced <= contiguous * (1 + 1e-9)
    assert contiguous <= balanced * (2 - 1 / sum(layout)) * 1.01


def test_one_replica_takes_what_a_pass_takes():
    for name in TP:
        alone = model(name, step_s_max=1e9)
        for tokens in (20_000, 200_000):
            plain = plan_prefill(alone, tokens, (1,), fast_sp=False)
            assert plain.prefill_s == pytest.approx(alone.pass_s(tokens), rel=0.02)


def test_without_tensor_parallelism_no_weights_are_fetched():
    assert fetched_elements(SMALL.mlp_weights, 1) == 0
    slow = msgspec.structs.replace(GPU, all_reduce=Link(latency_s=1.0, bytes_s=1.0))
    for layout in ((8,), (8, 8, 3)):
        plans = [
            plan_prefill(CostModel(MODELS["mistral-7b"], gpu, 1, 8), 200_000, layout).estimates for gpu in (GPU, slow)
        ]
        assert plans[0] == plans[1]


def test_a_single_processor_communicates_with_nobody():
    slowest = Link(latency_s=1e6, bytes_s=1.0)
    mute = msgspec.structs.replace(GPU, all_reduce=slowest, intra_node=slowest, inter_node=slowest)
    shape = MODELS["mistral-7b"]
    for fast_sp in (True, False):
        alone, with_mute = (
            plan_prefill(CostModel(shape, gpu, 1, 8), 100_000, (1,), fast_sp=fast_sp) for gpu in (GPU, mute)
        )
        assert alone == with_mute
    assert decode_step_s(CostModel(shape, mute, 1, 8), (1,), 100_000) < 1.0


def test_long_sequences_fetch_weights_and_short_ones_gather_tokens():
    large = model("llama-3.1-70b")
    assert plan_prefill(large, 4_000, (2,)).mlp == "megatron"
    assert plan_prefill(large, 500_000, (2,)).mlp == "ulysses"


def test_steps_are_bounded_and_a_finer_bound_costs_more():
    coarse, fine = (plan_prefill(model(step_s_max=bound), 400_000, (4,)) for bound in (0.1, 0.01))
    assert coarse.step_s <= 0.1
    assert fine.step_s <= 0.01
    assert coarse.prefill_s < fine.prefill_s < coarse.prefill_s * 1.1
    exchange = plan_prefill(model(step_s_max=1e-4), 400_000, (4,))
    assert exchange.step_s > 1e-4, "where a bound is below what a cut costs, the plan says so"


# Refusals.


@pytest.mark.parametrize(
    ("tokens", "layout", "reason"),
    [
        (100_000, (), "1 or more"),
        (100_000, (4, 0), "1 or more"),
        (100_000, (2, 4), "largest first"),
        (100_000, (9,), "a node of 8 GPUs has 8 replicas of 1"),
        (15, (8,), "needs at least 16"),
        (0, (1,), "needs at least 1"),
        (900_000, (1,), "has room for"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tokens, layout, reason):
    for fast_sp in (True, False):
        with pytest.raises(PlanRefused, match=reason):
            plan_prefill(model(), tokens, layout, fast_sp=fast_sp)


def test_more_processors_than_heads_leave_megatron():
    few = ModelShape(name="few heads", layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=1000)
    plan = plan_prefill(CostModel(few, GPU, 1, 8), 50_000, (8, 4))
    assert plan.attention == "megatron"
    assert [name for name, _ in plan.estimates] == ["megatron/ulysses", "megatron/megatron"]
    assert [name for name, _ in plan.refused] == ["ulysses/ulysses", "ulysses/megatron"]
    assert "not possible: 4 heads do not reach for 8 processors of a node" in plan.why


def test_the_sentence():
    plan = plan_prefill(model(), 200_000, (8, 4))
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in plan.estimates)
    assert plan.why == (
        f"200,000 tokens on 8+4 replicas: attention by {plan.attention}, MLP by {plan.mlp} is the cheapest "
        f"(attention/MLP: {times})."
    )
    plain = plan_prefill(model(), 200_000, (8, 4), fast_sp=False)
    assert plain.why == (
        f"Fast SP is off: 200,000 tokens take a contiguous ring of 8+4 replicas {plain.prefill_s:.2f} s."
    )


# The planner.


@dataclass(frozen=True)
class Cluster:
    model: CostModel
    free_by_node: tuple[int, ...]
    kv_free_tokens: int


@st.composite
def clusters(draw):
    chosen = draw(MODELS_DRAWN)
    free = sorted(draw(st.lists(st.integers(0, 8 // chosen.tp), max_size=6)), reverse=True)
    return Cluster(chosen, tuple(free), draw(st.integers(20_000, chosen.kv_capacity_tokens)))


@given(st.lists(st.integers(0, 8), max_size=6), st.integers(1, 50))
def test_a_layout_takes_one_node_if_it_can_and_the_largest_if_not(free, degree):
    free = sorted(free, reverse=True)
    layout = layout_of(free, degree)
    if sum(free) < degree:
        assert layout == ()
        return
    assert sum(layout) == degree
    assert all(taken <= there for taken, there in zip(layout, free, strict=False))
    assert (len(layout) == 1) == (free[0] >= degree)
    assert layout[:-1] == tuple(free[: len(layout) - 1]), "nodes before the last are taken whole"


@settings(max_examples=60)
@given(clusters(), LONGS, st.sampled_from([0.5, 0.7, 0.9, 0.97]), st.integers(1, 40))
def test_a_degree_has_room_and_is_efficient(cluster, tokens, efficiency_min, degree_max):
    planner = SpPlanner(cluster.model, efficiency_min=efficiency_min, degree_max=degree_max)
    degree = planner.degree(tokens, tokens + 500, cluster.free_by_node, cluster.kv_free_tokens)
    fewest = -(-(tokens + 500) // cluster.kv_free_tokens)
    if fewest > min(degree_max, sum(cluster.free_by_node)):
        assert degree == 0
        return
    assert fewest <= degree <= min(degree_max, sum(cluster.free_by_node))
    least, taken = (planner.prefill_s(tokens, layout_of(cluster.free_by_node, count)) for count in (fewest, degree))
    assert least * fewest / (taken * degree) >= efficiency_min
    assert degree == fewest or taken < least


@settings(max_examples=60)
@given(clusters(), LONGS, LONGS, st.sampled_from([0.5, 0.7, 0.9]))
def test_longer_prompts_get_no_fewer_replicas(cluster, one, other, efficiency_min):
    planner = SpPlanner(cluster.model, efficiency_min=efficiency_min)
    shorter, longer = (
        planner.degree(tokens, tokens, cluster.free_by_node, cluster.kv_free_tokens) for tokens in sorted((one, other))
    )
    assert longer >= shorter or longer == 0


def test_a_degree_grows_with_the_prompt_until_the_cluster_ends():
    planner = SpPlanner(model())
    free = [8, 8, 8, 4]
    degrees = [planner.degree(tokens, tokens, free, 200_000) for tokens in (2_000, 20_000, 500_000)]
    assert degrees == sorted(degrees)
    assert degrees[0] < degrees[1] < degrees[2] == 28


def test_no_room_no_degree():
    planner = SpPlanner(model(), degree_max=3)
    assert planner.degree(100_000, 100_000, [], 200_000) == 0
    assert planner.degree(100_000, 100_000, [0, 0], 200_000) == 0
    assert planner.degree(100_000, 100_000, [8], 0) == 0
    assert planner.degree(100_000, 100_000, [2], 40_000) == 0, "three are needed"
    assert planner.degree(100_000, 130_000, [8], 40_000) == 0, "four are needed"
    assert planner.degree(100_000, 100_000, [8], 40_000) == 3


def test_a_plain_rings_groups_are_smaller_unless_large_ones_are_asked_for():
    fast, plain = SpPlanner(model()), SpPlanner(model(), fast_sp=False)
    large = SpPlanner(model(), fast_sp=False, large_groups=True)
    for tokens in (100_000, 400_000):
        of_fast, of_plain, of_large = (p.degree(tokens, tokens, [8, 8], 300_000) for p in (fast, plain, large))
        assert of_plain < of_fast == of_large
        assert plain.prefill_s(tokens, (8,)) > fast.prefill_s(tokens, (8,))


@given(st.integers(32, 3_000_000), st.sampled_from([(8,), (8, 4)]), st.booleans())
def test_times_between_those_of_the_grid_are_close_to_those_of_the_plan(tokens, layout, fast_sp):
    planner = SpPlanner(model(), fast_sp=fast_sp)
    kept = planner.prefill_s(tokens, layout)
    assert kept == planner.prefill_s(tokens, layout) == SpPlanner(model(), fast_sp=fast_sp).prefill_s(tokens, layout)
    grain = 1 << max(0, tokens.bit_length() - GRID_BITS)
    below = tokens - tokens % grain
    assert planner.prefill_s(below, layout) == planner.plan(below, layout).prefill_s
    assert planner.prefill_s(below, layout) <= kept <= planner.prefill_s(below + grain, layout)
    if tokens > 2_000:  # of fewer, a tile more is much more
        assert kept == pytest.approx(planner.plan(tokens, layout).prefill_s, rel=0.05)


def test_a_planner_answers_for_any_part_of_a_prompt():
    for fast_sp in (True, False):
        planner = SpPlanner(model(), fast_sp=fast_sp)
        times = [planner.prefill_s(tokens, (8,)) for tokens in (0, 1, 100, 2_000_000)]
        assert times[0] == 0
        assert times == sorted(times)
        with pytest.raises(PlanRefused, match="a node of 8 GPUs"):
            planner.prefill_s(100_000, (9,))


def test_a_cache_that_is_full_starts_over(monkeypatch):
    monkeypatch.setattr(sequence_plan, "CACHE_MAX", 4)
    planner = SpPlanner(model())
    first = planner.prefill_s(100_000, (1,))
    for degree in range(2, 9):
        planner.prefill_s(100_000, (degree,))
    assert planner.prefill_s(100_000, (1,)) == first


@pytest.mark.parametrize("options", [{"efficiency_min": 0.0}, {"efficiency_min": 1.1}, {"degree_max": 0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SpPlanner(model(), **options)


def test_a_planner_tells_what_it_is():
    assert repr(SpPlanner(model(), fast_sp=False)) == (
        "SpPlanner(CostModel(mistral-7b on 1 x made-up), plain contiguous ring, efficiency >= 0.7, degree <= 32)"
    )


# Decode.


def test_a_decode_step_reads_its_own_shard_and_exchanges_queries_and_outputs():
    chosen = model()
    assert decode_step_s(chosen, (1,), 300_000) == chosen.decode_step_s(1, 300_000)
    # 32 heads of 128: a query is 8,192 bytes, a partial output 128 more. Seven neighbours at 200 GB/s with 10 µs of
    # latency, four remote at 50 GB/s with 25 µs; the two links at once; a merge of 10 µs.
    far_out, far_back = 25e-6 + 4 * 8_192 / 50e9, 25e-6 + 4 * 8_320 / 50e9
    assert decode_exchange_s(chosen, (8, 4)) == pytest.approx(10e-6 + far_out + far_back)
    near = 10e-6 + 2 * 10e-6 + 7 * (8_192 + 8_320) / 200e9
    assert decode_exchange_s(chosen, (8,)) == pytest.approx(near)
    expected = chosen.decode_step_s(1, 25_000) + 32 * decode_exchange_s(chosen, (8, 4))
    assert SpPlanner(chosen).decode_step_s((8, 4), 300_000) == pytest.approx(expected)


@settings(max_examples=40)
@given(grown(), st.integers(1, 2_000_000), st.integers(0, 100_000))
def test_decode_steps_are_positive_and_grow_with_the_kv(drawn, kv_tokens, more):
    chosen, layout = drawn
    step_s = decode_step_s(chosen, layout, kv_tokens)
    assert 0 < step_s <= decode_step_s(chosen, layout, kv_tokens + more)


def test_sharding_pays_for_a_long_kv_only():
    chosen = model()
    assert decode_step_s(chosen, (8,), 400_000) < decode_step_s(chosen, (1,), 400_000)
    assert decode_step_s(chosen, (8,), 1_000) > decode_step_s(chosen, (1,), 1_000)
