"""Linear work where weights are split (Megatron's sequence parallelism): in a node every rank computes all tokens with
its share of the weights (`weight_shares.py`).

Around a stage the ranks of a node gather the normalised hidden states of their tokens, and afterwards each gets,
summed, what all have computed of its own. What lies between two such stages (norms, residuals) is computed by each
rank for its own tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from services.engine.batch import RaggedBatch
from services.engine.weight_shares import LayerShare

if TYPE_CHECKING:
    from services.engine.sequence_parallel import GroupPass

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each [1, tokens, rotary dim]."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Tokens for a module to attend for, and where they stand."""

    batch: RaggedBatch
    rotary: Rotary

    def attend(self, module: Any, normed: Tensor) -> Tensor:
        """One of transformers' attention modules; `normed` and result [1, tokens, hidden]."""
        out: Tensor = module(
            hidden_states=normed, position_embeddings=self.rotary, attention_mask=None, ctx=self.batch
        )[0]
        return out


def compute_layer(
    group: GroupPass, layer: Any, share: LayerShare, hidden: Tensor, own: Placed, node: Placed, lend: Callable[[], None]
) -> Tensor:
    """One decoder layer of a chunk of which a node's ranks split the weights in one stage or both.

    `hidden`: [1, own tokens, hidden], before and (returned) after. `lend`: attend with no token of one's own. Raises:
    GroupBroken."""
    normed = layer.input_layernorm(hidden)
    if group.scheme.attention == "megatron":
        attended = _attention(group, share, normed, node, lend)
    elif group.own_tokens:
        attended = own.attend(layer.self_attn, normed)
    else:
        lend()
        attended = normed
    hidden = hidden + attended
    normed = layer.post_attention_layernorm(hidden)
    return hidden + (_mlp(group, share, normed) if group.scheme.mlp == "megatron" else layer.mlp(normed))


def _attention(group: GroupPass, share: LayerShare, normed: Tensor, node: Placed, lend: Callable[[], None]) -> Tensor:
    """Of the own tokens, [1, own tokens, hidden]."""
    gathered = gather(group, normed)
    partial = None
    if not group.node_tokens:
        lend()
    elif share.attention is not None:
        partial = node.attend(share.attention, gathered)
    group.decide()
    return reduce_scatter(group, normed, partial, lambda rank: group.heads_of(rank).query_heads > 0)


def _mlp(group: GroupPass, share: LayerShare, normed: Tensor) -> Tensor:
    """Of the own tokens, [1, own tokens, hidden]."""
    gathered = gather(group, normed)
    return reduce_scatter(group, normed, share.mlp(gathered), lambda _: True)


def gather(group: GroupPass, own: Tensor) -> Tensor:
    """All tokens of the node, [1, node tokens, hidden], from [1, own tokens, hidden] of each rank."""
    if group.own_tokens or group.rank == 0:
        for rank in group.mates():
            group.send(rank, [own])
    hidden = own.shape[2]
    whole = own.new_empty(1, group.node_tokens, hidden)
    whole[:, group.in_node(group.rank)] = own
    for rank in group.mates():
        if group.part(rank) or rank == 0:
            whole[:, group.in_node(rank)] = group.receive(rank, [(1, group.part(rank), hidden)], own)[0]
    return whole


def reduce_scatter(group: GroupPass, like: Tensor, partial: Tensor | None, adds: Callable[[int], bool]) -> Tensor:
    """The sum over the node's ranks of `partial` [1, node tokens, hidden], for the own tokens, of the shape of `like`.
    `adds`: whether a rank of the node has a partial sum (its own is None if not)."""
    if partial is not None:
        for rank in group.mates():
            if group.part(rank):
                group.send(rank, [partial[:, group.in_node(rank)]])
    if not group.own_tokens:
        return like
    parts = [] if partial is None else [partial[:, group.in_node(group.rank)]]
    parts += [group.receive(rank, [like.shape], like)[0] for rank in group.mates() if adds(rank)]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
