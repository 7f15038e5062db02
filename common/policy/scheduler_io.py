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
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    PauseGroup,
    ResumeGroup,
)
from common.policy.core import TimePassed
from common.units import RequestId, WorkerId


class SaveRequest(Record, frozen=True, kw_only=True):
    """Write the record to the store. One per event and request: what it was in between, nobody asks."""

    record: RequestRecord


class ForgetRequest(Record, frozen=True, kw_only=True):
    """Delete the record of a request that ended."""

    request_id: RequestId


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
    | GroupPaused
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
    | PauseGroup
    | ResumeGroup
    | DissolveGroup
)
