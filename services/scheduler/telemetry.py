"""What the scheduler measures and tells: of each request when it has ended, the rest when somebody scrapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

from common.messages.sp import FormGroup
from common.metrics import (
    ACCEPTED,
    CLASSES,
    DECISION_TIME,
    DECODE_TIME,
    ENDED,
    GROUPS_LOST,
    INTERRUPTED,
    PLACED,
    PLANS,
    PREEMPTIONS,
    PREFILL_TIME,
    QUEUE_TIME,
    REFUSED,
    RUNNING,
    SCHEDULER_ACTIVE,
    STATES,
    SUSPENDED_SHARE,
    WAITING,
    WORKERS,
    Definition,
    Metrics,
    Values,
)
from common.policy.lifecycle import RequestState, table_of
from common.policy.scheduler import Scheduler
from common.policy.scheduler_io import RequestLife
from common.tracing import Tracer, parse_traceparent
from common.units import RequestId
from services.scheduler.spans import DECODE, FORM, HANDOFF, PAUSE, PREFILL, QUEUE, parts_of, spans_of

ENDS = ("finished", "cancelled", "failed")
PLACED_BY = "placed_"
COUNTERS: Mapping[Definition, str] = {
    ACCEPTED: "accepted",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
    GROUPS_LOST: "groups_lost",
}
"""Kept by the core under these names."""
NOT_RUNNING = (RequestState.QUEUED, RequestState.INTERRUPTED)


class SchedulerTelemetry:
    """`core`: the one that runs; None while this process stands by. `tracer` None: nothing is traced."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None, core: Callable[[], Scheduler | None]) -> None:
        self.decision_s = metrics.histogram(DECISION_TIME)
        self._metrics = metrics
        self._tracer = tracer
        self._core = core
        self._queue_s = {each: metrics.histogram(QUEUE_TIME, each) for each in CLASSES}
        self._prefill_s = {each: metrics.histogram(PREFILL_TIME, each) for each in CLASSES}
        self._decode_s = {each: metrics.histogram(DECODE_TIME, each) for each in CLASSES}
        self._suspended = metrics.histogram(SUSPENDED_SHARE)
        self._pauses = metrics.histogram(PREEMPTIONS, "long")
        metrics.counter(PLANS, "alone", "1")
        metrics.read(SCHEDULER_ACTIVE, lambda: {(): core() is not None})
        for of in (RUNNING, WAITING, STATES, WORKERS, ENDED, PLACED):
            metrics.read(of, partial(self._of_core, READINGS[of]))
        for of, name in COUNTERS.items():
            metrics.read(of, partial(self._of_core, partial(_counter_of, name)))

    def planned(self, order: FormGroup) -> None:
        """A long was placed."""
        degree = len(order.members)
        scheme = order.scheme.name(degree) if degree > 1 else "alone"
        self._metrics.counter(PLANS, scheme, str(degree)).inc()

    def ended(self, request_id: RequestId, life: RequestLife) -> None:
        self._measure(life)
        if self._tracer is None:
            return
        request = parse_traceparent(life.traceparent)
        if request is not None and request.sampled:
            self._tracer.tell(partial(spans_of, request_id, life, request, self._tracer.offset_s()))

    def _measure(self, life: RequestLife) -> None:
        took_s: defaultdict[str, float] = defaultdict(float)
        for stage, from_s, to_s in parts_of(life):
            took_s[stage] += to_s - from_s
        if PREFILL not in took_s:
            return  # it never ran
        cls, prefill_s = life.length_class, took_s[PREFILL] + took_s[PAUSE]
        self._queue_s[cls].observe(took_s[QUEUE] + took_s[FORM])
        if life.how != "finished":
            return
        self._prefill_s[cls].observe(prefill_s)
        self._decode_s[cls].observe(took_s[HANDOFF] + took_s[DECODE])
        if cls == "long" and prefill_s > 0.0:
            self._suspended.observe(took_s[PAUSE] / prefill_s)
            began = (RequestState.PAUSING, RequestState.PAUSED)  # it is PAUSED again when its KV was elsewhere
            self._pauses.observe(sum((former, state) == began for (former, _), (state, _) in pairwise(life.phases)))

    def _of_core(self, reading: Callable[[Scheduler], Values]) -> Values:
        core = self._core()
        return {} if core is None else reading(core)


def _states(core: Scheduler) -> Values:
    """Those with nobody in them too: a series that comes and goes looks like an outage."""
    found: dict[tuple[str, ...], float] = {
        (each, str(state)): 0.0 for each in CLASSES for state in table_of(long=each == "long")
    }
    found.update(((each, str(state)), count) for (each, state), count in core.tally().items())
    return found


def _running(core: Scheduler) -> Values:
    tally = core.tally()
    return {
        (each,): sum(count for (cls, state), count in tally.items() if cls == each and state not in NOT_RUNNING)
        for each in CLASSES
    }


def _waiting(core: Scheduler) -> Values:
    waiting: dict[tuple[str, ...], float] = {(each,): 0.0 for each in CLASSES}
    waiting.update(((cls,), count) for (cls, state), count in core.tally().items() if state is RequestState.QUEUED)
    return waiting


def _workers(core: Scheduler) -> Values:
    return {("prefill",): len(core.cluster.replicas), ("decode",): len(core.cluster.decoders)}


def _ended(core: Scheduler) -> Values:
    return {(each, how): core.counters[f"{how}_{each}"] for each in CLASSES for how in ENDS}


def _placed(core: Scheduler) -> Values:
    named = ((name, count) for name, count in core.counters.items() if name.startswith(PLACED_BY))
    return {(name.removeprefix(PLACED_BY),): count for name, count in named}


def _counter_of(name: str, core: Scheduler) -> Values:
    return {(): core.counters[name]}


READINGS: Mapping[Definition, Callable[[Scheduler], Values]] = {
    RUNNING: _running,
    WAITING: _waiting,
    STATES: _states,
    WORKERS: _workers,
    ENDED: _ended,
    PLACED: _placed,
}
