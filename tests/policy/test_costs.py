from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages.cluster import StepCost
from common.policy.costs import CHUNK_GRAIN_TOKENS, chunk_tokens, decode_slot_tokens, pass_s, prefill_s

COSTS = st.builds(
    StepCost,
    pass_s=st.floats(0.0, 0.2),
    token_s=st.floats(1e-6, 5e-3),
    pair_s=st.one_of(st.just(0.0), st.floats(1e-9, 2e-6)),
)


@given(cost=COSTS, past=st.integers(0, 500_000), step_s_max=st.floats(1e-3, 0.1), tokens_max=st.integers(1, 4_096))
def test_a_chunk_is_the_largest_whose_steps_stay_below_the_bound(
    cost: StepCost, past: int, step_s_max: float, tokens_max: int
):
    layers = 30
    chunk = chunk_tokens(cost, layers, past, step_s_max=step_s_max, tokens_max=tokens_max)
    assert 1 <= chunk <= tokens_max
    smallest = min(CHUNK_GRAIN_TOKENS, tokens_max)
    if chunk > smallest:
        assert pass_s(cost, chunk, past) / layers <= step_s_max * (1 + 1e-6)
    if chunk + CHUNK_GRAIN_TOKENS <= tokens_max:
        assert pass_s(cost, chunk + CHUNK_GRAIN_TOKENS, past) / layers > step_s_max * (1 - 1e-6)


def test_chunks_shrink_as_the_past_grows():
    cost = StepCost(pass_s=0.05, token_s=1e-3, pair_s=1e-6)
    sizes = [chunk_tokens(cost, 30, past, step_s_max=0.026, tokens_max=512) for past in range(0, 8_000, 500)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_a_prompt_in_chunks_costs_what_its_passes_cost():
    cost = StepCost(pass_s=0.05, token_s=1e-3, pair_s=1e-6)
    passes = sum(pass_s(cost, 512, past) for past in range(0, 2_048, 512))
    assert prefill_s(cost, 2_048, 512) == pytest.approx(passes)


@given(st.integers(1, 100_000))
def test_a_slot_is_a_power_of_two_that_holds_the_sequence(kv_tokens: int):
    slot = decode_slot_tokens(kv_tokens)
    assert slot >= max(kv_tokens, 256)
    assert slot & (slot - 1) == 0
    assert slot == 256 or slot // 2 < kv_tokens
