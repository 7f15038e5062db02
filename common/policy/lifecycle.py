"""The life of a request in the scheduler, as a table.

A short is queued, prefilled on one worker, handed over, and decoded on another. A long is queued, its
group is formed, prefills (and is paused and resumed), and decodes where its KV lies. Either can be
interrupted by a loss, upon which its router submits it again, and either can end in every state.

`ended` is not a state of this table: a request that ends is taken off the books at once; KV it still
holds somewhere stays accounted to that worker until the worker says that it is free.
"""

from __future__ import annotations

from enum import StrEnum

from common.policy.transitions import Table


class RequestState(StrEnum):
    """Where a request stands."""

    QUEUED = "queued"
    # shorts
    PREFILLING = "prefilling"
    """Sent to a prefill worker (in its local queue or running)."""
    HANDOFF = "handoff"
    """First token out; the KV is on its way."""
    DECODING = "decoding"
    # longs
    FORMING = "forming"
    RUNNING = "running"
    """The group prefills."""
    PAUSING = "pausing"
    PAUSED = "paused"
    SPILLING = "spilling"
    """Paused, and its KV is being moved out of its replicas (`spill.py`)."""
    SPILLED = "spilled"
    RESTORING = "restoring"
    """Its KV is being brought back; then it is paused again."""
    RESUMING = "resuming"
    # both
    INTERRUPTED = "interrupted"
    """Lost where it ran; its router is asked to submit it again."""


S = RequestState

SHORT_TRANSITIONS: Table[RequestState] = {
    S.QUEUED: frozenset({S.PREFILLING}),
    S.PREFILLING: frozenset({S.HANDOFF, S.DECODING, S.INTERRUPTED}),
    S.HANDOFF: frozenset({S.DECODING, S.INTERRUPTED}),
    S.DECODING: frozenset({S.INTERRUPTED}),
    S.INTERRUPTED: frozenset({S.QUEUED}),
}
"""PREFILLING → DECODING: it decodes where it prefilled, or the word of its first token was lost."""

HANDING_OVER = frozenset({S.PREFILLING, S.HANDOFF})
"""States in which a short's prefill worker may say that it was handed over."""

LONG_TRANSITIONS: Table[RequestState] = {
    S.QUEUED: frozenset({S.FORMING}),
    S.FORMING: frozenset({S.RUNNING, S.DECODING, S.INTERRUPTED}),
    S.RUNNING: frozenset({S.PAUSING, S.DECODING, S.INTERRUPTED}),
    S.PAUSING: frozenset({S.PAUSED, S.DECODING, S.INTERRUPTED}),
    S.PAUSED: frozenset({S.RESUMING, S.SPILLING, S.INTERRUPTED}),
    S.SPILLING: frozenset({S.SPILLED, S.PAUSED, S.INTERRUPTED}),
    S.SPILLED: frozenset({S.RESTORING, S.INTERRUPTED}),
    S.RESTORING: frozenset({S.PAUSED, S.INTERRUPTED}),
    S.RESUMING: frozenset({S.RUNNING, S.DECODING, S.INTERRUPTED}),
    S.DECODING: frozenset({S.INTERRUPTED}),
    S.INTERRUPTED: frozenset({S.QUEUED}),
}
"""FORMING, PAUSING and RESUMING → DECODING: the prefill ended before an order was heard, or a word was lost.
SPILLING → PAUSED: a member had no room for it elsewhere."""

IN_GROUP = frozenset(LONG_TRANSITIONS.keys() - {S.QUEUED, S.INTERRUPTED})
"""States in which a long has a group."""

PREFILLING_LONG = IN_GROUP - {S.DECODING}
"""States in which a long holds the prefill place of its replicas."""

MOVED_LONG = frozenset({S.SPILLING, S.SPILLED, S.RESTORING})
"""States of a pause in which its KV is, or may be, elsewhere."""

STANDING_LONG = frozenset({S.PAUSING, S.PAUSED, S.SPILLING, S.SPILLED})
"""States in which shorts on its replicas need no new pause. (While its KV comes back it gets no more of them.)"""


def table_of(*, long: bool) -> Table[RequestState]:
    return LONG_TRANSITIONS if long else SHORT_TRANSITIONS
