"""Attention of a ragged batch over the sequences' own KV, registered with transformers.

A layer of transformers projects and rotates the packed batch, then calls `ragged_attention` with the
batch passed through its keyword arguments (`ctx`). Each segment writes its keys and values into its
sequence's cache and attends to all of that sequence so far.

A chunk with a past cannot use one causal call: the causal flag is aligned to the top left, as if the
past were part of the chunk. Past (no mask) and own part (square, causal) are attended separately and
merged by their log-sum-exp, which is exact:
    lse = log(e^lse_a + e^lse_b);  out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse)

Where no mask is needed, the query heads that share a KV head are folded into the query's length: KV is
never expanded, and the kernel sees longer queries (decode on CPU: 7 times faster).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from services.engine.batch import Packed, RaggedBatch

NAME = "pecsched"
"""Under which transformers finds the function."""

CAUSAL_BLOCK = 256
"""Longer chunks attend in blocks of this many queries: the CPU's causal kernel costs twice as much per
pair of tokens as the one without a mask, so little of the work should be under the mask."""


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Masks follow from the segment table."""


def ragged_attention(
    module: Any,
    query: Tensor,  # [1, query_heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,  # [1, kv_heads, tokens, head_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    ctx: RaggedBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, tokens, query_heads, head_dim]; the new KV is in the caches afterwards."""
    layer: int = module.layer_idx
    if len(ctx.rows) == 1:
        return _attend_segment(ctx.rows[0], layer, query, key, value, scaling).transpose(1, 2), None
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    for row in ctx.rows:
        part = slice(row.offset, row.offset + row.tokens)
        piece = _attend_segment(row, layer, query[:, :, part], key[:, :, part], value[:, :, part], scaling)
        out[:, part] = piece.transpose(1, 2)
    return out, None


def _attend_segment(row: Packed, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Tensors as in `ragged_attention`, of one segment. Returns [1, query_heads, tokens, head_dim]."""
    kv = row.sequence.kv
    start = row.start
    kv.write(layer, start, key[0], value[0])
    keys, values = kv.read(layer, 0, start + row.tokens)
    if row.tokens == 1:
        return attend(query, keys, values, scaling)[0]
    block = CAUSAL_BLOCK if query.device.type == "cpu" else row.tokens
    if row.tokens <= block:
        return _attend_block(query, keys, values, scaling)
    bounds = [*range(0, row.tokens, block), row.tokens]
    return torch.cat(
        [
            _attend_block(query[:, :, begin:end], keys[:, :, : start + end], values[:, :, : start + end], scaling)
            for begin, end in pairwise(bounds)
        ],
        dim=2,
    )


def _attend_block(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of queries that stand at the end of the keys. Returns [1, query_heads, n, head_dim]."""
    past = key.shape[2] - query.shape[2]
    own = attend(query, key[:, :, past:], value[:, :, past:], scaling, causal=True)
    if past == 0:
        return own[0]
    return merge_attention(*attend(query, key[:, :, :past], value[:, :, :past], scaling), *own)[0]


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    `out_*`: [..., tokens, head_dim], finite; `lse_*`: float32 [..., tokens], -inf for an empty set (not both).
    Returns the pair for the union, `out` in the dtype of `out_a`.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_b = torch.exp(lse_b - lse).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), weight_b).to(out_a.dtype), lse


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Grouped-query attention with its log-sum-exp.

    query [1, query_heads, n, head_dim], key and value [1, kv_heads, m, head_dim]; causal only if n = m.
    Returns out [1, query_heads, n, head_dim] and lse float32 [1, query_heads, n] (natural logarithm).
    """
    kv_heads = key.shape[1]
    if causal:
        return _kernel(query, key, value, scaling, True)
    _, heads, tokens, head_dim = query.shape
    folded = query.reshape(1, kv_heads, heads // kv_heads * tokens, head_dim)
    out, lse = _kernel(folded, key, value, scaling, False)
    return out.reshape(1, heads, tokens, head_dim), lse.reshape(1, heads, tokens)


def _kernel(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The fastest operator of the device that returns the log-sum-exp.

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
