"""Attention of the one token last drawn over KV that lies with all ranks.

Rank 0 has put the token through the layer's projections. Every rank gets the queries of its heads, attends over its
node's keys, and returns the outcome with its log-sum-exp; rank 0 merges, for each place, what comes from all nodes. One
node in turn keeps the token's own KV, each place for its heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.attention import attend_share, merge_attention
from services.engine.attention_kernels import attend
from services.engine.kv_cache import SequenceKv

if TYPE_CHECKING:
    from services.engine.sequence_parallel import GroupPass


def ask(
    group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """Rank 0. See `GroupPass.attend`; the token is the only one."""
    for rank in group.others():
        heads = group.heads_of(rank)
        asked = [query[:, slice(*heads.query)]]
        if group.kept(group.mesh.node(rank)):
            asked += [key[:, slice(*heads.kv)], value[:, slice(*heads.kv)]]
        group.send(rank, asked)
    mine = group.heads
    if group.kept(0):
        kv.write(layer, group.past(0), key[0, slice(*mine.kv)], value[0, slice(*mine.kv)])
    own = attend_share(mine, attend, query[:, slice(*mine.query)], *kv.read(layer, 0, _seen(group, 0)), scaling)
    out = query.new_empty(query.shape)
    for place in range(group.mesh.per_node):
        heads = group.heads_of(place)
        if heads.query_heads:
            out[:, slice(*heads.query)] = _collect(group, place, own, query[:, slice(*heads.query)])
    return out


def _collect(group: GroupPass, place: int, own: tuple[Tensor, Tensor], query: Tensor) -> Tensor:
    """Merge what the ranks of one place found; of rank 0's place it is there."""
    merged = own if place == 0 else None
    for node in range(group.mesh.nodes):
        rank = group.mesh.rank(node, place)
        if rank and _seen(group, node):
            out, lse = group.receive(rank, [query.shape], query, lse=query.shape[:3])
            merged = (out, lse) if merged is None else merge_attention(*merged, out, lse)
    assert merged is not None  # node 0 keeps the first token
    return merged[0]


def lend(
    group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> None:
    """A follower: attention of rank 0's token over the keys here. `query`, `key`, `value` have no tokens; they say what
    their kind is like. Raises: GroupBroken."""
    heads, head_dim = group.heads, query.shape[3]
    keeps = group.kept(group.node)
    shapes = [(1, heads.query_heads, 1, head_dim)] + [(1, heads.kv_heads, 1, head_dim)] * (2 * keeps)
    theirs, *new = group.receive(0, shapes, query)
    if keeps:
        kv.write(layer, group.past(group.node), new[0][0], new[1][0])
    seen = _seen(group, group.node)
    if seen and heads.query_heads:
        group.send(0, attend_share(heads, attend, theirs, *kv.read(layer, 0, seen), scaling))


def _seen(group: GroupPass, node: int) -> int:
    """Keys that the node has, the token's own included."""
    return group.past(node) + group.kept(node)
