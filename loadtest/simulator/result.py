"""What a simulation leaves behind."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(slots=True)
class Outcome:
    """One request. Times in simulated seconds from the start of the run; None: it did not come to that."""

    request_id: str
    long: bool
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    prefill_started_s: float | None = None
    """The pass with its first token began (short); its whole group began to compute (long)."""
    first_token_s: float | None = None
    finished_s: float | None = None
    """Its last token was out."""
    failure: str | None = None
    """Refused, failed or interrupted: the scheduler's words."""
    pauses: int = 0
    suspended_s: float = 0.0
    """How long its prefill stood still for others, in all."""
    sched_s: float = 0.0
    """Real seconds the scheduler's core spent on events about this request."""
    denied: bool = False
    """It had not begun when arrivals ended, though longs were given next to nothing while it waited: see
    `loadtest.simulator.usage`."""

    @property
    def queueing_delay_s(self) -> float | None:
        """Arrival to the start of its prefill."""
        return None if self.prefill_started_s is None else self.prefill_started_s - self.arrived_s

    @property
    def ttft_s(self) -> float | None:
        """Arrival to its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def jct_s(self) -> float | None:
        """Arrival to its last token."""
        return None if self.finished_s is None else self.finished_s - self.arrived_s

    @property
    def starved(self) -> bool:
        """See `loadtest.simulator.usage`."""
        return self.long and self.failure is None and (self.denied or self.prefill_started_s is None)


class Span(NamedTuple):
    """Something a worker did, for a lane of a trace viewer."""

    lane: str
    """A worker; `WORKER decode` for decodes, which may overlap one another."""
    kind: str
    """`short prefill`, `long prefill`, `paused`, `long decode`, `short decode`."""
    begin_s: float
    end_s: float
    request_id: str
    """Several, joined by spaces, for a pass that packs several."""


@dataclass(slots=True)
class SimResult:
    policy: str
    outcomes: list[Outcome]
    """In order of arrival."""
    arrivals_end_s: float
    """Last arrival."""
    ended_s: float
    """Last token of the last request, or last arrival if that was later."""
    gpus: int
    """Of prefill and decode workers."""
    gpu_idle: float
    """Share of all GPU time, first arrival to `ended_s`, in which a GPU ran nothing."""
    gpu_idle_arrivals: float
    """The same, first to last arrival: the end of a run, when little is left to do, left out."""
    replica_busy_s: dict[str, float]
    """Per worker, decode workers too."""
    counters: dict[str, int]
    """The scheduler's own."""
    decision_s: array[float]
    """Real seconds of every `Scheduler.handle` after the workers' first heartbeats."""
    stalled: bool = False
    """Nothing could move any more though requests were left."""
    spans: list[Span] = field(default_factory=list)
    """If recorded."""
    event_log: bytes = b""
    """If recorded: one line per event handed to the core and per command it gave; the same for the same seed."""
