"""Short capacity: how many shorts per second a cluster could serve if there were no longs.

A short needs a prefill replica and then a row of a decode replica, and either may be what limits a cluster: with the
paper's numbers of decode replicas it is decode for three of its four models. So the capacity is the lower of

- *prefill*: replicas over the mean time of a short's prefill, in passes packed as full as `batch_tokens_max` allows;
- *decode*: rows over (mean output tokens x time of a step with all rows), of all decode replicas. Rows are as many as
  the KV has slots for, at most the batch's; a row has the KV of a sequence halfway through its output.

At a share of it, the resource that limits is busy for about that share of the time, if arrivals were even; they come
in bursts. Both are computed from the cost model and the workload's own shorts, by which the time axis is scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.messages.base import Record
from common.policy.cost_model import CostModel
from common.policy.costs import decode_slot_tokens
from common.policy.scheduler_config import SchedulerConfig
from loadtest.paper_report.variants import PaperError
from loadtest.simulator.scenario import Scenario, cost_model, scheduler_config
from loadtest.simulator.workload import Arrival, Workload
from loadtest.simulator.world import ROWS_MAX


class ShortCapacity(Record, frozen=True, kw_only=True):
    """In shorts per second."""

    prefill_rps: float
    decode_rps: float
    """Infinite where prefill replicas decode too: nothing is set aside for it."""
    shorts_rps: float
    """What the workload has."""

    @property
    def rps(self) -> float:
        return min(self.prefill_rps, self.decode_rps)

    @property
    def limit(self) -> str:
        """What limits it."""
        return "prefill" if self.prefill_rps <= self.decode_rps else "decode"

    @property
    def trace_share(self) -> float:
        """Of the capacity, at the workload's own rate."""
        return self.shorts_rps / self.rps

    def rate_scale(self, share: float) -> float:
        """By which the workload's arrivals come at this share of the capacity."""
        return share * self.rps / self.shorts_rps


def short_capacity(scenario: Scenario, workload: Workload) -> ShortCapacity:
    """Raises: ScenarioError; PaperError if the workload is too small to have a rate."""
    shorts = workload.without_longs().arrivals
    if not shorts or workload.duration_s <= 0.0:
        raise PaperError(f"{workload.name}: no shorts over a time from which a rate could be taken")
    model = cost_model(scenario)
    config = scheduler_config(scenario, workload.threshold_tokens)
    decode_rps = math.inf
    if scenario.disaggregation and scenario.decode_replicas:
        decode_rps = scenario.decode_replicas * _decode_rps(model, shorts)
    return ShortCapacity(
        prefill_rps=scenario.prefill_replicas * len(shorts) / _packed_s(model, config, shorts),
        decode_rps=decode_rps,
        shorts_rps=len(shorts) / workload.duration_s,
    )


def _packed_s(model: CostModel, config: SchedulerConfig, shorts: Sequence[Arrival]) -> float:
    """Seconds of prefill of all shorts, in order of arrival."""
    total_s, batch, tokens = 0.0, list[int](), 0
    for arrival in shorts:
        if batch and tokens + arrival.prompt_tokens > config.batch_tokens_max:
            total_s += model.batch_s(batch)
            batch, tokens = [], 0
        batch.append(arrival.prompt_tokens)
        tokens += arrival.prompt_tokens
    return total_s + model.batch_s(batch)


def _decode_rps(model: CostModel, shorts: Sequence[Arrival]) -> float:
    """Of one replica. A sequence is in the batch for as many steps as it has output: that weighs its KV and slot."""
    steps = sum(short.output_tokens for short in shorts)
    kv = sum(short.output_tokens * (short.prompt_tokens + short.output_tokens / 2) for short in shorts) / steps
    slots = (short.output_tokens * decode_slot_tokens(short.prompt_tokens + short.output_tokens) for short in shorts)
    rows = max(1, min(ROWS_MAX, int(model.kv_capacity_tokens * steps / sum(slots))))
    return rows / model.decode_step_s(rows, int(rows * kv)) * len(shorts) / steps
