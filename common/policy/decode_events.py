"""The decode worker's two closed unions: what its core hears, what it orders.

Orders and answers to other processes are the messages themselves. The records here stay inside the
process: effects the shell performs, and the events in which each effect that can fail ends.
"""

from __future__ import annotations

from common.messages.base import Record
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.locations import KvLocation
from common.messages.prefill import DropRequest, KvReleased
from common.messages.requests import RequestSpec, TokenLogprob, TokensGenerated
from common.policy.core import TimePassed
from common.units import Attempt, RequestId, RouterId, Seconds, TokenId, Tokens, WorkerId


class DecodeWorkerConfig(Record, frozen=True, kw_only=True):
    """What an operator may set, and what the engine says of itself."""

    worker_id: WorkerId
    layers: int
    kv_capacity_tokens: Tokens
    rows_max: int
    expect_s: Seconds = 30.0
    """A reservation lapses when its KV has not begun to come, or not ended, for so long."""
    early_s: Seconds = 2.0
    """KV may be offered so much before the order that announces it."""
    crowded_itl_s: Seconds = 0.0
    """See `decode_pace.py`."""


# --- commands ------------------------------------------------------------------------------------


class ReserveKv(Record, frozen=True, kw_only=True):
    """Ends in `KvReserved` or `ReserveFailed`."""

    spec: RequestSpec


class AcceptOffer(Record, frozen=True, kw_only=True):
    """Let the sender begin. Ends in `KvArrived` or `KvBroken`; until then the transfer writes to this KV."""

    request_id: RequestId
    attempt: Attempt


class RefuseOffer(Record, frozen=True, kw_only=True):
    """Tell the sender not to begin."""

    request_id: RequestId
    attempt: Attempt
    reason: str


class StopReceiving(Record, frozen=True, kw_only=True):
    """Receive no more of an accepted transfer; it still ends in `KvBroken` (or `KvArrived`, if it was just done)."""

    request_id: RequestId
    attempt: Attempt


class ActivateRow(Record, frozen=True, kw_only=True):
    """The prompt's KV is complete and verified; the next step feeds the first token."""

    request_id: RequestId
    router_id: RouterId
    """The prefill worker has just sent it the first token."""
    first_token: TokenId


class RunStep(Record, frozen=True, kw_only=True):
    """One token for each of these. Ends in `StepFinished` or `StepFailed`; until then no other step is started."""

    request_ids: tuple[RequestId, ...]


class ReleaseKv(Record, frozen=True, kw_only=True):
    """Free it. Never sent while a step or a transfer touches it."""

    request_id: RequestId
    attempt: Attempt


class PlaceDecodeKv(Record, frozen=True, kw_only=True):
    """Write to the store where KV lies. Nothing waits for it."""

    location: KvLocation


class ForgetDecodeKv(Record, frozen=True, kw_only=True):
    request_id: RequestId


# --- events --------------------------------------------------------------------------------------


class KvReserved(Record, frozen=True, kw_only=True):
    request_id: RequestId
    attempt: Attempt


class ReserveFailed(Record, frozen=True, kw_only=True):
    """Nothing is reserved."""

    request_id: RequestId
    attempt: Attempt
    reason: str


class KvOffered(Record, frozen=True, kw_only=True):
    """A sender of the same model asks to send this sequence's KV. Answered by `AcceptOffer` or `RefuseOffer`."""

    request_id: RequestId
    attempt: Attempt
    tokens: Tokens


class KvArrived(Record, frozen=True, kw_only=True):
    """All of it is here and verified; the transfer touches it no more."""

    request_id: RequestId
    attempt: Attempt
    first_token: TokenId
    first_layer_received_s: Seconds
    last_layer_received_s: Seconds


class KvBroken(Record, frozen=True, kw_only=True):
    """An accepted transfer ended before that and touches the KV no more, or an offer was withdrawn."""

    request_id: RequestId
    attempt: Attempt
    reason: str


class DecodedToken(Record, frozen=True, kw_only=True):
    request_id: RequestId
    token_id: TokenId
    logprob: TokenLogprob | None = None


class StepFinished(Record, frozen=True, kw_only=True):
    sampled: tuple[DecodedToken, ...]
    """In the order of `RunStep.request_ids`."""
    core_wait_s: Seconds = 0.0
    """How long the step was ready to run and had no core."""


class StepFailed(Record, frozen=True, kw_only=True):
    """The rows of the step are in doubt."""

    reason: str


class StopRequested(Record, frozen=True, kw_only=True):
    """This process is to end: take nothing new, finish what is here."""


DecodeOrder = ExpectKv | DropRequest
"""What comes over the bus."""

DecodeLocalEvent = (
    KvReserved | ReserveFailed | KvOffered | KvArrived | KvBroken | StepFinished | StepFailed | StopRequested
)

DecodeEvent = DecodeOrder | DecodeLocalEvent | TimePassed

DecodeToScheduler = DecodeFinished | DecodeBusy | DecodeFailed | KvReleased

DecodeCommand = (
    ReserveKv
    | AcceptOffer
    | RefuseOffer
    | StopReceiving
    | ActivateRow
    | RunStep
    | ReleaseKv
    | PlaceDecodeKv
    | ForgetDecodeKv
    | TokensGenerated
    | DecodeToScheduler
)
