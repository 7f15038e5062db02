"""Requests bound to replicas: every replica has a line, served first come, first served.

A request is bound when it arrives, a short to the replica with the fewest queued tokens, a long to as many as its
planner asks for, and stands in the line of each. Lines are ordered by the global order of arrival.

**A short** leaves its line when it is at its head, no long prefills there, and the replica has room for it.

**A long** starts when it is at the head of all its lines at once, and on each of its replicas the prefill place is
free, what was sent before has been prefilled, and its share of KV has room. Until then the replicas where it is at
the head stand idle for it: that is first come, first served. No two longs can wait for each other. All lines have the
same order, so whoever came first of all that wait is at the head of every line it stands in; it waits for nothing
but work that runs already, which ends without needing anything from a line. This rests on the order alone and not on
when somebody was put into a line, so it stays true of a request that comes back after an interruption with its old
order and passes those already in line, and of one that is bound anew because a replica was lost.

**The length of a queue** is in tokens: of shorts in line, of shorts sent and not yet prefilled, and of longs in line
or prefilling. A long counts on each of its replicas with as many tokens of shorts as these could prefill in the
time it takes them. Its bare tokens, let alone a share of them, would understate it (attention over a long prompt
costs a multiple of its linear work), and a short would be bound behind a minute of work because nine short ones wait
elsewhere. So a short stands behind a long only if every other replica has as much to do; never while one is idle.
A long that decodes counts nothing, but of replicas with equal queues one where none decodes is taken.

A decision costs O(log n) in replicas and in queued requests, times the degree for a long: totals are kept, only
replicas where something changed are looked at, and of those that could start somebody the one that came first is
known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice

from sortedcontainers import SortedDict

from common.policy.cluster import Cluster, Replica, Request
from common.policy.decisions import Decision, PlaceLong, PlaceShort
from common.policy.load_index import CANDIDATES_MAX
from common.policy.long_planner import LongPlanner
from common.policy.placement import kv_share, layout_of
from common.policy.queues import RequestQueue
from common.policy.replica_pool import ReplicaPool, Spread
from common.policy.scheduler_config import SchedulerConfig
from common.policy.unpaused import could_hold, decode_home, decodes_nowhere, has_batch_room, kv_of_short
from common.units import RequestId, WorkerId


@dataclass(slots=True, eq=False)
class Binding:
    """A request in the lines of its replicas."""

    request: Request
    members: tuple[WorkerId, ...]
    weight: int
    """Tokens by which it lengthens each of these lines."""
    kv_tokens: int
    """KV it needs on each of them."""
    ready: set[WorkerId] = field(default_factory=set)
    """Members that could start it now."""

    @property
    def order(self) -> int:
        return self.request.order


@dataclass(slots=True, eq=False)
class Line:
    pool: ReplicaPool
    """Where its length is known, besides the pool of all."""
    waiting: dict[int, Binding] = field(default_factory=dict)
    """By order of arrival."""
    orders: list[int] = field(default_factory=list)
    """A heap of them, and of some that have left: a line of ten thousand costs no more than one of ten."""
    tokens: int = 0
    """Sum of the weights in it."""
    seat: tuple[RequestId, int] | None = None
    """The long that prefills there, and its weight."""
    called: Binding | None = None
    """Its head, if that could start here now."""

    def join(self, binding: Binding) -> None:
        order = binding.order
        self.waiting[order] = binding
        self.tokens += binding.weight
        heappush(self.orders, order)

    def leave(self, binding: Binding) -> None:
        del self.waiting[binding.order]
        self.tokens -= binding.weight

    def head(self) -> Binding | None:
        orders, waiting = self.orders, self.waiting
        while orders:
            binding = waiting.get(orders[0])
            if binding is not None:
                return binding
            heappop(orders)
        return None


class Lines:
    """All lines. Shorts are bound to replicas of `for_shorts`, longs to replicas of `for_longs`: the same pool of all
    (`every`), or two disjoint parts of it."""

    def __init__(self, config: SchedulerConfig, planner: LongPlanner, *, parted: bool = False) -> None:
        self._config = config
        self._planner = planner
        self.every = ReplicaPool()
        self.for_shorts = ReplicaPool() if parted else self.every
        self.for_longs = ReplicaPool() if parted else self.every
        self._lines: dict[WorkerId, Line] = {}
        self._bindings: dict[RequestId, Binding] = {}
        self._homeless = RequestQueue()
        """No replica there can hold these."""
        self._touched: dict[WorkerId, None] = {}
        """Replicas where something changed since the last decision."""
        self._ready_shorts: SortedDict = SortedDict()
        self._ready_longs: SortedDict = SortedDict()
        """order: Binding that every one of its replicas could start now."""

    # --- replicas --------------------------------------------------------------------------------

    def assign(self, replica: Replica, pool: ReplicaPool) -> list[Request]:
        """Put a replica into a pool, if need be out of another. Returns who stood in its line, to be bound anew."""
        line = self._lines.get(replica.worker_id)
        if line is None:
            line = self._lines[replica.worker_id] = Line(pool)
            left = []
        elif line.pool is pool:
            return []
        else:
            line.pool.discard(replica.worker_id)
            line.pool = pool
            left = self._unbind_all(line)
        self._weigh(line, replica)
        self._touched[replica.worker_id] = None
        return left

    def remove(self, worker_id: WorkerId) -> list[Request]:
        """A replica is lost. Returns who stood in its line, to be bound anew."""
        line = self._lines.get(worker_id)
        if line is None:
            return []
        left = self._unbind_all(line)
        del self._lines[worker_id]
        line.pool.discard(worker_id)
        self.every.discard(worker_id)
        self._touched.pop(worker_id, None)
        return left

    def homeless(self) -> list[Request]:
        """Those that no replica could hold; they are to be admitted again when one comes."""
        found = list(self._homeless.first(len(self._homeless)))
        for request in found:
            self._homeless.discard(request)
        return found

    def _unbind_all(self, line: Line) -> list[Request]:
        requests = [binding.request for _, binding in sorted(line.waiting.items())]
        for request in requests:
            self.unbind(request)
        return requests

    def eased(self, worker_id: WorkerId) -> None:
        """Something there changed."""
        if worker_id in self._lines:
            self._touched[worker_id] = None

    # --- requests --------------------------------------------------------------------------------

    def bind(self, request: Request, cluster: Cluster) -> None:
        """Into the lines of its replicas, behind those that came before it."""
        self._look(cluster)
        binding = self._long(request, cluster) if request.is_long else self._short(request, cluster)
        if binding is None:
            self._homeless.push(request)
            return
        self._bindings[request.request_id] = binding
        for worker_id in binding.members:
            line = self._lines[worker_id]
            line.join(binding)
            self._weigh(line, cluster.replicas[worker_id])
            self._touched[worker_id] = None

    def unbind(self, request: Request) -> None:
        """Out of all lines: placed, or it waits no more."""
        binding = self._bindings.pop(request.request_id, None)
        if binding is None:
            self._homeless.discard(request)
            return
        for worker_id in binding.members:
            line = self._lines[worker_id]
            line.leave(binding)
            self._call(line, worker_id, None)
            self._touched[worker_id] = None

    def _short(self, request: Request, cluster: Cluster) -> Binding | None:
        worker_id = self.for_shorts.least(lambda w: could_hold(cluster.replicas[w], self._config, request))
        if worker_id is None:
            return None
        return Binding(request, (worker_id,), request.tokens, kv_of_short(self._config, request))

    def _long(self, request: Request, cluster: Cluster) -> Binding | None:
        """A long that the part for longs is too small for may stand anywhere: it was accepted."""
        for pool in dict.fromkeys((self.for_longs, self.every)):
            members = pool.group(spread_in(pool, self._planner, self._config, request))
            if members:
                weight = self._weight(request, members, cluster)
                return Binding(request, members, weight, kv_share(request.spec.kv_tokens, len(members)))
        return None

    def _weight(self, request: Request, members: tuple[WorkerId, ...], cluster: Cluster) -> int:
        """Tokens of shorts that a member could prefill in the time of this long."""
        prefill_s = self._planner.prefill_s(request.tokens, layout_of(cluster, members))
        token_s = min(cluster.replicas[w].profile.step_cost.token_s for w in members)
        share = math.ceil(request.tokens / len(members))
        return max(share, round(prefill_s / token_s)) if token_s > 0.0 else request.tokens

    # --- what may start --------------------------------------------------------------------------

    def _look(self, cluster: Cluster) -> None:
        """At the replicas where something changed."""
        while self._touched:
            worker_id, _ = self._touched.popitem()
            line, replica = self._lines.get(worker_id), cluster.replicas.get(worker_id)
            if line is None or replica is None:
                continue
            self._weigh(line, replica)
            head = line.head()
            self._call(line, worker_id, head if head and self._may_start(head, replica) else None)

    def _weigh(self, line: Line, replica: Replica) -> None:
        if line.seat is not None and replica.long != line.seat[0]:
            line.seat = None
        load = line.tokens + replica.queued_tokens + (line.seat[1] if line.seat else 0)
        line.pool.set(replica, load)
        if line.pool is not self.every:
            self.every.set(replica, load)

    def _may_start(self, head: Binding, replica: Replica) -> bool:
        if replica.long is not None or replica.kv_free < head.kv_tokens:
            return False
        if head.request.is_long:
            return not replica.has_shorts
        return has_batch_room(replica, self._config, head.request.tokens)

    def _call(self, line: Line, worker_id: WorkerId, head: Binding | None) -> None:
        """`head` is who may start there now."""
        before, line.called = line.called, head
        if before is head:
            return
        if before is not None:
            before.ready.discard(worker_id)
            self._ready_of(before).pop(before.order, None)
        if head is not None:
            head.ready.add(worker_id)
            if len(head.ready) == len(head.members):
                self._ready_of(head)[head.order] = head

    def _ready_of(self, binding: Binding) -> SortedDict:
        return self._ready_longs if binding.request.is_long else self._ready_shorts

    def next(self, cluster: Cluster, rule: str) -> Decision | None:
        """The next to start, if any: see `SchedulingPolicy.decide`."""
        self._look(cluster)
        return self._next_long(cluster) or self._next_short(cluster, rule)

    def _next_long(self, cluster: Cluster) -> Decision | None:
        if not self._ready_longs or not cluster.can_form_groups:
            return None
        binding: Binding = self._ready_longs.peekitem(0)[1]
        for worker_id in binding.members:
            self._lines[worker_id].seat = (binding.request.request_id, binding.weight)
        return PlaceLong(binding.request, binding.members)

    def _next_short(self, cluster: Cluster, rule: str) -> Decision | None:
        """Decode workers too are given to whoever came first: nobody overtakes one that waits for room there."""
        for binding in self._first_ready_shorts():
            request, (replica,) = binding.request, binding.members
            home = decode_home(cluster, self._config, request, replica)
            if home is not None:
                return PlaceShort(request, replica, home, rule)
            if not decodes_nowhere(cluster, self._config, request):
                return None
        return None

    def _first_ready_shorts(self) -> Iterator[Binding]:
        return islice(self._ready_shorts.values(), CANDIDATES_MAX)


def spread_in(pool: ReplicaPool, planner: LongPlanner, config: SchedulerConfig, request: Request) -> Spread:
    """Over how many replicas of the pool, all of them empty, a long would be spread."""
    tokens, kv_tokens = request.tokens, request.spec.kv_tokens
    return pool.spread(lambda sizes, kv_free: planner.degree(tokens, kv_tokens, sizes, kv_free), config.group_max)
