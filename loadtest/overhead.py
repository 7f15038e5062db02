"""`python -m loadtest overhead`: what router, scheduler and NATS add to a short request on an idle cluster.

Requests go one at a time, over a kept-open connection, after the cluster has been quiet for a moment.

*What is added* is the time from sending a request to its first token's event at the client, less the time
the request was in the prefill worker's hands (`PrefillFinished.in_worker_s`: from receipt of the order to the
first token handed to NATS). The rest holds, both ways: HTTP on the loopback, the client's own parsing, the
router, NATS from router to scheduler, to the worker and with the token to the router, the scheduler's
decision, and its writing to Redis. Beside it stands the same less only the engine's computing, so that
the worker's own part is seen. Both are read from the request's story when it is over: nobody listens
on NATS meanwhile.

*Where it goes* is measured on further requests with this process listening on NATS, which costs some
tenths of a millisecond itself. All clocks are this machine's (so --url must be here). With a real model the
engine's threads compete with the other processes for the cores as they do in service: that is why the overhead
is taken on the real cluster, and not on one whose engine does not compute (`--serve "--engine timed"` is one).
"""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass
from typing import Any

from common.messages.prefill import PrefillFinished, RunPrefill
from common.messages.scheduling import RequestSubmitted
from common.runtime import subjects
from common.units import WorkerId
from loadtest import report
from loadtest.client import Client
from loadtest.cluster import Observer, Place, observing, served
from loadtest.runner import MeasurementFailed
from loadtest.stats import percentiles
from loadtest.workload import make_ask

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 2
"""One by the prefill worker, one by the decode worker: the whole path, little computing."""
WARM_UP = 10
OBSERVED = 50
"""Further requests, for the breakdown."""
QUIET_S = 0.05
HEARD_WITHIN_S = 2.0
ANSWER_S = 60.0
TARGET_P50_S = 0.005


@dataclass(frozen=True, slots=True)
class OverheadOptions:
    seed: int = 0
    requests: int = 200
    url: str = ""
    nats_url: str = ""
    api_key: str = ""
    serve_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quiet:
    """One request that nobody listened to."""

    ttft_s: float
    compute_s: float
    in_worker_s: float

    def parts(self) -> dict[str, float]:
        return {
            "ttft": self.ttft_s,
            "engine_compute": self.compute_s,
            "beside_engine": self.ttft_s - self.compute_s,
            "added": self.ttft_s - self.in_worker_s,
        }


@dataclass(frozen=True, slots=True)
class Probe:
    """One request listened to. All on this machine's monotonic clock."""

    sent_s: float
    submitted_s: float
    """The router's submission was on the bus."""
    ordered_s: float
    """The scheduler's order was on the bus."""
    computed_s: float
    """The engine had computed the last layer."""
    compute_s: float
    first_s: float

    def parts(self) -> dict[str, float]:
        """Seconds by where they went."""
        begun_s = self.computed_s - self.compute_s
        return {
            "client_to_bus": self.submitted_s - self.sent_s,
            "scheduler": self.ordered_s - self.submitted_s,
            "worker": begun_s - self.ordered_s,
            "first_token_out": self.first_s - self.computed_s,
        }


def run(options: OverheadOptions) -> dict[str, Any]:
    """Raises: PecSchedError."""
    return asyncio.run(_run(options))


async def _run(options: OverheadOptions) -> dict[str, Any]:
    with report.progress() as bars:
        if options.url:
            quiet, probes = await _measure(options, Place(options.url, options.nats_url), bars)
        else:
            with bars.waiting("cluster"):
                async with served(options.serve_flags, bars.say) as place:
                    quiet, probes = await _measure(options, place, bars)
    measured = [each.parts() for each in quiet]
    hops = [probe.parts() for probe in probes]
    seconds = {name: percentiles([each[name] for each in measured], 50, 90, 99) for name in MEASURED}
    seconds |= {name: percentiles([each[name] for each in hops], 50, 90, 99) for name in HOPS}
    return {"requests": len(quiet), "observed": len(probes), "prompt_tokens": PROMPT_TOKENS, "seconds": seconds}


