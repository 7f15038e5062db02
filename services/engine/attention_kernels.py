"""Grouped-query attention with its log-sum-exp: the ways to compute it, and a trial that picks the
fastest on this machine.

All take query [1, query_heads, n, head_dim], key and value [1, kv_heads, m, head_dim], and return out
[1, query_heads, n, head_dim] and lse float32 [1, query_heads, n] (natural logarithm). `group` query heads
share a KV head.

Where no mask is needed, the query heads of a group are folded into the query's length: KV is never
expanded, and the kernel sees longer queries (decode on CPU: 7 times faster). On CPUs with matrix units
for bf16 the fused kernel is fastest; on others it multiplies no faster than float32, and plain products,
with softmax between them, take two thirds of its time. Hence the trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

_SCORES_MAX = 1 << 20
"""Scores that `products` holds at a time (6 MB in bf16), where they are not fewer than `_ROWS_MIN` rows."""

_ROWS_MIN = 32

_FEW_KEYS = 384
"""Below it one operator beats several, whatever it computes."""

_FEW_QUERIES = 16
"""Few and many are tried apart: for few, reading the keys costs more than multiplying them."""

_TRIAL_QUERIES, _TRIAL_KEYS, _TRIAL_REPETITIONS = (1, 64), 2048, 3


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """By the fastest way; causal only if n = m."""
    if causal:
        return _fused(query, key, value, scaling, True)
    if query.device.type != "cpu" or key.shape[2] < _FEW_KEYS:
        return folded(query, key, value, scaling)
    _, kv_heads, _, head_dim = key.shape
    few, many = trial(kv_heads, query.shape[1] // kv_heads, head_dim, query.dtype)
    return (few if query.shape[2] < _FEW_QUERIES else many)(query, key, value, scaling)


def folded(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The fused kernel, with the group folded into the query's length."""
    _, heads, tokens, head_dim = query.shape
    out, lse = _fused(query.reshape(1, key.shape[1], -1, head_dim), key, value, scaling, False)
    return out.reshape(1, heads, tokens, head_dim), lse.reshape(1, heads, tokens)


def grouped(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The fused kernel, which finds each query head's KV head by itself."""
    return _fused(query, key, value, scaling, False)


def products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Two products with a softmax in float32 between them, in blocks of queries that bound the memory.
    Each block sees all keys, so that softmax needs no second pass.

    In bf16 the scores are rounded to bf16 once, as in every attention made of separate operators.
    """
    _, kv_heads, keys, head_dim = key.shape
    flat = query.reshape(kv_heads, -1, head_dim)  # [kv_heads, group * n, head_dim]
    rows = flat.shape[1]
    blocks = -(-rows // max(_ROWS_MIN, _SCORES_MAX // keys))
    block = -(-rows // blocks)
    out, lse = torch.empty_like(flat), flat.new_empty(kv_heads, rows, dtype=torch.float32)
    raw = flat.new_empty(block, keys)
    exact = raw if raw.dtype == torch.float32 else raw.new_empty(block, keys, dtype=torch.float32)
    for head in range(kv_heads):
        for begin in range(0, rows, block):
            part = slice(begin, min(begin + block, rows))
            count = part.stop - part.start
            scores, weights = raw[:count], exact[:count]
            torch.mm(flat[head, part], key[0, head].T, out=scores)
            torch.mul(scores, scaling, out=weights)
            largest = weights.amax(-1)
            torch.softmax(weights, -1, out=weights)
            lse[head, part] = largest - weights.amax(-1).log()  # the largest weight is e^(largest - lse)
            scores.copy_(weights)
            torch.mm(scores, value[0, head], out=out[head, part])
    return out.view(query.shape), lse.view(query.shape[:3])


UNMASKED: tuple[Attention, ...] = (folded, grouped, products)


@cache
def trial(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> tuple[Attention, Attention]:
    """The fastest on this CPU for few and for many queries. Once per shape of model, at its first pass,
    which is the calibration's; takes a tenth of a second for a small model."""
    few, many = (_fastest(kv_heads, group, head_dim, dtype, queries) for queries in _TRIAL_QUERIES)
    return few, many


@torch.inference_mode()
def _fastest(kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, queries: int) -> Attention:
    query = torch.randn(1, kv_heads * group, queries, head_dim, dtype=dtype)
    key, value = torch.randn(2, 1, kv_heads, _TRIAL_KEYS, head_dim, dtype=dtype)
    least_s = dict.fromkeys(UNMASKED, float("inf"))
    for _ in range(_TRIAL_REPETITIONS):
        for attention in UNMASKED:
            # The thread's own time: other workers, at their own start, compute on the same cores.
            begun = time.thread_time()
            attention(query, key, value, 1.0)
            least_s[attention] = min(least_s[attention], time.thread_time() - begun)
    return min(UNMASKED, key=lambda attention: least_s[attention])


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The device's operator that returns the log-sum-exp.

    They are private operators of torch, as the public function does not return it; a test compares
    each with the plain formula.
    """
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, causal, scale=scaling
        )
    if query.device.type == "cuda":
        return _cuda_kernel(query, key, value, scaling, causal)
    return plain_attention(query, key, value, scaling, causal)


def _cuda_kernel(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    head_dim = query.shape[-1]
    if head_dim % 8:
        query, key, value = (F.pad(tensor, (0, 8 - head_dim % 8)) for tensor in (query, key, value))
    if query.dtype in (torch.bfloat16, torch.float16) and head_dim <= 256:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )[:2]
    return out[..., :head_dim], lse[..., : query.shape[2]]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The formula itself, for devices without a fused operator. Shapes as in `attend`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query.float() @ key.float().transpose(-1, -2)) * scaling
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    out = torch.exp(scores - lse.unsqueeze(-1)) @ value.float()
    return out.to(query.dtype), lse
