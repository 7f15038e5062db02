"""Attention where tokens are split: every node keeps the KV of its own tokens, and queries travel round the nodes.

A rank attends for its node's tokens, on the heads of its place; the ranks of the same place in the other nodes, its
peers, do so on the same heads. Each sends its queries to all its peers, computes everybody's attention over its
own keys, and returns it with its log-sum-exp; who asked merges what comes back (`merge_attention`). Queries travel
rather than keys because from the second chunk on there is a past: what is sent grows with the prompt, not with its
square.

A node's part of a chunk lies, in time, between the parts of lower and higher nodes: its keys of this chunk are all
seen by the queries of higher nodes, none by those of lower ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.attention import attend_at_end, attend_share, merge_attention
from services.engine.attention_kernels import attend
from services.engine.kv_cache import SequenceKv

if TYPE_CHECKING:
    from services.engine.sequence_parallel import GroupPass


def ring_attention(group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, scaling: float) -> Tensor:
    """Attention of the node's tokens to the whole sequence so far. Their own keys and values are in `kv`.

    `query` and result: [1, query heads of the place, tokens of the node, head_dim]. Raises: StepRecalled,
    GroupBroken."""
    if not group.heads.query_heads:
        return query  # none is left for this place, here and in every other node
    query = query.contiguous()
    if group.node_tokens or group.rank == 0:
        for rank in group.peers():
            group.send(rank, [query])
    group.maybe_recall()
    keys, values = kv.read(layer, 0, group.past(group.node) + group.kept(group.node))
    own = attend_share(group.heads, attend_at_end, query, keys, values, scaling) if group.node_tokens else None
    for rank in group.peers():
        _serve(group, rank, query, keys, values, scaling)
    return query if own is None else _collect(group, *own)


def _serve(group: GroupPass, rank: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
    """Attention of another node's part of the chunk over the keys here that come before it."""
    node = group.mesh.node(rank)
    tokens = group.tokens_of(node)
    if not tokens and rank > 0:
        return
    (theirs,) = group.receive(rank, [(1, query.shape[1], tokens, query.shape[3])], query)
    seen = _seen(group, group.node, node)
    group.maybe_recall()
    if tokens and seen:
        partial = attend_share(group.heads, attend, theirs, keys[:, :, :seen], values[:, :, :seen], scaling)
        group.decide()
        group.send(rank, partial)


def _collect(group: GroupPass, out: Tensor, lse: Tensor) -> Tensor:
    """The node's tokens' attention over all nodes' keys, from that over its own."""
    for rank in group.peers():
        if _seen(group, group.mesh.node(rank), group.node):
            out, lse = merge_attention(out, lse, *group.receive(rank, [out.shape], out, lse=lse.shape))
    return out


def _seen(group: GroupPass, holder: int, asker: int) -> int:
    """How many of the holder's keys, from its first, come before the asker's tokens of this chunk (both are nodes)."""
    return group.past(holder) + (group.kept(holder) if holder < asker else 0)
