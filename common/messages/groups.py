"""What the ranks of a group say to each other beside their tensors. It travels on the group's own connections."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from common.messages.base import Record
from common.units import Tokens

SequenceScheme = Literal["ring", "ulysses"]
"""What is split among the ranks of a group in attention: the keys' tokens, or the heads."""


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
