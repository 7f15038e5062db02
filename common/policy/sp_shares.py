"""Which rank of a group computes which tokens of a prompt, and who keeps the KV of which.

A chunk is split contiguously over the owners, in their order, into parts whose sizes differ by at most one; what does
not divide goes to the owners that have the fewest tokens so far, the lowest first. By induction they then own as
many tokens as if these had been dealt out one by one, owner 0 first: of the first n tokens owner r has
ceil((n - r) / degree), however they were cut into chunks. So nothing need be agreed on: a position says all.

The owners are the nodes of a `Mesh`. In a node the places deal out their node's tokens among each other in the same
way to compute them, and keep the KV of all of these, each for its heads. A ring alone is a mesh of nodes with one
place each, where every rank owns; Ulysses or Megatron alone is a mesh of one node, which owns everything.

A group that grows deals out what comes after by the same rule, as if its sequence began there; what was dealt out
before stays with those who own it, and is remembered as a number of tokens by node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from common.messages.cluster import LayerShape
from common.messages.groups import GroupScheme


def owned_tokens(tokens: int, degree: int, rank: int) -> int:
    """How many of the first `tokens` tokens of a sequence this rank owns."""
    return (tokens - rank + degree - 1) // degree


def chunk_bounds(start: int, tokens: int, degree: int) -> tuple[int, ...]:
    """Where the parts of the chunk [start, start + tokens) begin and end: rank r computes its tokens
    [bounds[r], bounds[r + 1]), counted from the chunk's first. `degree` + 1 offsets; a part may be empty."""
    parts = (owned_tokens(start + tokens, degree, rank) - owned_tokens(start, degree, rank) for rank in range(degree))
    return tuple(accumulate(parts, initial=0))


def append_rank(position: int, degree: int) -> int:
    """Who keeps the KV of the token decoded at this position: of those that own the fewest, the lowest."""
    return position % degree


def reserved_tokens(kv_tokens: int, degree: int) -> int:
    """What each rank reserves for a sequence that needs `kv_tokens` in all: what the ranks own at the most."""
    return owned_tokens(kv_tokens, degree, 0)


def misfit(scheme: GroupScheme, size: int) -> str:
    """Why a group of this size cannot compute so; empty: it can."""
    if scheme.per_node < 1 or size % scheme.per_node:
        return f"{size} ranks are no whole number of nodes of {scheme.per_node}: per_node must divide the group's size"
    if scheme.gathers and scheme.per_node > 1:
        return "only a ring gathers its KV on rank 0: where heads are split, per_node above 1, each rank decodes"
    return ""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of a group as nodes of as many places each: rank = node * per_node + place."""

    nodes: int
    per_node: int
    base: int = 0
    """Tokens that were dealt out before the group grew to this size."""
    before: tuple[int, ...] = ()
    """How many of these each node owns; empty: it has not grown."""

    @classmethod
    def of(cls, scheme: GroupScheme, size: int) -> Mesh:
        """Of a scheme that fits the size (see `misfit`)."""
        return cls(size // scheme.per_node, scheme.per_node)

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def node(self, rank: int) -> int:
        return rank // self.per_node

    def place(self, rank: int) -> int:
        return rank % self.per_node

    def rank(self, node: int, place: int) -> int:
        return node * self.per_node + place

    def bounds(self, start: int, tokens: int) -> tuple[int, ...]:
        """Where the parts that the ranks compute of the chunk [start, start + tokens) begin and end: offsets as of
        `chunk_bounds`. Parts differ by at most one token, and those of a node lie one after another."""
        offsets, start = [0], start - self.base
        for node, (begin, end) in enumerate(pairwise(chunk_bounds(start, tokens, self.nodes))):
            before = owned_tokens(start, self.nodes, node)
            offsets += [begin + offset for offset in chunk_bounds(before, end - begin, self.per_node)[1:]]
        return tuple(offsets)

    def owned_tokens(self, tokens: int, node: int) -> int:
        """How many of the first `tokens` tokens, `base` or more, this node owns."""
        return (self.before[node] if self.before else 0) + owned_tokens(tokens - self.base, self.nodes, node)

    def append_node(self, position: int) -> int:
        """Which node keeps the KV of the token decoded at this position."""
        return append_rank(position - self.base, self.nodes)

    def fits(self, kv_tokens: int, reserved: Sequence[int]) -> bool:
        """Whether each rank, of a ring, has set aside enough for a sequence that needs `kv_tokens` in all. (One that
        did so when the group was smaller lacks a token where next to nothing is left.)"""
        return kv_tokens >= self.base and all(
            self.owned_tokens(kv_tokens, rank) <= tokens for rank, tokens in enumerate(reserved)
        )

    def grown(self, start: int, former: Sequence[int | None]) -> Mesh:
        """This mesh, a ring, from token `start` on with as many ranks as `former` names: which rank each of them was,
        or None."""
        before = tuple(0 if rank is None else self.owned_tokens(start, rank) for rank in former)
        return Mesh(len(former), self.per_node, start, before)

    def reserved_tokens(self, kv_tokens: int) -> int:
        """For how many tokens each rank reserves KV (in its heads) of a sequence that needs `kv_tokens` in all."""
        return reserved_tokens(kv_tokens, self.nodes)


class Shares:
    """The ranks' shares of one sequence as it grows, for whoever follows it from its first token."""

    def __init__(self, degree: int) -> None:
        self.owned = [0] * degree
        """Tokens by rank."""

    def __repr__(self) -> str:
        return f"Shares({self.owned})"

    def take(self, tokens: int) -> tuple[int, ...]:
        """Split the next chunk; returns `chunk_bounds` of it."""
        bounds = chunk_bounds(sum(self.owned), tokens, len(self.owned))
        for rank in range(len(self.owned)):
            self.owned[rank] += bounds[rank + 1] - bounds[rank]
        return bounds

    def append(self) -> int:
        """Take in one decoded token; returns the rank that keeps its KV."""
        rank = append_rank(sum(self.owned), len(self.owned))
        self.owned[rank] += 1
        return rank


