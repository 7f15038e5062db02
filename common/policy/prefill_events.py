"""The prefill worker's two closed unions: what its core hears, what it orders.

Orders and answers to other processes are the messages themselves. The records here stay inside the
process: effects the shell performs, and the events in which each effect that can fail ends.
"""

from __future__ import annotations

from common.messages.base import Record
from common.messages.cluster import LayerShape, StepCost
from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.groups import Announcement, GroupScheme
from common.messages.locations import KvLocation, MovedTo
from common.messages.prefill import (
    DropRequest,
    KvReleased,
    PrefillFailed,
    PrefillFinished,
    RunPrefill,
)
from common.messages.requests import RequestSpec, TokenLogprob, TokensGenerated
from common.messages.sp import (
    DropSegment,
    LoadSegment,
    MeetRanks,
    PartSegment,
    PauseSegment,
    RanksMet,
    RestoreSegment,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentNotSpilled,
    SegmentParted,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
    SegmentSpilled,
    SpillSegment,
)
from common.policy.core import TimePassed
from common.units import Attempt, Bytes, RequestId, Seconds, TokenId, Tokens, WorkerId


class PrefillWorkerConfig(Record, frozen=True, kw_only=True):
    """What an operator may set, and what the engine says of itself."""

    worker_id: WorkerId
    layers: int
    step_cost: StepCost
    layer: LayerShape | None = None
    chunk_tokens: int = 512
    """Tokens of a long prompt per pass, at most."""
    step_s_max: float = 0.030
    """A step (one layer of one chunk) is sized to stay below."""
    batch_tokens_max: int = 512
    """Tokens of shorts prefilled in one pass."""
    colocated_tokens_max: int = 192
    """Tokens of shorts that share a pass with decoding longs, at most."""
    long_itl_s_max: float = 0.25
    """Fewer share it where a decoding long's next token would come later than this."""
    rows_max: int = 64
    """Segments in one pass."""
    requests_max: int = 4_096
    """Requests in hand at once; more are refused."""


# --- commands ------------------------------------------------------------------------------------


class HandoffTarget(Record, frozen=True, kw_only=True):
    """Where a short's KV goes while it is computed."""

    worker_id: WorkerId
    address: str
    """host:port of its data plane."""


class SequenceShare(Record, frozen=True, kw_only=True):
    """One worker's part in a group that computes a sequence."""

    rank: int
    scheme: GroupScheme
    addresses: tuple[str, ...]
    """Of all ranks, in their order."""
    growth: int = 0
    """As in `LoadSegment`."""


class OpenSequence(Record, frozen=True, kw_only=True):
    """Fetch the prompt and reserve KV. Ends in `SequenceOpened` or `OpenFailed`. With a target, the stream to it
    begins with the first layer computed; with a share, the other ranks of the group are met first."""

    spec: RequestSpec
    handoff: HandoffTarget | None
    share: SequenceShare | None = None


class CloseSequence(Record, frozen=True, kw_only=True):
    """Free the sequence's KV. Never sent while a pass or a stream touches it."""

    request_id: RequestId
    attempt: Attempt


class PassSegment(Record, frozen=True, kw_only=True):
    """The tokens [start, start + tokens) of one sequence, as part of a pass."""

    request_id: RequestId
    start: Tokens
    tokens: Tokens
    sample: bool
    """Draw a token from the logits of the last position."""
    gathers: bool = False
    """Of a group's chunk: when it is done, rank 0 has the KV of all."""


class RunPass(Record, frozen=True, kw_only=True):
    """Ends in `PassFinished`, `PassStopped` or `PassFailed`; until then no other pass is started."""

    pass_id: int
    segments: tuple[PassSegment, ...]
    background: bool = False
    """A chunk of a long prefill and nothing else: on a shared processor it yields to shorter work."""


class ResumePass(Record, frozen=True, kw_only=True):
    """Continue the stopped pass that contains this sequence. Ends as `RunPass` does."""

    pass_id: int
    request_id: RequestId


class StopPass(Record, frozen=True, kw_only=True):
    """Let the pass end after the step it is in."""

    pass_id: int


class BreakShare(Record, frozen=True, kw_only=True):
    """Wait for the other ranks of this shared sequence no more: its running pass ends in `PassFailed`, here and on the
    others; if it is being opened, that ends at once, in `OpenFailed` if it had not come about."""

    request_id: RequestId
    attempt: Attempt


class MeetOthers(Record, frozen=True, kw_only=True):
    """Meet the ranks of the larger group that may take over this long, beside the group that computes it now. Ends in
    `OthersMet`, unless the sequence is closed or another such order comes first."""

    request_id: RequestId
    attempt: Attempt
    growth: int
    rank: int
    addresses: tuple[str, ...]


class EnterGroup(Record, frozen=True, kw_only=True):
    """Compute this sequence with the ranks met for this growth, from the token `start` on. No pass of it is begun."""

    request_id: RequestId
    attempt: Attempt
    growth: int
    rank: int
    size: int
    start: Tokens
    kept: tuple[Tokens, ...]
    """By rank: how many tokens before have their KV there."""
    scheme: GroupScheme


class FinishHandoff(Record, frozen=True, kw_only=True):
    """Send the rest and the trailer; ends in `HandoffFinished` or `HandoffFailed`."""

    request_id: RequestId
    attempt: Attempt
    first_token: TokenId
    first_logprob: TokenLogprob | None


class AbortHandoff(Record, frozen=True, kw_only=True):
    """End the stream, if one was begun. Ends in `HandoffFailed` (or `HandoffFinished`, if it was just done)."""

    request_id: RequestId
    attempt: Attempt


