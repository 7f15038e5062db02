"""What every role measures, as data, and the series it is kept in.

Names and meanings are vLLM's where vLLM has the thing, behind our own prefix: `vllm:` would claim to be vLLM's (its
labels are others, and who adds up both would add up two systems). All times are in seconds, all sizes in tokens.

A series is a few additions to plain numbers, on the event loop's thread: prometheus_client's own are guarded by locks
and cost seven times as much, and a router observes thousands of tokens a second. Gauges are not kept at all: they are
read when somebody scrapes, from what the cores know anyway. prometheus_client writes the text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

PREFIX = "pecsched_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_500.0),
)
"""Of what a client waits for: from a message's way to the completion of a million tokens."""
FINE_SECONDS = (0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.064, 0.128, 0.256, 1.0)
"""Of a step, a pause's begin, a transfer's end."""
DECISION_SECONDS = (10e-6, 20e-6, 40e-6, 60e-6, 80e-6, 120e-6, 200e-6, 400e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3)
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COUNTS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0)

CLASS = "length_class"
CLASSES = ("short", "long")


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric: `name` without the prefix."""

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, ascending, without infinity."""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _counter(name: str, help_text: str, *labels: str) -> Definition:
    return Definition(name, help_text, "counter", labels)


def _gauge(name: str, help_text: str, *labels: str) -> Definition:
    return Definition(name, help_text, "gauge", labels)


