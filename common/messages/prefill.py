"""Between scheduler and prefill workers, about short requests. Long ones: `sp.py`."""

from __future__ import annotations

from common.messages.base import Message
from common.messages.requests import FinishReason, RequestSpec
from common.units import Attempt, RequestId, Seconds, Tokens, WorkerId


class RunPrefill(Message, frozen=True, kw_only=True):
    """Scheduler → prefill worker: append this short prefill to the local queue, and stream its KV to
    the decode worker named here, layer by layer, while the next layer computes."""

    worker_id: WorkerId
    spec: RequestSpec
    decode_worker_id: WorkerId
    """The same as `worker_id`: decode where it prefills (no disaggregation)."""
    decode_address: str
    exclusive: bool = False
    """Share no step with a long that decodes here: it waits (no colocation)."""


class DropRequest(Message, frozen=True, kw_only=True):
    """Scheduler → any worker: stop this attempt (or any older one) wherever it stands and free its KV.
    Answered by `KvReleased`, also when nothing is held."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


class PrefillFinished(Message, frozen=True, kw_only=True):
    """Prefill worker → scheduler: the first token is out (already sent to the router)."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    compute_s: Seconds
    last_layer_computed_s: Seconds
    """Host's monotonic clock when the last layer's KV was computed; compare with
    `DecodeFinished.first_layer_received_s` on the same host."""
    waited_s: Seconds = 0.0
    """From receipt of the order to the start of the first pass with tokens of it: the worker's part of the queueing
    delay."""
    in_worker_s: Seconds = 0.0
    """From receipt of the order to this word: queueing, opening the KV, computing, waking threads. (To the
    resolution of the loop's clock, about a millisecond.)"""
    finish_reason: FinishReason | None = None
    """Set when the first token was also the last: there is no handoff."""


class PrefillFailed(Message, frozen=True, kw_only=True):
    """Prefill worker → scheduler: this attempt ended here without its tokens; its KV here is freed.
    `retryable` is False only if the request itself is at fault."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    reason: str
    retryable: bool = True
    suspect_worker_id: WorkerId | None = None
    """A decode worker that does not answer: nothing more should go there until it gives a sign of life."""


class KvReleased(Message, frozen=True, kw_only=True):
    """Any worker → scheduler: nothing of this request is held here any more (handed over or dropped; or its first token
    was also its last). From the prefill worker of a request that runs it says that the decode worker has the KV,
    whole and verified."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    kv_tokens: Tokens = 0
    """What was freed."""
