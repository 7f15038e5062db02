"""Long requests: scheduler ↔ SP coordinator ↔ prefill workers.

A long request is served by a *group* of prefill workers, its ranks, each holding a share of its KV. Rank 0 leads: it
alone decides which pass comes next and when to stop, and calls the others (the followers) over the group's own
connections. What is said here is what the scheduler and the coordinator need to know.
"""

from __future__ import annotations

from common.messages.base import Message, Record
from common.messages.groups import RING, GroupScheme
from common.messages.requests import FinishReason, RequestSpec
from common.units import Attempt, Bytes, RequestId, Seconds, Tokens, WorkerId

# --- scheduler → coordinator ---------------------------------------------------------------------


class FormGroup(Message, frozen=True, kw_only=True):
    """Form a group of these workers for this long request and start its prefill."""

    spec: RequestSpec
    members: tuple[WorkerId, ...]
    """In rank order."""
    addresses: tuple[str, ...] = ()
    """`WorkerProfile.group_address` of each, in rank order; of a group of one, nothing."""
    scheme: GroupScheme = RING
    why: str = ""
    """What the other schemes would take, in a sentence; of a group of one, nothing."""


class PauseGroup(Message, frozen=True, kw_only=True):
    """Stop the prefill at the same step on all ranks, keep its KV and its place."""

    request_id: RequestId
    attempt: Attempt


class ResumeGroup(Message, frozen=True, kw_only=True):
    """Continue the prefill at the very step where it stopped."""

    request_id: RequestId
    attempt: Attempt


class SpillGroup(Message, frozen=True, kw_only=True):
    """Move the KV of this paused group out of its places on all ranks, or on none; it stays paused and keeps its
    members. Answered by `GroupSpilled` or `GroupNotSpilled`."""

    request_id: RequestId
    attempt: Attempt


class RestoreGroup(Message, frozen=True, kw_only=True):
    """Bring its KV back: its room is reserved again on every member. Answered by `GroupPaused`: it stands as before."""

    request_id: RequestId
    attempt: Attempt


class DissolveGroup(Message, frozen=True, kw_only=True):
    """Drop the request wherever it stands and free its KV on every rank."""

    request_id: RequestId
    attempt: Attempt


class GrowGroup(Message, frozen=True, kw_only=True):
    """Take more workers into a group that prefills, at the end of a chunk. Answered by `GroupGrown`, whatever comes of
    it: a group that cannot, or that is paused or done sooner, goes on as it was."""

    request_id: RequestId
    attempt: Attempt
    growth: int
    """Which try of this group it is, from 1."""
    members: tuple[WorkerId, ...]
    """Of the larger group, in rank order; rank 0 stays rank 0."""
    addresses: tuple[str, ...]
    """As in `FormGroup`."""


class PartGroup(Message, frozen=True, kw_only=True):
    """Give back all workers but rank 0, which takes in their KV in its next chunk and goes on alone. Answered by
    `GroupParted`, at once by a group that cannot: it goes on as it was."""

    request_id: RequestId
    attempt: Attempt


# --- coordinator → scheduler ---------------------------------------------------------------------


class GroupFormed(Message, frozen=True, kw_only=True):
    """Every rank holds its segment and has room for its KV."""

    request_id: RequestId
    attempt: Attempt


class GroupPaused(Message, frozen=True, kw_only=True):
    """All ranks stand at `step`; the members are free for shorts."""

    request_id: RequestId
    attempt: Attempt
    step: int
    prefilled_tokens: Tokens
    pause_latency_s: Seconds
    """Worst over the ranks of `SegmentPaused.pause_latency_s`."""


class GroupResumed(Message, frozen=True, kw_only=True):
    """All ranks run again."""

    request_id: RequestId
    attempt: Attempt


class GroupGrown(Message, frozen=True, kw_only=True):
    """How a try to grow ended."""

    request_id: RequestId
    attempt: Attempt
    growth: int
    members: tuple[WorkerId, ...]
    """From here on, in rank order: all that were asked for, or those it had."""
    prefilled_tokens: Tokens = 0
    """Where the larger group took over."""
    reason: str = ""
    """Why it is as it was."""


class GroupParted(Message, frozen=True, kw_only=True):
    """Who prefills it from here on; nobody needs what others hold of it."""

    request_id: RequestId
    attempt: Attempt
    members: tuple[WorkerId, ...]
    prefilled_tokens: Tokens = 0
    """Where rank 0 went on alone."""


class GroupSpilled(Message, frozen=True, kw_only=True):
    """No rank keeps KV of it in its places any more."""

    request_id: RequestId
    attempt: Attempt


class GroupNotSpilled(Message, frozen=True, kw_only=True):
    """A rank could not; all have their KV in its places, and the group stands as before."""

    request_id: RequestId
    attempt: Attempt
    reason: str


class GroupPrefillFinished(Message, frozen=True, kw_only=True):
    """The first token is out; from here on the long decodes where its KV lies. A pause asked for
    meanwhile is void."""

    request_id: RequestId
    attempt: Attempt
    compute_s: Seconds
    finish_reason: FinishReason | None = None
    """Set when the first token was also the last."""
    members: tuple[WorkerId, ...] = ()
    """Who decodes it, in rank order: rank 0 alone where it has gathered all KV. Of those who are not named any more
    nobody needs the share. Nobody named (by an older coordinator): all members."""


class GroupFinished(Message, frozen=True, kw_only=True):
    """The last token is out and every rank has freed its KV."""

    request_id: RequestId
    attempt: Attempt
    finish_reason: FinishReason
    generated: Tokens


