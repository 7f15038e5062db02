"""Between scheduler and decode workers."""

from __future__ import annotations

from common.messages.base import Message
from common.messages.requests import FinishReason, RequestSpec
from common.units import Attempt, RequestId, Seconds, Tokens, WorkerId


class ExpectKv(Message, frozen=True, kw_only=True):
    """Scheduler → decode worker: reserve KV for this request; its prefill will send it here. The
    reservation lapses if no KV arrives within the worker's lease time of the sender's last sign of life."""

    worker_id: WorkerId
    spec: RequestSpec
    prefill_worker_id: WorkerId


class DecodeFinished(Message, frozen=True, kw_only=True):
    """Decode worker → scheduler: the last token is out (already sent to the router), and nothing of the request is held
    here any more."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    finish_reason: FinishReason
    generated: Tokens
    kv_tokens: Tokens = 0
    """What was freed."""
    first_layer_received_s: Seconds = 0.0
    """Host's monotonic clock; 0 where the KV did not travel."""
    last_layer_received_s: Seconds = 0.0
    """The whole KV was here and verified (length, layers, checksum)."""


class DecodeBusy(Message, frozen=True, kw_only=True):
    """Decode worker → scheduler: no room for this request; nothing is held for it. Name another worker or wait."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt


class DecodeFailed(Message, frozen=True, kw_only=True):
    """Decode worker → scheduler: this attempt ended here (KV lost, corrupt or late); its KV here is freed."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    reason: str