class SpillKv(Record, frozen=True, kw_only=True):
    """Move the KV of a sequence that stands still out of its places, and free these. Ends in `KvSpilled` or
    `SpillFailed`."""

    request_id: RequestId
    attempt: Attempt


class RestoreKv(Record, frozen=True, kw_only=True):
    """Reserve KV again and bring back what was moved out. Ends in `KvRestored` or `RestoreFailed`."""

    request_id: RequestId
    attempt: Attempt


class StopMove(Record, frozen=True, kw_only=True):
    """Of no use any more: what moves its KV, out or back, ends soon, well or badly."""

    request_id: RequestId
    attempt: Attempt


class PlaceKv(Record, frozen=True, kw_only=True):
    """Write to the store where KV lies. Nothing waits for it."""

    location: KvLocation


class ForgetKv(Record, frozen=True, kw_only=True):
    request_id: RequestId


# --- events --------------------------------------------------------------------------------------


class SequenceOpened(Record, frozen=True, kw_only=True):
    """The prompt is here and KV is reserved."""

    request_id: RequestId
    attempt: Attempt


class OpenFailed(Record, frozen=True, kw_only=True):
    """Nothing is held of the sequence."""

    request_id: RequestId
    attempt: Attempt
    reason: str
    retryable: bool = True


class OthersMet(Record, frozen=True, kw_only=True):
    """All ranks of the larger group have met, or have not."""

    request_id: RequestId
    attempt: Attempt
    growth: int
    reason: str = ""
    """Why not; empty: they have."""


class GroupCalled(Record, frozen=True, kw_only=True):
    """Rank 0 of a group has begun a pass that needs this worker."""

    request_id: RequestId
    attempt: Attempt
    announcement: Announcement


class GroupLost(Record, frozen=True, kw_only=True):
    """A rank of a group is gone, seen while no pass of the group ran here."""

    request_id: RequestId
    attempt: Attempt
    reason: str


class BrokeOff(Record, frozen=True, kw_only=True):
    """The group of a shared sequence broke in a pass that had others in it too, and that went on without it. Told
    before the pass's own end."""

    pass_id: int
    request_id: RequestId
    reason: str


class SampledToken(Record, frozen=True, kw_only=True):
    request_id: RequestId
    token_id: TokenId
    logprob: TokenLogprob | None = None


class PassFinished(Record, frozen=True, kw_only=True):
    pass_id: int
    sampled: tuple[SampledToken, ...]
    """In segment order."""
    compute_s: Seconds
    """Since the pass was last started or resumed."""
    last_layer_computed_s: Seconds


class PassStopped(Record, frozen=True, kw_only=True):
    """Between two steps, with `steps_done` of the pass's own steps done since its start."""

    pass_id: int
    steps_done: int
    compute_s: Seconds


class PassFailed(Record, frozen=True, kw_only=True):
    """The sequences in it are in doubt; nothing of it runs any more."""

    pass_id: int
    reason: str


class HandoffFinished(Record, frozen=True, kw_only=True):
    """The receiver has verified everything; no view of the KV is touched any more."""

    request_id: RequestId
    attempt: Attempt


class HandoffFailed(Record, frozen=True, kw_only=True):
    """The stream ended before that (or never began); no view of the KV is touched any more."""

    request_id: RequestId
    attempt: Attempt
    reason: str
    peer_lost: bool = False
    """Not this stream failed but its receiver: nobody answers there."""


class KvSpilled(Record, frozen=True, kw_only=True):
    """Its places are free; so many bytes lie elsewhere."""

    request_id: RequestId
    attempt: Attempt
    kv_bytes: Bytes
    moved_to: MovedTo


class SpillFailed(Record, frozen=True, kw_only=True):
    """Its KV is where it was."""

    request_id: RequestId
    attempt: Attempt
    reason: str


class KvRestored(Record, frozen=True, kw_only=True):
    """Its KV is where it was before, and nothing of it elsewhere."""

    request_id: RequestId
    attempt: Attempt


class RestoreFailed(Record, frozen=True, kw_only=True):
    """Its KV is lost, or not all there."""

    request_id: RequestId
    attempt: Attempt
    reason: str


KvMoved = KvSpilled | SpillFailed | KvRestored | RestoreFailed

PrefillOrder = (
    RunPrefill
    | DropRequest
    | LoadSegment
    | MeetRanks
    | RunSegment
    | PauseSegment
    | PartSegment
    | SpillSegment
    | RestoreSegment
    | DropSegment
)
"""What comes over the bus."""

PrefillLocalEvent = (
    SequenceOpened
    | OpenFailed
    | OthersMet
    | GroupCalled
    | GroupLost
    | BrokeOff
    | PassFinished
    | PassStopped
    | PassFailed
    | HandoffFinished
    | HandoffFailed
    | KvMoved
)

PrefillEvent = PrefillOrder | PrefillLocalEvent | TimePassed

ToScheduler = PrefillFinished | PrefillFailed | DecodeFinished | DecodeFailed | KvReleased
"""The words of decoding are about shorts that decode where they prefilled."""
ToCoordinator = (
    SegmentLoaded
    | RanksMet
    | SegmentRunning
    | SegmentPaused
    | SegmentParted
    | SegmentSpilled
    | SegmentNotSpilled
    | SegmentPrefilled
    | SegmentFinished
    | SegmentFailed
    | SegmentDropped
)

PrefillCommand = (
    OpenSequence
    | CloseSequence
    | RunPass
    | ResumePass
    | StopPass
    | BreakShare
    | MeetOthers
    | EnterGroup
    | FinishHandoff
    | AbortHandoff
    | SpillKv
    | RestoreKv
    | StopMove
    | PlaceKv
    | ForgetKv
    | TokensGenerated
    | ToScheduler
    | ToCoordinator
)