class GroupFailed(Message, frozen=True, kw_only=True):
    """The group ended without finishing: dissolved as asked, or a rank was lost, failed or stayed
    silent beyond its bound. The other ranks have been told to drop it."""

    request_id: RequestId
    attempt: Attempt
    reason: str
    retryable: bool = True


# --- coordinator → prefill worker ----------------------------------------------------------------


class SegmentPart(Record, frozen=True, kw_only=True):
    """A contiguous range [start, start + tokens) of the prompt."""

    start: Tokens
    tokens: Tokens


class LoadSegment(Message, frozen=True, kw_only=True):
    """Reserve KV for this rank's share and fetch the prompt. Answered by `SegmentLoaded` or `SegmentFailed`.
    The prefill starts with the first `RunSegment`."""

    worker_id: WorkerId
    spec: RequestSpec
    rank: int
    members: tuple[WorkerId, ...]
    parts: tuple[SegmentPart, ...]
    """What this rank must know of the prompt: all of it, since each chunk is dealt out over the ranks as it comes."""
    addresses: tuple[str, ...] = ()
    """Of all ranks, as in `FormGroup`."""
    scheme: GroupScheme = RING
    growth: int = 0
    """Above 0: a group that prefills takes this rank in; what it begins with, `RunSegment` says."""


class MeetRanks(Message, frozen=True, kw_only=True):
    """The group is to grow: meet all ranks of the larger one, while the prefill goes on. Answered by `RanksMet`.
    Whether it comes to that, `RunSegment` says."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    growth: int
    rank: int
    """In the larger group."""
    addresses: tuple[str, ...]
    """Of all its ranks."""


class RunSegment(Message, frozen=True, kw_only=True):
    """Start, or resume at the step where it stopped. Answered by `SegmentRunning`; no step is run twice. A follower
    answers when no short stands between it and what rank 0 may call it to.

    Of a group that has grown: with all ranks of the larger group from now on, if the rank does not do so yet."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    growth: int = 0
    """The last that succeeded; 0: it is as it was formed."""
    start: Tokens = 0
    """Tokens that were prefilled when it grew."""
    step: int = 0
    """Steps done by then."""
    kept: tuple[Tokens, ...] = ()
    """By rank: of how many of these tokens it keeps the KV."""


class PauseSegment(Message, frozen=True, kw_only=True):
    """Begin no further step. Answered by `SegmentPaused`, or by `SegmentPrefilled` if the prefill ended first.
    Idempotent."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    step: int | None = None
    """To a follower: where rank 0 stands, and with it, by the exchange of that step, everybody."""
    at_chunk_end: bool = False
    """To rank 0: not before the chunk that it is in is done."""


class PartSegment(Message, frozen=True, kw_only=True):
    """To rank 0: gather the KV of all with the next chunk, and go on alone. Answered by `SegmentParted`. Idempotent."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    growth: int
    """Which group that is about: as in `RunSegment`."""


class SpillSegment(Message, frozen=True, kw_only=True):
    """Move this paused share's KV out, to host memory or a file, and free its places. Answered by `SegmentSpilled` or
    `SegmentNotSpilled`. Idempotent."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


class RestoreSegment(Message, frozen=True, kw_only=True):
    """Reserve KV again and bring it back. Answered by `SegmentPaused`: it stands where it stood; or by `SegmentFailed`.
    Idempotent."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


class DropSegment(Message, frozen=True, kw_only=True):
    """Stop at once, free everything. Answered by `SegmentDropped`, also when nothing is held."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


# --- prefill worker → coordinator ----------------------------------------------------------------


class SegmentLoaded(Message, frozen=True, kw_only=True):
    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


class RanksMet(Message, frozen=True, kw_only=True):
    """This rank has met all others of the larger group, or has not."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    growth: int
    reason: str = ""
    """Why not; empty: it has."""


class SegmentRunning(Message, frozen=True, kw_only=True):
    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


class SegmentPaused(Message, frozen=True, kw_only=True):
    """Stopped with `step` steps done in all (a step is one layer of one chunk)."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    step: int
    prefilled_tokens: Tokens
    pause_latency_s: Seconds
    """From the receipt of the order, or from the moment a short began to wait here while the long ran if that was
    earlier, to the end of the step that was running (0 if none was)."""


class SegmentParted(Message, frozen=True, kw_only=True):
    """Rank 0 has all KV of its long, and prefills it alone."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    growth: int
    """Of the group that it has left."""
    prefilled_tokens: Tokens


class SegmentSpilled(Message, frozen=True, kw_only=True):
    """Its places are free."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    kv_bytes: Bytes
    """What was moved: of the tokens computed so far."""


class SegmentNotSpilled(Message, frozen=True, kw_only=True):
    """No room for it elsewhere; it stands where it stood, with its KV."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    reason: str


class SegmentPrefilled(Message, frozen=True, kw_only=True):
    """This rank's share is done; on rank 0, which samples, the first token is out. Decode begins: where rank 0 gathers
    all KV, on rank 0 alone, and the others wait to be told to drop theirs."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    steps: int
    compute_s: Seconds
    finish_reason: FinishReason | None = None


class SegmentFinished(Message, frozen=True, kw_only=True):
    """The last token is out and the KV is freed."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    finish_reason: FinishReason
    generated: Tokens


class SegmentFailed(Message, frozen=True, kw_only=True):
    """This rank cannot go on; its KV is freed."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    reason: str
    retryable: bool = True


class SegmentDropped(Message, frozen=True, kw_only=True):
    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
