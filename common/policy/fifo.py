"""FIFO (vLLM, as the paper runs it): first come, first served on every replica, longs and shorts alike."""

from __future__ import annotations

from common.policy.cluster import Cluster, Request
from common.policy.decisions import Decision
from common.policy.lines import Lines
from common.policy.long_planner import LongPlanner
from common.policy.scheduler_config import SchedulerConfig
from common.policy.unpaused import UnpausedPolicy
from common.units import WorkerId


class FifoPolicy(UnpausedPolicy):
    """See `lines.py`, where the rules stand."""

    def __init__(self, config: SchedulerConfig, planner: LongPlanner) -> None:
        super().__init__()
        self._lines = Lines(config, planner)

    def admit(self, request: Request, cluster: Cluster) -> None:
        """See `SchedulingPolicy`. It is bound at once."""
        self._enter(request)
        self._lines.bind(request, cluster)

    def forget(self, request: Request) -> None:
        """See `SchedulingPolicy`."""
        self._leave(request)
        self._lines.unbind(request)

    def worker_added(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`."""
        replica = cluster.replicas.get(worker_id)
        if replica is not None:
            self._lines.assign(replica, self._lines.every)
            for request in self._lines.homeless():
                self._lines.bind(request, cluster)

    def worker_lost(self, worker_id: WorkerId, cluster: Cluster) -> None:
        """See `SchedulingPolicy`. Who stood in its line is bound to another."""
        for request in self._lines.remove(worker_id):
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
        return self._lines.next(cluster, "fifo")
