"""The PecSched policy: shorts by the cascade of `placement.py`, longs first come first served, pauses
within the bounds of `preemption.py`.

Shorts are considered before longs, and both before resuming: a pause that is running takes in what
waits (in-flight credit keeps the replicas' token totals balanced, since each short goes to the one with
the fewest queued tokens), and it ends when the replica's queue has run dry or its bound is reached.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.policy.cluster import Cluster, Request, SchedulerConfig
from common.policy.costs import decode_slot_tokens
from common.policy.decisions import Decision, PauseLong, PlaceLong, PlaceShort, ResumeLong
from common.policy.lifecycle import RequestState
from common.policy.placement import NoPlace, bounds_of, decoder_for, place_short, replica_for_long
from common.policy.queues import RequestQueue
from common.policy.timers import Timers
from common.units import RequestId, WorkerId


class PecSchedPolicy:
    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._bounds = bounds_of(config)
        self._shorts = RequestQueue()
        self._longs = RequestQueue()
        self._touched: dict[RequestId, Request] = {}
        """Longs whose pause may have to begin or end."""
        self._timers: Timers[RequestId] = Timers()
        self._retry_s: float | None = None
        """When the head of the shorts may pause somebody."""

    # --- what happened ---------------------------------------------------------------------------

    def admit(self, request: Request, cluster: Cluster) -> None:
        (self._longs if request.is_long else self._shorts).push(request)

    def forget(self, request: Request) -> None:
        (self._longs if request.is_long else self._shorts).discard(request)

    def worker_added(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """Every decision looks at the cluster itself."""

    def worker_lost(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """Nothing here is bound to a worker."""

    def decoder_eased(self) -> None:
        """Every decision looks at the cluster itself."""

    def replica_eased(self, worker_id: WorkerId, cluster: Cluster) -> None:
        replica = cluster.replicas.get(worker_id)
        if replica is not None and replica.long is not None:
            self._touched[replica.long] = cluster.requests[replica.long]

    def long_changed(self, request: Request) -> None:
        self._touched[request.request_id] = request

    # --- decisions -------------------------------------------------------------------------------

    def decide(self, cluster: Cluster, now_s: float) -> Decision | None:
        for request_id in self._timers.due(now_s):
            if request_id in cluster.requests:
                self._touched[request_id] = cluster.requests[request_id]
        return self._next_short(cluster, now_s) or self._next_long(cluster) or self._next_pause_change(cluster, now_s)

    def _next_short(self, cluster: Cluster, now_s: float) -> Decision | None:
        self._retry_s = None
        request = self._shorts.head()
        if request is None:
            return None
        decoder = decoder_for(cluster, decode_slot_tokens(request.spec.kv_tokens))
        if decoder is None:
            return None
        place = place_short(cluster, self._config, request, now_s)
        if isinstance(place, NoPlace):
            self._retry_s = place.retry_s
            return None
        pause = place.replica.long if place.rule == "pause" else None
        return PlaceShort(request, place.replica.worker_id, decoder.worker_id, place.rule, pause)

    def _next_long(self, cluster: Cluster) -> Decision | None:
        request = self._longs.head()
        if request is None:
            return None
        replica = replica_for_long(cluster, request.spec.kv_tokens)
        return PlaceLong(request, (replica.worker_id,)) if replica else None

    def _next_pause_change(self, cluster: Cluster, now_s: float) -> Decision | None:
        while self._touched:
            _, request = self._touched.popitem()
            if cluster.requests.get(request.request_id) is not request or request.pauses is None:
                continue
            if request.state is RequestState.PAUSED:
                if self._pause_is_over(cluster, request, now_s):
                    return ResumeLong(request)
            elif request.state is RequestState.RUNNING and self._strands(cluster, request, now_s):
                return PauseLong(request)
        return None

    def _pause_is_over(self, cluster: Cluster, request: Request, now_s: float) -> bool:
        if all(cluster.replicas[w].queued_tokens == 0 for w in request.members):
            return True
        assert request.pauses is not None
        left_s = request.pauses.pause_left_s(now_s, self._bounds)
        if left_s <= 0.0:
            return True
        self._timers.at(now_s + left_s, request.request_id)
        return False

    def _strands(self, cluster: Cluster, request: Request, now_s: float) -> bool:
        """Shorts left behind by a pause that reached its bound are served by the next one it owes."""
        assert request.pauses is not None
        if request.pauses.count == 0 or all(cluster.replicas[w].queued_tokens == 0 for w in request.members):
            return False
        pausable_s = request.pauses.pausable_from_s(now_s, 0.0, self._bounds)
        if pausable_s is None:
            return False
        if pausable_s <= now_s:
            return True
        self._timers.at(pausable_s, request.request_id)
        return False

    def next_deadline_s(self) -> float | None:
        timer_s = self._timers.next_s()
        if self._retry_s is None or timer_s is None:
            return timer_s if self._retry_s is None else self._retry_s
        return min(timer_s, self._retry_s)

    # --- for people ------------------------------------------------------------------------------

    def waiting(self, count: int) -> Iterator[Request]:
        yield from self._shorts.first(count)
        yield from self._longs.first(max(0, count - len(self._shorts)))

    def waiting_shorts(self) -> int:
        return len(self._shorts)

    def waiting_longs(self) -> int:
        return len(self._longs)

    def waiting_tokens(self) -> int:
        return self._shorts.tokens + self._longs.tokens
