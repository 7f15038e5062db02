"""Between router and scheduler."""

from __future__ import annotations

from typing import Literal

from common.messages.base import Message
from common.messages.requests import LengthClass, RequestSpec
from common.units import Attempt, RequestId, RouterId, Seconds

RefusalCode = Literal["too_long", "duplicate_id", "queue_full", "no_workers", "not_found"]


class RequestSubmitted(Message, frozen=True, kw_only=True):
    """Router → scheduler. Idempotent per (request_id, attempt): a router that hears no answer sends it
    again. A higher attempt of a known request supersedes the running one and goes to the queue's head."""

    spec: RequestSpec


class CancelRequested(Message, frozen=True, kw_only=True):
    """Router → scheduler: nobody waits for this request any more. Legal in every state."""

    request_id: RequestId
    router_id: RouterId


class RequestAccepted(Message, frozen=True, kw_only=True):
    """Scheduler → router: queued, with room for its whole KV in the cluster."""

    request_id: RequestId
    attempt: Attempt
    router_id: RouterId
    length_class: LengthClass = "short"
    """By the scheduler's threshold; the router's metrics are by class."""


class RequestRefused(Message, frozen=True, kw_only=True):
    """Scheduler → router: not accepted; nothing is kept of it."""

    request_id: RequestId
    attempt: Attempt
    router_id: RouterId
    code: RefusalCode
    message: str
    """One sentence for the client: what is wrong and what to do."""
    retry_after_s: Seconds | None = None


class RequestInterrupted(Message, frozen=True, kw_only=True):
    """Scheduler → router: this attempt is lost (or unknown here). The router resubmits the request with
    attempt + 1 and the tokens delivered so far at the prompt's end, or cancels it. It keeps its place."""

    request_id: RequestId
    attempt: Attempt
    router_id: RouterId
    reason: str


class RequestFailed(Message, frozen=True, kw_only=True):
    """Scheduler → router: given up; the last word on this request."""

    request_id: RequestId
    attempt: Attempt
    router_id: RouterId
    message: str
    """One sentence for the client."""
    retryable: bool = False
    """True: the client may try again later (503); False: it would fail again (500)."""
