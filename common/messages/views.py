"""What people ask of the scheduler, and what it answers: snapshots, no orders."""

from __future__ import annotations

from common.messages.base import Message, Record
from common.messages.cluster import WorkerProfile
from common.messages.requests import LengthClass
from common.units import Attempt, RequestId, RouterId, Seconds, Tokens, WorkerId


class DescribeCluster(Message, frozen=True, kw_only=True):
    """Answered by `ClusterView`."""


class TellStory(Message, frozen=True, kw_only=True):
    """What happened to a request, from the scheduler's bounded log. Answered by `StoryTold`."""

    request_id: RequestId


class RequestView(Record, frozen=True, kw_only=True):
    request_id: RequestId
    attempt: Attempt
    length_class: LengthClass
    state: str
    prompt_tokens: Tokens
    age_s: Seconds
    workers: tuple[WorkerId, ...] = ()


class WorkerView(Record, frozen=True, kw_only=True):
    profile: WorkerProfile
    requests: tuple[RequestId, ...]
    """Whatever holds KV or a place here."""
    queued_tokens: Tokens
    """Tokens of shorts sent to this worker and not yet prefilled."""
    kv_reserved_tokens: Tokens
    silent_s: Seconds
    """Since its last sign of life."""


class StrangerView(Record, frozen=True, kw_only=True):
    """A worker that reports and gets no work."""

    worker_id: WorkerId
    reason: str


class ClusterView(Message, frozen=True, kw_only=True):
    policy: str
    workers: tuple[WorkerView, ...]
    routers: tuple[RouterId, ...]
    coordinator_present: bool
    queued_shorts: int
    queued_longs: int
    queued_tokens: Tokens
    requests: tuple[RequestView, ...]
    """Running ones and the first hundred that wait."""
    counters: dict[str, int]
    """Since the scheduler started: pauses, finished, failed, cancelled, interrupted …"""
    decision_p50_s: Seconds = 0.0
    decision_p99_s: Seconds = 0.0
    strangers: tuple[StrangerView, ...] = ()


class StoryTold(Message, frozen=True, kw_only=True):
    request_id: RequestId
    lines: tuple[str, ...]
    """Oldest first; empty: unknown or forgotten."""


class QueryFailed(Message, frozen=True, kw_only=True):
    message: str
