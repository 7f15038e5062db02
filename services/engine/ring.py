"""Attention where tokens are split: every rank keeps the KV of its own tokens, and queries travel.

Each rank sends its queries to all, computes everybody's attention over its own keys, and returns it with its
log-sum-exp; who asked merges what comes back (`merge_attention`). Queries travel rather than keys because from the
second chunk on there is a past: what is sent grows with the prompt, not with its square.

A rank's own part of a chunk lies, in time, between the parts of lower and higher ranks:
its keys of this chunk are all seen by the queries of higher ranks, none by those of lower ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.attention import attend_at_end, merge_attention
from services.engine.attention_kernels import attend
from services.engine.kv_cache import SequenceKv

if TYPE_CHECKING:
    from services.engine.sequence_parallel import GroupPass


def ring_attention(
    group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """See `GroupPass.attend`."""
    if group.is_row and group.rank > 0:
        _lend(group, kv, layer, query, key, value, scaling)
        return query
    query = query.contiguous()
    for rank in group.others():
        if group.is_row and group.kept(rank):
            group.send(rank, [query, key, value])
        elif group.own_tokens or group.rank == 0:
            group.send(rank, [query])
    if group.kept(group.rank):
        kv.write(layer, group.past(group.rank), key[0], value[0])
    keys, values = kv.read(layer, 0, group.past(group.rank) + group.kept(group.rank))
    own = _attend_own(group, query, keys, values, scaling) if group.own_tokens else None
    if not group.is_row:
        for rank in group.others():
            _serve(group, rank, query, keys, values, scaling)
    return query if own is None else _collect(group, *own)


def _attend_own(group: GroupPass, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    if group.is_row:
        return attend(query, keys, values, scaling)
    return attend_at_end(query, keys, values, scaling)


def _serve(group: GroupPass, rank: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> None:
    """Attention of another rank's part of the chunk over the keys here that come before it."""
    tokens = group.part(rank)
    if not tokens and rank > 0:
        return
    (theirs,) = group.receive(rank, [(1, query.shape[1], tokens, query.shape[3])], query)
    seen = _seen(group, group.rank, rank)
    if tokens and seen:
        partial = attend(theirs, keys[:, :, :seen], values[:, :, :seen], scaling)
        group.decide()
        group.send(rank, partial)


def _lend(
    group: GroupPass, kv: SequenceKv, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> None:
    """A follower's part in decoding: attention of rank 0's one token over the keys here. `query`, `key`, `value` say
    by their shapes, of no tokens, what comes."""
    shapes = [(1, query.shape[1], 1, query.shape[3])]
    keeps = group.kept(group.rank)
    if keeps:
        shapes += [(1, key.shape[1], 1, key.shape[3])] * 2
    theirs, *new = group.receive(0, shapes, query)
    if keeps:
        kv.write(layer, group.past(group.rank), new[0][0], new[1][0])
    seen = _seen(group, group.rank, 0)
    if seen:
        group.send(0, attend(theirs, *kv.read(layer, 0, seen), scaling))


def _collect(group: GroupPass, out: Tensor, lse: Tensor) -> Tensor:
    """The own tokens' attention over all ranks' keys, from that over the own."""
    for rank in group.others():
        if _seen(group, rank, group.rank):
            out, lse = merge_attention(out, lse, *group.receive(rank, [out.shape], out, lse=lse.shape))
    return out


def _seen(group: GroupPass, holder: int, asker: int) -> int:
    """How many of the holder's keys, from its first, come before the asker's tokens of this pass."""
    new = group.kept(holder) if group.is_row or holder < asker else 0
    return group.past(holder) + new
