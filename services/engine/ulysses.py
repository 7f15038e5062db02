"""Attention where heads are split (DeepSpeed Ulysses): in a node every rank attends on its heads for all tokens.

Around attention the ranks of a node swap what they hold, from all heads of their tokens to all tokens of their heads
and back; in between each attends as if it were alone in the node. Heads need not divide by the number of ranks
(`head_shares`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.kv_cache import SequenceKv
from services.engine.ring import ring_attention

if TYPE_CHECKING:
    from services.engine.sequence_parallel import GroupPass


def ulysses_attention(
    group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """See `GroupPass.attend`."""
    mine, head_dim = group.heads, query.shape[3]
    if group.own_tokens or group.rank == 0:
        for rank in group.mates():
            theirs = group.heads_of(rank)
            wanted = [query[:, slice(*theirs.query)], key[:, slice(*theirs.kv)], value[:, slice(*theirs.kv)]]
            group.send(rank, wanted)
    past = group.past(group.node)
    queries = query.new_empty(1, mine.query_heads, group.node_tokens, head_dim)
    own = group.in_node(group.rank)
    queries[:, :, own] = query[:, slice(*mine.query)]
    kv.write(layer, past + own.start, key[0, slice(*mine.kv)], value[0, slice(*mine.kv)])
    for rank in group.mates():
        tokens, theirs_in_node = group.part(rank), group.in_node(rank)
        if tokens or rank == 0:
            shape = (1, mine.kv_heads, tokens, head_dim)
            came = group.receive(rank, [(1, mine.query_heads, tokens, head_dim), shape, shape], query)
            queries[:, :, theirs_in_node] = came[0]
            kv.write(layer, past + theirs_in_node.start, came[1][0], came[2][0])
    attended = ring_attention(group, kv, layer, queries, scaling)
    if mine.query_heads:
        group.decide()
        for rank in group.mates():
            if group.part(rank):
                group.send(rank, [attended[:, :, group.in_node(rank)]])
    out = query.new_empty(1, query.shape[1], group.own_tokens, head_dim)
    out[:, slice(*mine.query)] = attended[:, :, own]
    for rank in group.mates():
        theirs = group.heads_of(rank)
        if group.own_tokens and theirs.query_heads:
            shape = (1, theirs.query_heads, group.own_tokens, head_dim)
            out[:, slice(*theirs.query)] = group.receive(rank, [shape], query)[0]
    return out
