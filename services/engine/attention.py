"""Attention of a ragged batch over the sequences' own KV, registered with transformers.

A layer of transformers projects and rotates the packed batch, then calls `ragged_attention` with the
batch passed through its keyword arguments (`ctx`). Each segment writes its keys and values into its
sequence's cache and attends to all of that sequence so far; one that a group shares does so with the other ranks
(`sequence_parallel.py`).

A chunk with a past cannot use one causal call: the causal flag is aligned to the top left, as if the
past were part of the chunk. Past (no mask) and own part (square, causal) are attended separately and
merged by their log-sum-exp, which is exact:
    lse = log(e^lse_a + e^lse_b);  out = out_a e^(lse_a - lse) + out_b e^(lse_b - lse)
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from common.policy.sp_shares import HeadShare
from services.engine.attention_kernels import Attention, attend
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
    if row.group is not None:
        return row.group.attend(kv, layer, query, key, value, scaling)
    kv.write(layer, row.start, key[0], value[0])
    return attend_at_end(query, *kv.read(layer, 0, row.start + row.tokens), scaling)[0]


def attend_share(
    heads: HeadShare, attention: Attention, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """By `attention` (`attend` or `attend_at_end`) on a share of the heads, of which some KV heads may have fewer query
    heads than others: run by run."""
    parts = [
        attention(query[:, slice(*run.query)], keys[:, slice(*run.kv)], values[:, slice(*run.kv)], scaling)
        for run in heads.runs
    ]
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def attend_at_end(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention of queries that stand at the end of the keys, with its log-sum-exp.

    query [1, query_heads, n, head_dim], keys and values [1, kv_heads, m, head_dim], 1 <= n <= m. Returns
    [1, query_heads, n, head_dim] and float32 [1, query_heads, n]."""
    tokens = query.shape[2]
    if tokens == 1:
        return attend(query, keys, values, scaling)
    block = CAUSAL_BLOCK if query.device.type == "cpu" else tokens
    if tokens <= block:
        return _attend_block(query, keys, values, scaling)
    past = keys.shape[2] - tokens
    outs, lses = zip(
        *(
            _attend_block(query[:, :, begin:end], keys[:, :, : past + end], values[:, :, : past + end], scaling)
            for begin, end in pairwise([*range(0, tokens, block), tokens])
        ),
        strict=True,
    )
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """As `attend_at_end`, all under one mask."""
    past = key.shape[2] - query.shape[2]
    own = attend(query, key[:, :, past:], value[:, :, past:], scaling, causal=True)
    if past == 0:
        return own
    return merge_attention(*attend(query, key[:, :, :past], value[:, :, :past], scaling), *own)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    `out_*`: [..., tokens, head_dim], finite; `lse_*`: float32 [..., tokens], -inf for an empty set (not both).
    Returns the pair for the union, `out` in the dtype of `out_a`.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_b = torch.exp(lse_b - lse).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), weight_b).to(out_a.dtype), lse