async def _measure(options: OverheadOptions, place: Place, bars: report.Bars) -> tuple[list[Quiet], list[Probe]]:
    client = Client(place.url, timeout_s=ANSWER_S, api_key=options.api_key)
    rng = random.Random(options.seed)
    quiet, probes = [], []
    places = (subjects.SCHEDULER, subjects.worker(WorkerId("*")))
    try:
        with bars.counting("requests", options.requests + WARM_UP + OBSERVED) as step:
            for number in range(options.requests + WARM_UP):
                quiet.append(await _quiet(client, rng, number))
                step()
                await asyncio.sleep(QUIET_S)
            async with observing(place, places, RequestSubmitted, RunPrefill, PrefillFinished) as observer:
                if observer is None:
                    raise MeasurementFailed("the hops are heard on NATS: with --url, give --nats-url too")
                for number in range(OBSERVED):
                    probes.append(await _probe(client, observer, rng, number))
                    step()
                    await asyncio.sleep(QUIET_S)
    finally:
        await client.close()
    return quiet[WARM_UP:], probes


async def _quiet(client: Client, rng: random.Random, number: int) -> Quiet:
    ask = make_ask(rng, "short", PROMPT_TOKENS, OUTPUT_TOKENS)
    name = f"overhead-{number}-{rng.getrandbits(32):08x}"
    answer = await client.complete(ask, name)
    failure = answer.failure(ask)
    if failure is not None or answer.first_s is None:
        raise MeasurementFailed(f"request {number} failed: {failure}")
    story = await client.get(f"/v1/requests/{name}/story")
    return Quiet(
        ttft_s=answer.first_s - answer.sent_s,
        compute_s=told(story, "PrefillFinished", "compute_s"),
        in_worker_s=told(story, "PrefillFinished", "in_worker_s"),
    )


def told(story: Any, word: str, field: str) -> float:
    """A number from a message of that type in a request's story. Raises: MeasurementFailed."""
    for line in story.get("lines", ()):
        if f" {word} " in line and (found := re.search(rf"\b{field}=([-+.e\d]+)", line)):
            return float(found[1])
    raise MeasurementFailed(f"the request's story does not tell {field}: is the cluster of this version?")


async def _probe(client: Client, observer: Observer, rng: random.Random, number: int) -> Probe:
    observer.heard.clear()
    ask = make_ask(rng, "short", PROMPT_TOKENS, OUTPUT_TOKENS)
    answer = await client.complete(ask, f"observed-{number}-{rng.getrandbits(32):08x}")
    failure = answer.failure(ask)
    if failure is not None or answer.first_s is None:
        raise MeasurementFailed(f"request {number} failed: {failure}")
    if not await observer.until(PrefillFinished, HEARD_WITHIN_S):
        raise MeasurementFailed(f"nothing was heard of request {number} on NATS: is --nats-url that of {client.url}?")
    # The first of each kind: another would be a repetition.
    at_s = {type(message): heard_s for heard_s, message in reversed(observer.heard)}
    ended = next(message for _, message in observer.heard if isinstance(message, PrefillFinished))
    return Probe(
        sent_s=answer.sent_s,
        submitted_s=at_s[RequestSubmitted],
        ordered_s=at_s[RunPrefill],
        computed_s=ended.last_layer_computed_s,
        compute_s=ended.compute_s,
        first_s=answer.first_s,
    )


MEASURED = {
    "ttft": "time to first token, at the client",
    "engine_compute": "the engine's computing in it",
    "beside_engine": "everything but the engine's computing",
    "added": "added by router, scheduler and NATS",
}
HOPS = {
    "client_to_bus": "  client's bytes to the router's submission on the bus",
    "scheduler": "  to the scheduler's order on the bus (decision)",
    "worker": "  to the pass begun (worker: opening KV, waking the engine's thread)",
    "first_token_out": "  from the last layer to the token at the client (worker, bus, router)",
}


def show(figures: dict[str, Any]) -> None:
    seconds = figures["seconds"]
    rows = [
        [title, *(report.ms(seconds[name][p]) for p in ("p50", "p90", "p99"))]
        for name, title in (MEASURED | HOPS).items()
    ]
    title = f"{figures['requests']} shorts of {figures['prompt_tokens']} tokens, one at a time, idle cluster"
    observed = f"indented: {figures['observed']} further requests, with this process listening on NATS"
    note = report.target("added, p50", seconds["added"]["p50"], TARGET_P50_S, report.ms)
    report.table(title, ["", "p50", "p90", "p99"], rows, ["", observed, note])
