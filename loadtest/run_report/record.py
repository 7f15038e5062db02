"""A run, and its figures.

    queueing delay  arrival to the start of the prefill: of a short, the pass with its first token; of a long, its
                    whole group (null where nobody listened on the bus)
    TTFT            arrival to the first token
    ITL             mean time between two tokens of a request: (last - first) / (tokens - 1)
    JCT             arrival to the last token
    late            how late the client was at sending (live); it is in every figure above, which count from the
                    intended arrival

A request that failed is counted, and in no other figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from common.messages.base import Record
from loadtest.simulator.result import Outcome, Span
from loadtest.simulator.workload import Workload
from loadtest.stats import mean, percentile

SCHEMA = 1
LATE_S_MAX = 0.01
"""p99 of what an open loop may be late by."""
FAILURES_SHOWN = 5

Kind = Literal["live", "simulated"]


class Spread(Record, frozen=True, kw_only=True):
    """Of some seconds; null without any."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Of those that there are."""
        known = sorted(value for value in values if value is not None)
        return cls(
            mean=mean(known),
            p50=percentile(known, 50),
            p90=percentile(known, 90),
            p99=percentile(known, 99),
            max=known[-1] if known else None,
        )


class ClassFigures(Record, frozen=True, kw_only=True):
    """Of the shorts, or of the longs."""

    requests: int
    failed: int
    unfinished: int
    """Simulated runs only: nothing could serve them."""
    rps: float | None
    """Answers per second, first arrival to the last answer."""
    queueing_delay_s: Spread
    ttft_s: Spread
    itl_s: Spread
    jct_s: Spread

    @property
    def answered(self) -> int:
        return self.requests - self.failed - self.unfinished


class LoadFacts(Record, frozen=True, kw_only=True):
    """What arrived."""

    name: str
    digest: str
    """Of all arrivals and lengths: equal if and only if they are."""
    shorts: int
    longs: int
    duration_s: float
    threshold_tokens: int
    seed: int
    notes: tuple[str, ...] = ()
    """What was done to its lengths."""


class RunFigures(Record, frozen=True, kw_only=True):
    """One run in numbers: what stands in the JSON, under `runs`."""

    schema: int = SCHEMA
    label: str
    """How it went in: http, nats, simulated."""
    kind: Kind
    cluster: str
    """Model, workers and policy in a line."""
    load: LoadFacts
    short: ClassFigures
    long: ClassFigures
    tokens_per_s: float | None
    """Generated, first arrival to the last answer."""
    pauses: int | None
    """Of longs' prefills; null where nobody listened."""
    suspended_s: Spread
    """How long a long stood still, in all."""
    late_s: Spread
    client_busy: float | None = None
    """Share of one core that the sender used."""
    failures: tuple[str, ...] = ()
    """The first few."""
    notes: tuple[str, ...] = ()

    @property
    def answered(self) -> int:
        return self.short.answered + self.long.answered

    @property
    def lagged(self) -> bool:
        """The client did not hold its times."""
        return self.late_s.p99 is not None and self.late_s.p99 > LATE_S_MAX


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run, request by request."""

    label: str
    kind: Kind
    cluster: str
    load: LoadFacts
    outcomes: Sequence[Outcome]
    """In order of arrival."""
    spans: Sequence[Span]
    """What the workers did; empty: nobody listened."""
    late_s: Sequence[float] = ()
    client_busy: float | None = None
    listened: bool = True
    """Pauses, queueing delays and lanes are known."""
    notes: tuple[str, ...] = ()

    def good(self, *, long: bool) -> list[Outcome]:
        """Of one class, those that were answered."""
        return [o for o in self.outcomes if o.long == long and o.failure is None and o.finished_s is not None]


def load_facts(workload: Workload, seed: int, notes: Iterable[str] = ()) -> LoadFacts:
    """What arrived, in short."""
    digest = hashlib.blake2b(digest_size=8)
    for at_s, prompt, output in workload.arrivals:
        digest.update(b"%.6f %d %d\n" % (at_s, prompt, output))
    return LoadFacts(
        name=workload.name,
        digest=digest.hexdigest(),
        shorts=workload.shorts,
        longs=workload.longs,
        duration_s=workload.duration_s,
        threshold_tokens=workload.threshold_tokens,
        seed=seed,
        notes=tuple(notes),
    )


def figures_of(run: Recorded) -> RunFigures:
    """The run in numbers."""
    good = [*run.good(long=False), *run.good(long=True)]
    over_s = _span_s(good)
    longs = [o for o in good if o.long]
    return RunFigures(
        label=run.label,
        kind=run.kind,
        cluster=run.cluster,
        load=run.load,
        short=_class_figures(run, long=False),
        long=_class_figures(run, long=True),
        tokens_per_s=sum(o.output_tokens for o in good) / over_s if over_s else None,
        pauses=sum(o.pauses for o in run.outcomes) if run.listened else None,
        suspended_s=Spread.of(o.suspended_s for o in longs if run.listened),
        late_s=Spread.of(run.late_s),
        client_busy=run.client_busy,
        failures=tuple(_first_failures(run.outcomes)),
        notes=run.notes,
    )


def itl_s(outcome: Outcome) -> float | None:
    """Mean time between two tokens; None of a single one."""
    if outcome.first_token_s is None or outcome.finished_s is None or outcome.output_tokens < 2:
        return None
    return (outcome.finished_s - outcome.first_token_s) / (outcome.output_tokens - 1)


METRICS: dict[str, Callable[[Outcome], float | None]] = {
    "queueing_delay_s": lambda outcome: outcome.queueing_delay_s,
    "ttft_s": lambda outcome: outcome.ttft_s,
    "itl_s": itl_s,
    "jct_s": lambda outcome: outcome.jct_s,
}


def _class_figures(run: Recorded, *, long: bool) -> ClassFigures:
    own = [outcome for outcome in run.outcomes if outcome.long == long]
    good = run.good(long=long)
    failed = sum(outcome.failure is not None for outcome in own)
    over_s = _span_s(good)
    return ClassFigures(
        requests=len(own),
        failed=failed,
        unfinished=len(own) - failed - len(good),
        rps=len(good) / over_s if over_s else None,
        **{name: Spread.of(read(outcome) for outcome in good) for name, read in METRICS.items()},
    )


def _span_s(good: Sequence[Outcome]) -> float:
    """First arrival to last answer."""
    if not good:
        return 0.0
    return max(o.finished_s or 0.0 for o in good) - min(o.arrived_s for o in good)


def _first_failures(outcomes: Iterable[Outcome]) -> list[str]:
    """The first few different ones."""
    return list(dict.fromkeys(o.failure for o in outcomes if o.failure is not None))[:FAILURES_SHOWN]
