"""What every record has in common."""

from __future__ import annotations

import msgspec

SCHEMA_VERSION = 1
"""Raised only when an old reader would misread a new message; new fields with defaults do not."""


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A typed, immutable value. Nested inside messages.

    The collector of cycles leaves it out: what is frozen and made of values has none, and stories keep it by the
    ten thousand. Each full walk over those would be a pause on somebody's way."""


class Message(Record, frozen=True, kw_only=True, tag=True):
    """A record that travels alone: an event or a command, tagged with its class name."""

    v: int = SCHEMA_VERSION
    """Schema version of the sender."""
    cause: str = ""
    """Id of the event that led to this message; `story()` follows it."""
    epoch: int = 0
    """Term of the scheduler that gave the order (0: not an order). Workers refuse older terms."""
