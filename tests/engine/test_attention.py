"""The private operators that return the log-sum-exp, and the merge, against the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.policy.sp_shares import head_shares
from services.engine import attention_kernels
from services.engine.attention import attend_at_end, attend_share, merge_attention
from services.engine.attention_kernels import UNMASKED, Attention, attend, plain_attention

HEADS = [(9, 3), (4, 4), (8, 1)]


def inputs(heads: tuple[int, int], tokens: int, keys: int, head_dim: int = 16) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(heads[0] + tokens + keys)
    query = torch.randn(1, heads[0], tokens, head_dim, generator=made)
    return query, *(torch.randn(1, heads[1], keys, head_dim, generator=made) for _ in range(2))


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """softmax(q kᵀ scaling) v, head by head, in double."""
    out = torch.empty_like(query, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        q, k, v = query[0, head].double(), key[0, head // group].double(), value[0, head // group].double()
        out[0, head] = torch.softmax(q @ k.T * scaling, -1) @ v
    return out


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 70), (5, 33), (40, 700)])
@pytest.mark.parametrize("attention", [*UNMASKED, attend])
def test_without_mask(heads: tuple[int, int], tokens: int, keys: int, attention: Attention) -> None:
    query, key, value = inputs(heads, tokens, keys)
    out, lse = attention(query, key, value, 0.3)
    torch.testing.assert_close(out.double(), formula(query, key, value, 0.3), atol=2e-6, rtol=1e-5)
    wanted = torch.logsumexp(
        (query.double() @ key.double().repeat_interleave(heads[0] // heads[1], 1).transpose(-1, -2)) * 0.3, -1
    )
    torch.testing.assert_close(lse.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 2, 31, 130])
@pytest.mark.parametrize("implementation", [attend, plain_attention])
def test_causal_rows_see_only_what_is_before_them(heads: tuple[int, int], tokens: int, implementation: object) -> None:
    query, key, value = inputs(heads, tokens, tokens)
    if implementation is attend:
        out, _ = attend(query, key, value, 0.25, causal=True)
    else:
        out, _ = plain_attention(query, key, value, 0.25, True)
    for at in (0, tokens // 2, tokens - 1):
        wanted = formula(query[:, :, at : at + 1], key[:, :, : at + 1], value[:, :, : at + 1], 0.25)
        torch.testing.assert_close(out[:, :, at : at + 1].double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("scores_max", [1, 33 * 100, 50 * 100])
def test_products_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, scores_max: int) -> None:
    monkeypatch.setattr(attention_kernels, "_SCORES_MAX", scores_max)
    query, key, value = inputs((8, 2), 37, 100)
    out, lse = attention_kernels.products(query, key, value, 0.3)
    wanted, wanted_lse = plain_attention(query, key, value, 0.3, False)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", UNMASKED)
def test_bfloat16_loses_no_more_than_its_roundings(attention: Attention) -> None:
    query, key, value = (tensor.bfloat16() for tensor in inputs((9, 3), 40, 700, 64))
    out, lse = attention(query, key, value, 0.125)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wanted, wanted_lse = plain_attention(query.float(), key.float(), value.float(), 0.125, False)
    torch.testing.assert_close(out.float(), wanted, atol=4e-3, rtol=1e-2)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-2, rtol=0)


@pytest.mark.parametrize("attention", UNMASKED)
def test_scores_far_beyond_what_exp_holds(attention: Attention) -> None:
    query, key, value = inputs((4, 4), 3, 300)
    out, lse = attention(query, key, value, 400.0)
    torch.testing.assert_close(out.double(), formula(query, key, value, 400.0), atol=1e-3, rtol=1e-3)
    assert bool(torch.isfinite(lse).all())


def test_few_and_many_queries_go_to_whom_the_trial_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def chosen(name: str) -> Attention:
        def attention(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append((name, query.shape[2]))
            return attention_kernels.folded(query, *args)

        return attention

    monkeypatch.setattr(attention_kernels, "trial", lambda *_: (chosen("few"), chosen("many")))
    for tokens, keys in ((1, 400), (40, 400), (40, 10)):
        query, key, value = inputs((4, 2), tokens, keys)
        attend(query, key, value, 0.3)
    assert asked == [("few", 1), ("many", 40)]  # few keys: nobody is asked


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("query_heads", "kv_heads", "places"), [(9, 3, 2), (9, 3, 4), (8, 4, 2), (6, 1, 4), (4, 4, 3)])
def test_shares_of_the_heads_together_attend_as_all_heads_do(
    query_heads: int, kv_heads: int, places: int, causal: bool
) -> None:
    query, key, value = torch.randn(1, query_heads, 5, 16), *torch.randn(2, 1, kv_heads, 31, 16)
    attention = attend_at_end if causal else attend
    parts = [
        attend_share(
            heads, attention, query[:, slice(*heads.query)], key[:, slice(*heads.kv)], value[:, slice(*heads.kv)], 0.3
        )
        for heads in head_shares(query_heads, kv_heads, places)
    ]
    out, lse = attention(query, key, value, 0.3)
    torch.testing.assert_close(torch.cat([part[0] for part in parts], dim=1), out)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], dim=1), lse)


@pytest.mark.parametrize("cut", [1, 17, 49])
def test_merge_of_two_parts_is_the_whole(cut: int) -> None:
    query, key, value = inputs((9, 3), 6, 50)
    whole, whole_lse = attend(query, key, value, 0.5)
    first = attend(query, key[:, :, :cut], value[:, :, :cut], 0.5)
    second = attend(query, key[:, :, cut:], value[:, :, cut:], 0.5)
    for out, lse in (merge_attention(*first, *second), merge_attention(*second, *first)):
        torch.testing.assert_close(out, whole, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse, whole_lse, atol=2e-6, rtol=1e-5)


def test_merge_with_nothing_changes_nothing() -> None:
    query, key, value = inputs((4, 4), 3, 20)
    out, lse = attend(query, key, value, 1.0)
    merged, merged_lse = merge_attention(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    torch.testing.assert_close(merged, out, atol=0, rtol=0)
    torch.testing.assert_close(merged_lse, lse, atol=0, rtol=0)


def test_merge_survives_very_different_magnitudes() -> None:
    out_a, out_b = torch.ones(1, 1, 1, 4), torch.full((1, 1, 1, 4), 2.0)
    merged, lse = merge_attention(out_a, torch.tensor([[[-400.0]]]), out_b, torch.tensor([[[300.0]]]))
    assert torch.equal(merged, out_b)
    assert lse.item() == 300.0
