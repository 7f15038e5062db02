"""What an operator may set of the scheduler's core."""

from __future__ import annotations

from common.messages.base import Record


class SchedulerConfig(Record, frozen=True, kw_only=True):
    """What an operator may set; `common.settings.SchedulerSettings` describes each."""

    policy: str = "pecsched"
    threshold_tokens: int = 2_048
    queue_max: int = 10_000
    attempts_max: int = 4
    no_worker_s: float = 8.0
    lease_s: float = 4.0
    heartbeat_s: float = 1.0
    pause_max_s: float = 10.0
    pause_share_max: float = 0.9
    pause_immunity_s: float = 0.05
    pause_remaining_min_s: float = 0.1
    wait_instead_of_pause_s: float = 0.05
    colocated_tokens_max: int = 192
    batch_tokens_max: int = 1_024
    preemption: bool = True
    disaggregation: bool = True
    colocation: bool = True
    long_order: str = "remaining"
    long_aging: float = 0.5
    group_max: int = 1
    group_gathers: bool = True
    internode_bytes_s: float = 0.0
    shorts_spare: float = 2.5
    elastic: bool = True
    reserved_long_tokens: int = 500_000
    spill: str = "memory"
