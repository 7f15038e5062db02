"""Attention where heads are split (DeepSpeed Ulysses): every rank keeps the KV of its heads for all tokens.

Around attention the ranks swap what they hold, from all heads of their tokens to all tokens of their heads and back;
in between each attends as a single worker would. Heads need not divide by the number of ranks (`head_shares`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.attention import attend_at_end
from services.engine.kv_cache import SequenceKv

if TYPE_CHECKING:
    from services.engine.sequence_parallel import GroupPass


def ulysses_attention(
    group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """See `GroupPass.attend`."""
    heads, bounds, head_dim = group.shared.heads, group.bounds, query.shape[3]
    mine = heads[group.rank]
    if group.own_tokens or group.rank == 0:
        for rank in group.others():
            theirs = heads[rank]
            wanted = [query[:, slice(*theirs.query)], key[:, slice(*theirs.kv)], value[:, slice(*theirs.kv)]]
            group.send(rank, wanted)
    queries = query.new_empty(1, mine.query_heads, group.tokens, head_dim)
    own = slice(bounds[group.rank], bounds[group.rank + 1])
    queries[:, :, own] = query[:, slice(*mine.query)]
    kv.write(layer, group.own_start, key[0, slice(*mine.kv)], value[0, slice(*mine.kv)])
    for rank in group.others():
        tokens = group.part(rank)
        if tokens or rank == 0:
            shape = (1, mine.kv_heads, tokens, head_dim)
            came = group.receive(rank, [(1, mine.query_heads, tokens, head_dim), shape, shape], query)
            queries[:, :, bounds[rank] : bounds[rank + 1]] = came[0]
            kv.write(layer, group.start + bounds[rank], came[1][0], came[2][0])
    out = query.new_empty(1, query.shape[1], group.own_tokens, head_dim)
    if mine.query_heads:
        attended = attend_at_end(queries, *kv.read(layer, 0, group.end), scaling)[0]
        out[:, slice(*mine.query)] = attended[:, :, own]
        group.decide()
        for rank in group.others():
            if group.part(rank):
                group.send(rank, [attended[:, :, bounds[rank] : bounds[rank + 1]]])
    for rank in group.others():
        theirs = heads[rank]
        if group.own_tokens and theirs.query_heads:
            shape = (1, theirs.query_heads, group.own_tokens, head_dim)
            out[:, slice(*theirs.query)] = group.receive(rank, [shape], query)[0]
    return out
