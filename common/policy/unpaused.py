"""What the policies that never pause anybody share (the paper's baselines): who waits, and what a short needs.

Their shorts are served as PecSched's are: prefilled on one worker and decoded on another (unless disaggregation is
switched off), sharing the steps of a long that decodes there. So a comparison measures scheduling alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.policy.cluster import Cluster, Replica, Request
from common.policy.placement import decoder_for
from common.policy.queues import RequestQueue
from common.policy.scheduler_config import SchedulerConfig
from common.units import WorkerId


class UnpausedPolicy:
    """The global queue, shorts and longs apart, each in order of arrival. Everything O(1) or O(log n)."""

    def __init__(self) -> None:
        self._shorts = RequestQueue()
        self._longs = RequestQueue()

    def _enter(self, request: Request) -> None:
        (self._longs if request.is_long else self._shorts).push(request)

    def _leave(self, request: Request) -> None:
        (self._longs if request.is_long else self._shorts).discard(request)

    def next_deadline_s(self) -> float | None:
        """See `SchedulingPolicy`. None: without pauses nothing comes due by itself."""
        return None

    def waiting(self, count: int) -> Iterator[Request]:
        """See `SchedulingPolicy`. Shorts before longs."""
        yield from self._shorts.first(count)
        yield from self._longs.first(max(0, count - len(self._shorts)))

    def waiting_shorts(self) -> int:
        """See `SchedulingPolicy`."""
        return len(self._shorts)

    def waiting_longs(self) -> int:
        """See `SchedulingPolicy`."""
        return len(self._longs)

    def waiting_tokens(self) -> int:
        """See `SchedulingPolicy`."""
        return self._shorts.tokens + self._longs.tokens


def kv_of_short(config: SchedulerConfig, request: Request) -> int:
    """Tokens of KV it needs where it prefills."""
    return request.tokens if config.disaggregation else request.spec.kv_tokens


def could_hold(replica: Replica, config: SchedulerConfig, request: Request) -> bool:
    """Whether a short fits there when nothing else is there."""
    profile = replica.profile
    return kv_of_short(config, request) <= profile.kv_capacity_tokens and request.tokens <= profile.context_tokens


def has_batch_room(replica: Replica, config: SchedulerConfig, tokens: int) -> bool:
    """In-flight credit: a replica gets no more shorts at once than it can take in a few passes."""
    return replica.queued_tokens == 0 or replica.queued_tokens + tokens <= config.batch_tokens_max


def decode_home(cluster: Cluster, config: SchedulerConfig, request: Request, replica: WorkerId) -> WorkerId | None:
    """Where a short that prefills on `replica` decodes; None: no decode worker has room."""
    if not config.disaggregation:
        return replica
    decoder = decoder_for(cluster, request.slot_tokens)
    return decoder.worker_id if decoder else None


def decodes_nowhere(cluster: Cluster, config: SchedulerConfig, request: Request) -> bool:
    """Its KV is larger than any decode worker that is there: the others need not wait for it."""
    return config.disaggregation and request.slot_tokens > cluster.kv_max("decode")
