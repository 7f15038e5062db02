"""The old place of `FifoPolicy`: `fifo.py` has it now."""

from __future__ import annotations

from common.policy import fifo
from common.policy.cluster import Cluster, SchedulerConfig
from common.policy.long_planner import LongPlanner, SingleReplicaPlanner


class FifoPolicy(fifo.FifoPolicy):
    def __init__(self, config: SchedulerConfig, planner: LongPlanner | None = None) -> None:
        super().__init__(config, SingleReplicaPlanner(Cluster()) if planner is None else planner)