Range = tuple[int, int]
"""[begin, end)."""


class HeadRun(NamedTuple):
    """Neighbouring heads of a share of which as many query heads attend to each KV head: what a kernel takes at a time.
    Counted from the share's first of each kind."""

    query: Range
    kv: Range


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The attention heads of one place of a node."""

    query: Range
    kv: Range
    """All that its query heads attend to; a neighbour may hold a copy of the first or the last."""
    runs: tuple[HeadRun, ...]

    @property
    def kv_heads(self) -> int:
        return self.kv[1] - self.kv[0]

    @property
    def query_heads(self) -> int:
        return self.query[1] - self.query[0]

    def reserved_tokens(self, kv_tokens: int, kv_heads: int) -> int:
        """KV of `kv_tokens` tokens in these heads only, as tokens in all of the model's `kv_heads`."""
        return -(-kv_tokens * self.kv_heads // kv_heads)


@lru_cache(maxsize=256)
def head_shares(query_heads: int, kv_heads: int, degree: int) -> tuple[HeadShare, ...]:
    """Deal the query heads out over `degree` places as evenly as they go, and with them the KV heads they attend to:
    one that several places need is on each of them. A place for which no query head is left (never the first) has
    nothing to do."""
    group = query_heads // kv_heads
    shares = []
    for place in range(degree):
        query = begin, end = part_of(query_heads, degree, place)
        kv = (begin // group, (end - 1) // group + 1) if begin < end else (0, 0)
        shares.append(HeadShare(query, kv, _runs(query, kv, group)))
    return tuple(shares)


def kv_of_rank(scheme: GroupScheme, size: int, rank: int, kv_tokens: int, layer: LayerShape | None) -> int:
    """What this rank sets aside for a sequence that needs KV for `kv_tokens` in all, as tokens in all heads: on the
    worker, and in the scheduler's books. `layer` None: the heads are not known, and all of them counted."""
    if scheme.gathers and rank == 0:
        return kv_tokens
    mesh = Mesh.of(scheme, size)
    tokens = mesh.reserved_tokens(kv_tokens)
    if mesh.per_node == 1 or layer is None:
        return tokens
    shares = head_shares(layer.query_heads, layer.kv_heads, mesh.per_node)
    return shares[mesh.place(rank)].reserved_tokens(tokens, layer.kv_heads)


def _runs(query: Range, kv: Range, group: int) -> tuple[HeadRun, ...]:
    counts = [min(query[1], (head + 1) * group) - max(query[0], head * group) for head in range(*kv)]
    runs, at, kv_at = [], 0, 0
    for count, heads in ((count, len(list(same))) for count, same in groupby(counts)):
        runs.append(HeadRun((at, at + count * heads), (kv_at, kv_at + heads)))
        at, kv_at = at + count * heads, kv_at + heads
    return tuple(runs)


def part_of(things: int, parts: int, number: int) -> Range:
    """[begin, end) of part `number` of so many things, dealt out in parts as equal as can be, the larger ones first."""
    size, larger = divmod(things, parts)
    begin = number * size + min(number, larger)
    return begin, begin + size + (number < larger)
