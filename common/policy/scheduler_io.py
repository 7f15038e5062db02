"""The scheduler's two closed unions: what it hears, what it orders."""

from __future__ import annotations

from common.messages.base import Record
from common.messages.cluster import (
    CoordinatorHeartbeat,
    CoordinatorLeft,
    RouterHeartbeat,
    RouterLeft,
    WorkerHeartbeat,
    WorkerLeft,
)
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.prefill import (
    DropRequest,
    KvReleased,
    PrefillFailed,
    PrefillFinished,
    RunPrefill,
)
from common.messages.records import RequestRecord
from common.messages.requests import LengthClass
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupGrown,
    GroupNotSpilled,
    GroupParted,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GroupSpilled,
    GrowGroup,
    PartGroup,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.policy.core import TimePassed
from common.units import Attempt, RequestId, WorkerId


class SaveRequest(Record, frozen=True, kw_only=True):
    """Write the record to the store. One per event and request: what it was in between, nobody asks."""

    record: RequestRecord


PHASES_MAX = 4_096
"""Kept of one request: some two thousand pauses. Later ones count as part of the last."""


class RequestLife(Record, frozen=True, kw_only=True):
    """What there is to tell of a request that ended: for metrics and traces. Times are the scheduler's clock."""

    attempt: Attempt
    length_class: LengthClass
    how: str
    """finished, cancelled or failed."""
    traceparent: str
    arrived_s: float
    phases: tuple[tuple[str, float], ...]
    """States it came to after it was queued first (`RequestState`), and when."""
    ended_s: float
    first_step_s: float | None
    """Of a short: when its prefill worker began to compute it, by that worker's word; None: never, or it is a long."""
    workers: tuple[WorkerId, ...]
    """Of its last attempt: prefill worker and decode worker, or the members of its group in rank order."""
    scheme: str
    """Of a long that had a group: how its members shared it."""


class ForgetRequest(Record, frozen=True, kw_only=True):
    """A request ended: delete its record."""

    request_id: RequestId
    life: RequestLife


class EndBusRequest(Record, frozen=True, kw_only=True):
    """Tell a bus client whose router is lost that its request ended."""

    reply_inbox: str
    request_id: RequestId
    message: str


class WorkerKeptOut(Record, frozen=True, kw_only=True):
    """A worker reports that cannot work with the others; it gets nothing. Said once per start of it."""

    worker_id: WorkerId
    reason: str


SchedulerHeard = (
    RequestSubmitted
    | CancelRequested
    | RouterHeartbeat
    | RouterLeft
    | WorkerHeartbeat
    | WorkerLeft
    | PrefillFinished
    | PrefillFailed
    | KvReleased
    | DecodeFinished
    | DecodeBusy
    | DecodeFailed
    | CoordinatorHeartbeat
    | CoordinatorLeft
    | GroupFormed
    | GroupGrown
    | GroupParted
    | GroupPaused
    | GroupSpilled
    | GroupNotSpilled
    | GroupResumed
    | GroupPrefillFinished
    | GroupFinished
    | GroupFailed
)
"""What others tell it."""
SchedulerEvent = SchedulerHeard | TimePassed

SchedulerCommand = (
    SaveRequest
    | ForgetRequest
    | EndBusRequest
    | WorkerKeptOut
    | RequestAccepted
    | RequestRefused
    | RequestInterrupted
    | RequestFailed
    | RunPrefill
    | ExpectKv
    | DropRequest
    | FormGroup
    | GrowGroup
    | PartGroup
    | PauseGroup
    | ResumeGroup
    | SpillGroup
    | RestoreGroup
    | DissolveGroup
)
