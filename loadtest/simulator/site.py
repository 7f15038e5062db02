"""What everything in the simulated cluster shares: time, costs, limits, and the way to the scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.policy.cost_model import ReplicaCosts
from common.policy.scheduler_io import SchedulerEvent
from loadtest.simulator.cores import Cores
from loadtest.simulator.costs import LongCosts
from loadtest.simulator.job import Job
from loadtest.simulator.recorder import Recorder
from loadtest.simulator.timeline import Timeline
from loadtest.simulator.usage import Usage

Word = tuple[Job, SchedulerEvent]


@dataclass(frozen=True, slots=True)
class Limits:
    """What workers are told beside their orders; the live ones have the same settings."""

    batch_tokens_max: int
    """Tokens of shorts in one pass; a single longer short goes alone."""
    colocated_tokens_max: int
    """Tokens of shorts that share one step with a long's decode."""
    layers: int
    """Of the model: KV is handed over layer by layer while the next one computes."""
    long_itl_s_max: float
    """A chunk of a long makes way for what decodes beside it, to keep this."""


@dataclass(slots=True, eq=False)
class Site:
    timeline: Timeline
    costs: ReplicaCosts
    longs: LongCosts
    limits: Limits
    hop_s: float
    """A control message from one process to another."""
    random: random.Random
    usage: Usage
    hear: Callable[[Sequence[Word]], None]
    """Hands words to the scheduler at once."""
    recorder: Recorder | None = None
    cores: Cores | None = None
    """All workers compute on these; None: each by itself."""

    def tell(self, words: Sequence[Word], hops: int = 1) -> None:
        """Words to the scheduler, on their way from now on; from a group they go by way of its coordinator."""
        timeline = self.timeline
        timeline.at(timeline.now_s + hops * self.hop_s, self.hear, words)
