"""The PecSched policy: shorts by the cascade of `placement.py`, longs by remaining work and age, pauses
within the bounds of `preemption.py`.

Shorts are considered before longs, and both before resuming: a pause that is running takes in what
waits (in-flight credit keeps the replicas' token totals balanced, since each short goes to the one with
the fewest queued tokens), and it ends when the replica's queue has run dry or its bound is reached.

Beyond the paper:

- The work of a long is known from its length, so the shortest goes first (SRPT, the least mean time) and age
  counts against work: the rank is `work - aging * waited`. All ranks fall alike as time passes, so the order of any
  two longs never changes while they wait, and each is first after a bounded time.
- Shorts go by deadline where clients give one.
- A long that prefills takes in replicas that nobody wants (`elastic.py`), and gives back what others would make more of
  (`parting.py`).
- Longs leave some replicas to shorts, `shorts_spare` times as many as these have kept busy lately, where that costs
  less than pausing: a short that pauses a group of d stops d replicas to use one. What a burst needs beyond, it
  gets by pausing. Small groups are cheap to pause, and take every place. One long runs in any case; where shorts
  leave it nothing, on as few replicas as hold its KV.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from common.policy.cluster import Cluster, Request
from common.policy.costs import shorts_s
from common.policy.decisions import Decision, PauseLong, PlaceLong, PlaceShort, RestoreLong, ResumeLong
from common.policy.elastic import Elastic
from common.policy.lifecycle import RequestState
from common.policy.long_planner import LongPlanner
from common.policy.parting import Parting
from common.policy.placement import NoPlace, bounds_of, decoder_for, group_for_long, kv_share, place_short
from common.policy.queues import RequestQueue, by_arrival
from common.policy.scheduler_config import SchedulerConfig
from common.policy.spill import comes_back_in_s, room_by_spilling, spills
from common.policy.timers import Timers
from common.units import RequestId, WorkerId

NO_DEADLINE_S = 10.0
"""A short without a deadline is due this long after its arrival: it yields to those that are due sooner, and is never
passed over for longer."""
NODES_MAX = 8
"""Of the largest groups that are thought of."""
DRAIN_AFTER_S = 5.0
"""A long whose turn it has been for this long, with places free of other longs, waits no more until shorts leave enough
of them idle at once, which under a steady load may be never: it takes the least busy ones, and starts when their
shorts are done."""
TRY_AGAIN_S = 0.5
"""A long that found no room looks again when there is more of it, or after this time: shorts may bring less load."""
TRY_EVERY_S = 0.005
"""But no sooner after it last looked: in a large cluster there is more room, or less, at every event."""
LOAD_WINDOW_S = 30.0
"""Over which the load of shorts is averaged, or over what has passed since the first of them, if that is less."""
LOAD_SETTLES_S = 1.0
"""Passed before the first of them, as it were: one short alone is no load yet."""
SILENCE_S = 150.0
"""After so long without a short, the next one is the first again."""


class PecSchedPolicy:
    def __init__(self, config: SchedulerConfig, planner: LongPlanner) -> None:
        self._config = config
        self._planner = planner
        self._bounds = bounds_of(config)
        self._spills = spills(config)
        self._shorts = RequestQueue(_due_s)
        self._longs = RequestQueue(self._rank_of_long if config.long_order == "remaining" else by_arrival)
        self._load = ShortLoad()
        self._tried: tuple[RequestId, int] | None = None
        """The long that found no room, and when by the cluster's count of changes."""
        self._tried_s = -math.inf
        self._blocked: tuple[RequestId, float] | None = None
        """The long whose turn it is and that only shorts keep from starting, and since when."""
        self._wake_for_long_s: float | None = None
        self._wished: tuple[tuple[RequestId, int] | None, int] = (None, 0)
        """Over how many replicas the first of the longs would be spread in an empty cluster of so many."""
        self._touched: dict[RequestId, Request] = {}
        """Longs whose pause may have to begin or end."""
        self._timers: Timers[RequestId] = Timers()
        self._elastic = Elastic(config, planner) if config.elastic and config.group_max > 1 else None
        self._parting = None if self._elastic is None or not config.group_gathers else Parting(planner)
        self._retry_s: float | None = None
        """When the head of the shorts may pause somebody."""

    # --- what happened ---------------------------------------------------------------------------

    def admit(self, request: Request, cluster: Cluster) -> None:
        if request.is_long:
            self._longs.push(request)
            self._wish(cluster, request)  # now, on its own account: a short's event may be what makes room for it
            return
        self._shorts.push(request)
        replica = next(iter(cluster.replicas.values()), None)
        if replica is not None:
            work_s = shorts_s(replica.profile.step_cost, request.tokens, self._config.batch_tokens_max)
            self._load.came(work_s, request.state_since_s)

    def _rank_of_long(self, request: Request) -> float:
        """`work - aging * (now - arrived)`, less what all have in common."""
        if request.order < 0:
            return -math.inf  # it ran before this scheduler did
        return self._planner.prefill_s(request.tokens, (1,)) + self._config.long_aging * request.arrived_s

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
        if self._elastic is not None:
            self._elastic.long_changed(request)

    # --- decisions -------------------------------------------------------------------------------

    def decide(self, cluster: Cluster, now_s: float) -> Decision | None:
        due_s = self._timers.next_s()
        if due_s is not None and due_s <= now_s:
            for request_id in self._timers.due(now_s):
                if request_id in cluster.requests:
                    self._touched[request_id] = cluster.requests[request_id]
        self._retry_s = None
        short = self._shorts.head
        return (
            (self._next_short(cluster, short, now_s) if short is not None else None)
            or self._next_long(cluster, now_s)
            or (self._next_pause_change(cluster, now_s) if self._touched else None)
            or (self._next_growth(cluster, now_s) if self._elastic is not None else None)
            or (self._next_parting(cluster, now_s) if self._parting is not None else None)
        )

    def _next_short(self, cluster: Cluster, request: Request, now_s: float) -> Decision | None:
        decoder = decoder_for(cluster, request.slot_tokens)
        if decoder is None and self._config.disaggregation:
            return None
        place = place_short(cluster, self._config, self._bounds, request, now_s)
        if isinstance(place, NoPlace):
            self._retry_s = place.retry_s
            return self._make_room(cluster, request, now_s) if self._spills else None
        pause = place.replica.long if place.rule == "pause" else None
        home = place.replica if decoder is None or not self._config.disaggregation else decoder
        return PlaceShort(request, place.replica.worker_id, home.worker_id, place.rule, pause)

    def _make_room(self, cluster: Cluster, request: Request, now_s: float) -> Decision | None:
        """The last resort."""
        found = room_by_spilling(cluster, self._bounds, request, now_s)
        if not isinstance(found, NoPlace):
            return found
        retries_s = [at_s for at_s in (self._retry_s, found.retry_s) if at_s is not None]
        self._retry_s = min(retries_s, default=None)
        return None

    def _next_long(self, cluster: Cluster, now_s: float) -> Decision | None:
        request = self._longs.head
        if request is None:
            self._wake_for_long_s = None
            return None
        tried = (request.request_id, cluster.room_changes)
        if self._tried is not None and tried[0] == self._tried[0]:
            again_s = self._tried_s + (TRY_AGAIN_S if tried == self._tried else TRY_EVERY_S)
            if now_s < again_s:
                self._wake_for_long_s = again_s if cluster.seats else None
                return None
        members = self._group_for(cluster, request, now_s)
        if members:
            self._tried = None
            return PlaceLong(request, members)
        self._tried, self._tried_s = tried, now_s
        self._wake_for_long_s = now_s + TRY_AGAIN_S if cluster.seats else None
        return None

    def _group_for(self, cluster: Cluster, request: Request, now_s: float) -> tuple[WorkerId, ...]:
        everywhere = cluster.seats
        if not everywhere or not cluster.can_form_groups:
            return ()
        seats = everywhere - self._spare(cluster, request, now_s)
        if not cluster.groups:  # one must run; many replicas for it would all stop at every short
            seats = max(seats, min(everywhere, _fewest(cluster, request)))
        members = group_for_long(cluster, self._config, self._planner, request, seats)
        if members or request.spec.kv_tokens > seats * cluster.kv_max("prefill"):
            self._blocked = None
        elif self._blocked is None or self._blocked[0] != request.request_id:
            self._blocked = request.request_id, now_s
        elif now_s - self._blocked[1] >= DRAIN_AFTER_S:
            tries = (seats,) if cluster.groups else (seats, everywhere)  # KV of others may leave too little in few
            found = (group_for_long(cluster, self._config, self._planner, request, n, drain=True) for n in tries)
            return next(filter(None, found), ())
        return members

    def _spare(self, cluster: Cluster, request: Request, now_s: float) -> int:
        """How many replicas this long leaves to shorts."""
        if self._config.shorts_spare <= 0.0 or self._config.group_max == 1:
            return 0
        busy = self._load.replicas(now_s)
        spare = math.ceil(self._config.shorts_spare * busy)
        key = (request.request_id, len(cluster.replicas))
        if self._wished[0] != key:
            self._wished = key, self._wish(cluster, request)
        degree, everywhere = min(self._wished[1], self._config.group_max), len(cluster.replicas)
        idle = min(spare, everywhere - _fewest(cluster, request)) - busy  # less one long's: that runs in any case
        return spare if _stopped(busy, degree, everywhere) - busy > idle else 0

    def _wish(self, cluster: Cluster, request: Request) -> int:
        """Over how many replicas it would be spread, had it the cluster to itself."""
        by_node, kv_tokens = cluster.replicas_by_node(NODES_MAX), cluster.kv_max("prefill")
        return self._planner.degree(request.tokens, request.spec.kv_tokens, by_node, kv_tokens)

    def _next_pause_change(self, cluster: Cluster, now_s: float) -> Decision | None:
        while self._touched:
            _, request = self._touched.popitem()
            if cluster.requests.get(request.request_id) is not request or request.pauses is None:
                continue
            if request.state is RequestState.PAUSED:
                if self._pause_is_over(cluster, request, now_s):
                    return ResumeLong(request)
            elif request.state is RequestState.SPILLED:
                if self._comes_back(cluster, request, now_s):
                    return RestoreLong(request)
            elif request.state is RequestState.RUNNING and self._strands(cluster, request, now_s):
                return PauseLong(request)
        return None

    def _pause_is_over(self, cluster: Cluster, request: Request, now_s: float) -> bool:
        if not any(cluster.replicas[w].has_shorts for w in request.workers):
            return True
        assert request.pauses is not None
        left_s = request.pauses.pause_left_s(now_s, self._bounds)
        if left_s <= 0.0:
            return True
        self._timers.at(now_s + left_s, request.request_id)
        return False

    def _comes_back(self, cluster: Cluster, request: Request, now_s: float) -> bool:
        wait_s = comes_back_in_s(cluster, self._bounds, request, now_s)
        if wait_s:
            self._timers.at(now_s + wait_s, request.request_id)
        return wait_s == 0.0

    def _strands(self, cluster: Cluster, request: Request, now_s: float) -> bool:
        """Shorts left behind by a pause that reached its bound are served by the next one it owes."""
        assert request.pauses is not None
        if request.pauses.count == 0 or all(cluster.replicas[w].queued_tokens == 0 for w in request.workers):
            return False
        pausable_s = request.pauses.pausable_from_s(now_s, 0.0, self._bounds)
        if pausable_s is None:
            return False
        if pausable_s <= now_s:
            return True
        self._timers.at(pausable_s, request.request_id)
        return False

    def _next_growth(self, cluster: Cluster, now_s: float) -> Decision | None:
        assert self._elastic is not None
        if self._shorts.head is not None or self._longs.head is not None:
            self._elastic.nobody_grows()
            return None
        spare = math.ceil(self._config.shorts_spare * self._load.replicas(now_s)) if len(cluster.vacant) else 0
        return self._elastic.decide(cluster, spare, now_s)

    def _next_parting(self, cluster: Cluster, now_s: float) -> Decision | None:
        assert self._parting is not None
        if not self._parting.is_due(cluster, now_s):
            return None
        waiting = self._longs.head
        spare = 0 if waiting is None else self._spare(cluster, waiting, now_s)
        return self._parting.decide(cluster, waiting, spare, now_s)

    def next_deadline_s(self) -> float | None:
        grows_s = None if self._elastic is None else self._elastic.next_deadline_s()
        wishes = (self._timers.next_s(), self._retry_s, self._wake_for_long_s, grows_s)
        return min((at_s for at_s in wishes if at_s is not None), default=None)

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


