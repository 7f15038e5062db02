from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.messages.cluster import StepCost
from common.policy.colocation import tokens_beside
from common.policy.costs import CHUNK_GRAIN_TOKENS, pass_s, row_s

COST = StepCost(pass_s=0.05, token_s=0.4e-3, pair_s=2e-7)


@given(
    rows=st.lists(st.integers(1, 100_000), max_size=4),
    itl_s_max=st.floats(0.01, 2.0),
    passes=st.integers(1, 8),
    past=st.integers(0, 5_000),
    tokens_max=st.integers(1, 4_096),
)
def test_so_many_passes_take_no_longer_than_the_bound(
    rows: list[int], itl_s_max: float, passes: int, past: int, tokens_max: int
):
    rows_s = sum(row_s(COST, row, size=2) for row in rows)
    tokens = tokens_beside(COST, rows_s, itl_s_max=itl_s_max, passes=passes, past=past, tokens_max=tokens_max)
    least = min(CHUNK_GRAIN_TOKENS, tokens_max)
    assert least <= tokens <= tokens_max
    if tokens > least:
        assert passes * (pass_s(COST, tokens, past) + rows_s) <= itl_s_max * (1 + 1e-9)
    if tokens < tokens_max:
        assert passes * (pass_s(COST, tokens + 1, past) + rows_s) > itl_s_max * (1 - 1e-9)


def test_a_slower_member_takes_fewer():
    slow = StepCost(pass_s=0.05, token_s=0.8e-3, pair_s=2e-7)
    fast, slow_tokens = (tokens_beside(cost, 0.0, itl_s_max=0.2, passes=2, tokens_max=192) for cost in (COST, slow))
    assert slow_tokens < fast
