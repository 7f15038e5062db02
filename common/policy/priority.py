"""Priority: shorts first, and nobody is paused.

Shorts wait in the global queue and go, first come first served, to the replica with the fewest queued tokens among
those where no long prefills; of two with equal queues, to one where none decodes either. The first long in order
of arrival starts when no short waits and as many replicas are idle as it needs: by its planner, as if the cluster
were empty. Idle is a replica to which no short was sent that is not yet done, and where no long prefills. So longs
take what shorts leave over, and starve when that never suffices: it is what the paper shows of this rule.

A decision costs O(log n) in replicas and in queued requests, times the degree for a long.
"""

from __future__ import annotations

from common.policy.cluster import Cluster, Replica, Request
from common.policy.decisions import Decision, PlaceLong, PlaceShort
from common.policy.lines import spread_in
from common.policy.load_index import CANDIDATES_MAX
from common.policy.long_planner import LongPlanner
from common.policy.placement import kv_share
from common.policy.replica_pool import ReplicaPool, Spread
from common.policy.scheduler_config import SchedulerConfig
from common.policy.unpaused import UnpausedPolicy, could_hold, decode_home, decodes_nowhere, has_batch_room, kv_of_short
from common.units import RequestId, WorkerId


class PriorityPolicy(UnpausedPolicy):
    def __init__(self, config: SchedulerConfig, planner: LongPlanner) -> None:
        super().__init__()
        self._config = config
        self._planner = planner
        self._every = ReplicaPool()
        self._idle = ReplicaPool()
        self._touched: dict[WorkerId, None] = {}
        """Replicas that may have become idle, or no more be."""
        self._needs: dict[RequestId, Spread] = {}
        """Of the longs at the head, while the same replicas are there."""

    # --- what happened ---------------------------------------------------------------------------

    def admit(self, request: Request, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        self._enter(request)

    def forget(self, request: Request) -> None:
        """See `SchedulingPolicy`."""
        self._leave(request)
        self._needs.pop(request.request_id, None)

    def worker_added(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        replica = cluster.replicas.get(worker_id)
        if replica is not None:
            self._every.set(replica, 0)
            self._needs.clear()
            self._touched[worker_id] = None

    def worker_lost(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        self._every.discard(worker_id)
        self._idle.discard(worker_id)
        self._needs.clear()

    def replica_eased(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        self._touched[worker_id] = None

    def decoder_eased(self) -> None:
        """See `SchedulingPolicy`. Who waits for a decode worker is looked at in every decision."""

    def long_changed(self, request: Request) -> None:
        """See `SchedulingPolicy`."""
        self._touched.update(dict.fromkeys(request.members))

    # --- decisions -------------------------------------------------------------------------------

    def decide(self, cluster: Cluster, now_s: float) -> Decision | None:
        """See `SchedulingPolicy`."""
        while self._touched:
            worker_id, _ = self._touched.popitem()
            replica = cluster.replicas.get(worker_id)
            if replica is not None and replica.long is None and not replica.has_shorts:
                self._idle.set(replica, 0)
            else:
                self._idle.discard(worker_id)
        if not self._shorts:
            return self._next_long(cluster)
        return self._next_short(cluster)

    def _next_short(self, cluster: Cluster) -> Decision | None:
        for request in self._shorts.first(CANDIDATES_MAX):
            replica = self._least_queued(cluster, request)
            home = decode_home(cluster, self._config, request, replica.worker_id) if replica else None
            if replica is not None and home is not None:
                self._touched[replica.worker_id] = None
                return PlaceShort(request, replica.worker_id, home, "priority")
            if not decodes_nowhere(cluster, self._config, request):
                return None
        return None

    def _least_queued(self, cluster: Cluster, request: Request) -> Replica | None:
        """Looks at a bounded number of replicas."""
        found = [
            (replica.queued_tokens, shared, worker_id, replica)
            for shared, index in ((False, cluster.idle), (True, cluster.decoding))
            for worker_id in index.least()
            if self._has_room(replica := cluster.replicas[worker_id], request)
        ]
        return min(found)[-1] if found else None

    def _has_room(self, replica: Replica, request: Request) -> bool:
        return (
            could_hold(replica, self._config, request)
            and replica.kv_free >= kv_of_short(self._config, request)
            and has_batch_room(replica, self._config, request.tokens)
        )

    def _next_long(self, cluster: Cluster) -> Decision | None:
        """The first, but for those that these replicas are too few for."""
        if not self._longs or not self._idle or not cluster.can_form_groups:
            return None
        for request in self._longs.first(CANDIDATES_MAX):
            spread = self._need(request)
            if spread.degree == 0:
                continue
            if len(self._idle) < spread.degree:
                return None
            members = self._idle_group(cluster, spread, kv_share(request.spec.kv_tokens, spread.degree))
            return PlaceLong(request, members) if members else None
        return None

    def _idle_group(self, cluster: Cluster, spread: Spread, share: int) -> tuple[WorkerId, ...]:
        return self._idle.group(spread, lambda worker_id: cluster.replicas[worker_id].kv_free >= share)

    def _need(self, request: Request) -> Spread:
        known = self._needs.get(request.request_id)
        if known is None:
            known = self._needs[request.request_id] = spread_in(self._every, self._planner, self._config, request)
        return known
