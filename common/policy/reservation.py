"""Reservation (Llumnix, as the paper runs it): replicas set aside for longs, the others for shorts only.

Set aside are as many as the longest prompt the model may get (`reserved_long_tokens`) is spread over by the same
planner that spreads every long, nodes as whole as possible. A planner may ask for the whole cluster, as a matter of
speed; then the longs' part is half of it (`SHARE_MAX`), or more if the KV of that prompt needs more. At least one
replica stays for shorts. Both sides are served first come, first served (`lines.py`). A long for which the reserved
part is too small, because it is longer than foreseen or the cluster has too few replicas, stands in the lines of any:
it was accepted, so it has to end.

The parts are drawn anew when a replica comes or goes, and as few as possible change sides; who stands in the line
of one that does is bound anew. What runs there is left to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.policy.cluster import Cluster, Request
from common.policy.decisions import Decision
from common.policy.lines import Lines
from common.policy.long_planner import LongPlanner
from common.policy.replica_pool import ReplicaPool
from common.policy.scheduler_config import SchedulerConfig
from common.policy.unpaused import UnpausedPolicy
from common.units import WorkerId

SHARE_MAX = 0.5
"""Of the replicas, for the sake of speed alone. Left with one replica, shorts would queue for minutes at a tenth of
what the cluster can do, and the comparison would be with a straw man."""


class ReservationPolicy(UnpausedPolicy):
    def __init__(self, config: SchedulerConfig, planner: LongPlanner) -> None:
        super().__init__()
        self._config = config
        self._planner = planner
        self._lines = Lines(config, planner, parted=True)
        self._drawn = True
        """The parts are those of the replicas there are now."""

    # --- what happened ---------------------------------------------------------------------------

    def admit(self, request: Request, cluster: Cluster) -> None:
        """See `SchedulingPolicy`. It is bound at once."""
        self._draw(cluster)
        self._enter(request)
        self._lines.bind(request, cluster)

    def forget(self, request: Request) -> None:
        """See `SchedulingPolicy`."""
        self._leave(request)
        self._lines.unbind(request)

    def worker_added(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        self._drawn = self._drawn and worker_id not in cluster.replicas

    def worker_lost(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        if worker_id not in self._lines.every:
            return
        left = self._lines.remove(worker_id)
        self._drawn = False
        self._draw(cluster)
        for request in left:
            self._lines.bind(request, cluster)

    def replica_eased(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        self._lines.eased(worker_id)

    def decoder_eased(self) -> None:
        """See `SchedulingPolicy`. Who waits for a decode worker is looked at in every decision."""

    def long_changed(self, request: Request) -> None:
        """See `SchedulingPolicy`."""
        for worker_id in request.members:
            self._lines.eased(worker_id)

    def decide(self, cluster: Cluster, now_s: float) -> Decision | None:
        """See `SchedulingPolicy`."""
        if self._shorts or self._longs:
            self._draw(cluster)
        return self._lines.next(cluster, "reservation")

    # --- the two parts ---------------------------------------------------------------------------

    def _draw(self, cluster: Cluster) -> None:
        """O(n), and only when replicas came or went: not once for each of many that join an idle cluster."""
        if self._drawn:
            return
        self._drawn = True
        reserved = self._reserved(cluster)
        lines, left = self._lines, self._lines.homeless()
        for worker_id, replica in cluster.replicas.items():
            left += lines.assign(replica, lines.for_longs if worker_id in reserved else lines.for_shorts)
        for request in left:
            lines.bind(request, cluster)

    def _reserved(self, cluster: Cluster) -> set[WorkerId]:
        """Those set aside for longs."""
        pool = ReplicaPool()
        for worker_id, replica in cluster.replicas.items():
            pool.set(replica, 0 if worker_id in self._lines.for_longs else 1)
        replicas = len(pool)
        spread = pool.spread(self._longest, self._config.group_max)
        if spread.degree == 0:
            return set()
        for_kv = math.ceil(self._tokens(replicas, spread.kv_capacity) / spread.kv_capacity)
        enough = max(for_kv, math.floor(SHARE_MAX * replicas))
        return set(pool.group(spread.within(min(enough, replicas - 1))))

    def _tokens(self, replicas: int, kv_capacity: int) -> int:
        """Of the longest prompt, or of what all replicas can hold if that is less."""
        return min(self._config.reserved_long_tokens, replicas * kv_capacity)

    def _longest(self, sizes: Sequence[int], kv_capacity: int) -> int:
        tokens = self._tokens(sum(sizes), kv_capacity)
        return self._planner.degree(tokens, tokens, sizes, kv_capacity)