def _histogram(name: str, help_text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Definition:
    return Definition(name, help_text, "histogram", labels, buckets)


# --- every role ----------------------------------------------------------------------------------

ROLE_INFO = _gauge("role_info", "1; which role this process has, and under which name", "role", "name")
NATS_CONNECTED = _gauge("nats_connected", "1 while NATS is connected")
NATS_DISCONNECTS = _counter("nats_disconnects_total", "Connections to NATS that were lost")
NATS_ERRORS = _counter("nats_errors_total", "Calls that NATS did not take, or not in time")
REDIS_ERRORS = _counter("redis_errors_total", "Tries that Redis did not answer; each is repeated within its bound")
SPANS_DROPPED = _counter("spans_dropped_total", "Spans that were not exported: the queue was full, or nobody took them")

# --- router: what clients see --------------------------------------------------------------------

TTFT = _histogram("time_to_first_token_seconds", "From a request's arrival to its first token", CLASS)
ITL = _histogram("inter_token_latency_seconds", "From one token to the next", CLASS)
E2E = _histogram("e2e_request_latency_seconds", "From a request's arrival to its last token (JCT)", CLASS)
PROMPT_TOKENS = _counter("prompt_tokens_total", "Tokens of prompts of requests that got a first token", CLASS)
GENERATION_TOKENS = _counter("generation_tokens_total", "Tokens delivered", CLASS)
SUCCESS = _counter(
    "request_success_total",
    "Requests that got their last token (stop, length), or whose client left before (abort)",
    CLASS,
    "finished_reason",
)
FAILURE = _counter("request_failure_total", "Requests that ended with an error, by its code in the API", "code")
RESPONSES = _counter("http_responses_total", "HTTP responses, by status", "status")
IN_HAND = _gauge("router_requests", "Requests that this router answers")

# --- scheduler -----------------------------------------------------------------------------------

SCHEDULER_ACTIVE = _gauge("scheduler_active", "1: it schedules; 0: it stands by")
RUNNING = _gauge("num_requests_running", "Requests that have a worker", CLASS)
WAITING = _gauge("num_requests_waiting", "Requests that wait for a worker", CLASS)
STATES = _gauge("requests_in_state", "Requests by state, as ARCHITECTURE.md draws them", CLASS, "state")
WORKERS = _gauge("workers", "Workers that report", "role")
QUEUE_TIME = _histogram("request_queue_time_seconds", "Queueing delay: from submission to the first step", CLASS)
PREFILL_TIME = _histogram("request_prefill_time_seconds", "From the first step to the first token, pauses too", CLASS)
DECODE_TIME = _histogram("request_decode_time_seconds", "From the first token to the last, the handoff too", CLASS)
SUSPENDED_SHARE = _histogram(
    "suspended_share", "Of a long's time from its first step to its first token, the part it stood", buckets=SHARES
)
PREEMPTIONS = _histogram("request_num_preemptions", "Pauses of a long that ended", CLASS, buckets=COUNTS)
DECISION_TIME = _histogram(
    "scheduler_decision_seconds", "Time of the scheduler's core for one event", buckets=DECISION_SECONDS
)
PLANS = _counter("group_plans_total", "Longs placed, by scheme and number of workers", "scheme", "degree")
PLACED = _counter("placements_total", "Requests placed, by the rule that placed them", "rule")
GROUPS_LOST = _counter("groups_lost_total", "Groups that ended without finishing and unasked")
ACCEPTED = _counter("requests_accepted_total", "Requests that the scheduler took")
REFUSED = _counter("requests_refused_total", "Requests that it refused")
INTERRUPTED = _counter("requests_interrupted_total", "Attempts that were lost; their routers submit them again")
ENDED = _counter("requests_ended_total", "Requests that ended, and how", CLASS, "how")

# --- SP coordinator ------------------------------------------------------------------------------

COORDINATOR_ACTIVE = _gauge("coordinator_active", "1: it leads groups; 0: it stands by")
GROUPS = _gauge("groups", "Groups that it drives")
PAUSES = _counter("pauses_total", "Pauses of longs")
PAUSE_TIME = _histogram("pause_seconds", "Length of a pause, from all ranks standing to all ranks running")
PAUSE_LATENCY = _histogram(
    "pause_latency_seconds", "From a short's being ready to the long's standing still, on the slowest rank",
    buckets=FINE_SECONDS,
)  # fmt: skip

# --- workers -------------------------------------------------------------------------------------

WORKER = "worker_id"
KV_USAGE = _gauge("kv_cache_usage_perc", "Share of the KV capacity that is in use; 1 is all", WORKER)
KV_USED = _gauge("kv_used_tokens", "KV in use or set aside", WORKER)
KV_IN_FLIGHT = _gauge("kv_in_flight_tokens", "KV of it that is being sent, or awaited", WORKER)
KV_CAPACITY = _gauge("kv_capacity_tokens", "KV this worker holds at most", WORKER)
HELD = _gauge("worker_requests", "Requests in hand, by what is done with them", WORKER, "phase")
TRANSFER_TAIL = _histogram(
    "kv_transfer_tail_seconds", "From the first token drawn to the receiver's word that all KV is there and right",
    buckets=FINE_SECONDS,
)  # fmt: skip
TRANSFERS_FAILED = _counter("kv_transfers_failed_total", "Handoffs that ended without that word")

Values = Mapping[tuple[str, ...], float]
"""Label values → number. Without labels: `{(): number}`."""


def definitions() -> dict[str, Definition]:
    """Every metric of this file, by its full name."""
    return {each.full_name: each for each in globals().values() if isinstance(each, Definition)}


class Counter:
    """Made by `Metrics.counter`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Histogram:
    """Made by `Metrics.histogram`."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        bounds = [*map(str, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


class Metrics(Collector):
    """All series of one process, in a registry of their own. Series are bound once, at the start, and kept by whoever
    counts; so they are there from the first scrape on, at 0. Used from the event loop's thread alone."""

    def __init__(self, role: str, name: str = "") -> None:
        self._counters: dict[Definition, dict[tuple[str, ...], Counter]] = {}
        self._histograms: dict[Definition, dict[tuple[str, ...], Histogram]] = {}
        self._read: dict[Definition, Callable[[], Values]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self.read(ROLE_INFO, lambda: {(role, name or role): 1.0})

    def counter(self, of: Definition, *labels: str) -> Counter:
        """The series with these label values, made if it is not there."""
        assert of.kind == "counter"
        return self._counters.setdefault(of, {}).setdefault(_checked(of, labels), Counter())

    def histogram(self, of: Definition, *labels: str) -> Histogram:
        """As `counter`."""
        assert of.kind == "histogram"
        return self._histograms.setdefault(of, {}).setdefault(_checked(of, labels), Histogram(of.buckets))

    def read(self, of: Definition, values: Callable[[], Values]) -> None:
        """A gauge, or a counter that is kept elsewhere: asked for at every scrape."""
        assert of.kind != "histogram"
        self._read[of] = values

    def exposition(self) -> bytes:
        """All of it in Prometheus's text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing before the first scrape: what is read then need not be there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        for of, counters in self._counters.items():
            yield _family(of, {labels: counter.value for labels, counter in counters.items()})
        for of, histograms in self._histograms.items():
            family = HistogramMetricFamily(of.full_name, of.help, labels=of.labels)
            for labels, histogram in histograms.items():
                histogram.add_to(family, labels)
            yield family
        for of, values in self._read.items():
            yield _family(of, values())


def _checked(of: Definition, labels: tuple[str, ...]) -> tuple[str, ...]:
    assert len(labels) == len(of.labels), f"{of.name} has the labels {of.labels}"
    return labels


def _family(of: Definition, values: Values) -> Metric:
    kind = CounterMetricFamily if of.kind == "counter" else GaugeMetricFamily
    family = kind(of.full_name, of.help, labels=of.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