def _fewest(cluster: Cluster, request: Request) -> int:
    """Empty replicas that hold its KV."""
    return kv_share(request.spec.kv_tokens, max(1, cluster.kv_max("prefill")))


def _stopped(busy: float, degree: int, replicas: int) -> float:
    """How many of the replicas shorts hold up on average if groups of `degree` fill the cluster: a group stands while
    any of its members has shorts, and those of `busy` replicas come to them at random. So `degree` times as many as
    they keep busy while these are few, and never more than there are."""
    return replicas * (1.0 - math.exp(-busy * degree / replicas))


def _due_s(request: Request) -> float:
    if request.order < 0:
        return -math.inf  # it ran before this scheduler did
    return request.arrived_s + (NO_DEADLINE_S if request.spec.deadline_s is None else request.spec.deadline_s)


class ShortLoad:
    """Seconds of prefill that shorts bring per second: how many replicas they keep busy. Exponentially averaged.

    The average of a time shorter than the window is over that time: with silence in front of it, the first longs of a
    cluster, or of a scheduler that takes over, would see no load, take every replica, and be paused for minutes."""

    def __init__(self) -> None:
        self._sum = 0.0
        """Of work, each second's weighted by its age."""
        self._at_s = -math.inf
        self._since_s = 0.0

    def came(self, work_s: float, now_s: float) -> None:
        if now_s - self._at_s > SILENCE_S:
            self._sum, self._since_s = 0.0, now_s - LOAD_SETTLES_S
        self._sum = self._sum * _weight(now_s - self._at_s) + work_s
        self._at_s = max(self._at_s, now_s)

    def replicas(self, now_s: float) -> float:
        if not self._sum:
            return 0.0
        weights_s = LOAD_WINDOW_S * (1.0 - _weight(now_s - self._since_s))
        return self._sum * _weight(now_s - self._at_s) / weights_s


def _weight(age_s: float) -> float:
    return math.exp(-max(0.0, age_s) / LOAD_WINDOW_S)
