"""Attention of one new token per sequence over its KV: a few ways to compute the same, and a trial
that picks the fastest on this machine. They differ by up to eight times, in opposite orders: on CPUs
with matrix units for bf16 the fused kernel wins, on others it converts every key for every query head.

All take query [rows, kv_heads, group, head_dim], key and value [rows, kv_heads, tokens, head_dim],
mask [rows, 1, 1, tokens] (0 or -inf, in the query's dtype) or None, and return [rows, kv_heads, group,
head_dim]. The query heads of a group share a KV head; it is never expanded.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]

_FEW_TOKENS = 768
"""Up to here one operator beats five, whatever it computes."""

_TRIAL_LAYERS, _TRIAL_ROWS, _TRIAL_TOKENS = 8, 16, 200


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The fused kernel, with the group taken for the length of the query."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The fused kernel, told of the groups."""
    rows, _, _, head_dim = query.shape
    heads = query.reshape(rows, -1, 1, head_dim)
    out = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return out.view(query.shape)


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Two batched products. Key times query, not query times key: the long side must be the rows of the
    left matrix (bf16 on CPU: 2 to 4 times faster)."""
    rows, heads, group, head_dim = query.shape
    tokens = key.shape[2]
    if rows * tokens <= _FEW_TOKENS:
        return folded(query, key, value, mask, scaling)
    # The slots of a table lie at equal distances, so that these are views.
    keys, values = key.reshape(-1, tokens, head_dim), value.reshape(-1, tokens, head_dim)
    scores = torch.bmm(
        keys, (query * scaling).view(-1, group, head_dim).transpose(1, 2)
    )  # [rows * heads, tokens, group]
    scores = scores.transpose(1, 2).reshape(rows, heads, group, tokens)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights.view(-1, group, tokens), values).view(query.shape)


def fastest(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Attention:
    """Try them at the size of a typical step (CPU: a tenth of a second). On a GPU the folded one: its
    kernels take a mask, and its cost is the read of the KV."""
    if device.type != "cpu":
        return folded
    query = torch.randn(_TRIAL_ROWS, kv_heads, group, head_dim, dtype=dtype)
    # As many layers as do not fit the caches of a core, since in a step every layer's KV comes from memory.
    tables = torch.randn(_TRIAL_LAYERS, 2, _TRIAL_ROWS, kv_heads, _TRIAL_TOKENS, head_dim, dtype=dtype)
    mask = torch.zeros(_TRIAL_ROWS, 1, 1, _TRIAL_TOKENS, dtype=dtype)
    times = {attend: _seconds(attend, query, tables, mask) for attend in (folded, grouped, products)}
    return min(times, key=lambda attend: times[attend])


@torch.inference_mode()
def _seconds(attend: Attention, query: Tensor, tables: Tensor, mask: Tensor) -> float:
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        for key, value in tables:
            attend(query, key, value, mask, 1.0)
        best = min(best, time.perf_counter() - begun)
    return best
