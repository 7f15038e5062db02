"""What the ranks of a group say to each other beside their tensors. It travels on the group's own connections."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from common.messages.base import Record
from common.units import Tokens

RANKS_MAX = 64
"""Of one group."""

Stage = Literal["ulysses", "megatron"]
"""What the ranks of a node do with the weights of a stage, attention or MLP. Ulysses: each has all of them, for its own
tokens. Megatron: each has a share of them (heads, columns), for all tokens of the node."""


class GroupScheme(Record, frozen=True, kw_only=True):
    """How the ranks of a group share one forward pass: a ring between nodes, heads split inside a node.

    Nodes are rows of ranks: rank = node * per_node + place."""

    per_node: Annotated[int, Meta(ge=1, le=RANKS_MAX)] = 1
    """Ranks that stand in one node. 1: a ring alone; the group's size: no ring. Must divide the size."""
    attention: Stage = "ulysses"
    """Means nothing where `per_node` is 1, as does `mlp`."""
    mlp: Stage = "ulysses"
    gathers: bool = False
    """Rank 0 has room for the KV of all. It takes that in when the prompt is done, or sooner if it is told to, and goes
    on alone; the others are free. Of a ring alone."""

    def name(self, size: int) -> str:
        """For people: "ring 2", "ulysses 3", "ring 2 x megatron/ulysses 2" (attention first)."""
        nodes = size // self.per_node
        inside = self.attention if self.attention == self.mlp else f"{self.attention}/{self.mlp}"
        ring = [f"ring {nodes}"] if nodes > 1 or self.per_node == 1 else []
        return " x ".join([*ring, *([f"{inside} {self.per_node}"] if self.per_node > 1 else [])])


RING = GroupScheme()
"""Between all ranks: what a group does if nobody asks for more."""
GATHERED_RING = GroupScheme(gathers=True)


class Announcement(Record, frozen=True, kw_only=True):
    """Rank 0 → each other rank: a pass has begun that needs you.

    The pass takes the tokens [start, start + tokens) of the group's sequence, shared among the ranks, from its step
    `step` on (above 0: it was stopped there, and goes on)."""

    pass_no: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    """Counted by rank 0, from 1; a pass that goes on has a new one."""
    kind: Literal["chunk", "row"]
    """A part of the prompt, or the one token last drawn."""
    start: Tokens
    tokens: Tokens
    step: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    gathers: bool = False
    """A chunk: when it is done rank 0 has the KV of all, and the others are needed no more."""
