"""`python -m loadtest overhead`: what everything but the engine adds to a short request on an idle cluster.

Requests go one at a time, over a kept-open connection, after the cluster has been quiet for a moment. Of
each, the time from sending it to the first token's event is taken, and `PrefillFinished.compute_s`, the time
the engine's thread spent on its pass, subtracted. The rest holds, both ways: HTTP on the loopback; the
router (parsing, limits, admission, rendering); NATS from router to scheduler, to the worker, and with the
token back to the router; the scheduler's decision and its writing to Redis; the worker's decisions, opening
the KV, and waking threads. It is all that router, scheduler and NATS add, and a little more: never less.

The engine's time, and when who spoke, are overheard on NATS; all clocks are this machine's (so --url must be
here). With a real model its threads compete with the other processes for the cores as they do in service:
that is why the overhead is taken on the real cluster, and not on one whose engine does not compute
(`--serve "--engine timed"` is one).
"""

from __future__ import annotations

import asyncio
import random
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
class Probe:
    """One request. All on this machine's monotonic clock."""

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
        """Seconds by where they went; `overhead` is the sum of the last four."""
        begun_s = self.computed_s - self.compute_s
        return {
            "ttft": self.first_s - self.sent_s,
            "engine_compute": self.compute_s,
            "overhead": self.first_s - self.sent_s - self.compute_s,
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
            probes = await _measure(options, Place(options.url, options.nats_url), bars)
        else:
            with bars.waiting("cluster"):
                async with served(options.serve_flags, bars.say) as place:
                    probes = await _measure(options, place, bars)
    parts = [probe.parts() for probe in probes]
    return {
        "requests": len(probes),
        "prompt_tokens": PROMPT_TOKENS,
        "seconds": {name: percentiles([each[name] for each in parts], 50, 90, 99) for name in TITLES},
    }


async def _measure(options: OverheadOptions, place: Place, bars: report.Bars) -> list[Probe]:
    client = Client(place.url, timeout_s=ANSWER_S, api_key=options.api_key)
    rng = random.Random(options.seed)
    places = (subjects.SCHEDULER, subjects.worker(WorkerId("*")))
    try:
        async with observing(place, places, RequestSubmitted, RunPrefill, PrefillFinished) as observer:
            if observer is None:
                raise MeasurementFailed("the engine's time is heard on NATS: with --url, give --nats-url too")
            with bars.counting("requests", options.requests + WARM_UP) as step:
                probes = []
                for number in range(options.requests + WARM_UP):
                    probes.append(await _probe(client, observer, rng, number))
                    step()
                    await asyncio.sleep(QUIET_S)
    finally:
        await client.close()
    return probes[WARM_UP:]


async def _probe(client: Client, observer: Observer, rng: random.Random, number: int) -> Probe:
    observer.heard.clear()
    ask = make_ask(rng, "short", PROMPT_TOKENS, OUTPUT_TOKENS)
    answer = await client.complete(ask, f"overhead-{number}-{rng.getrandbits(32):08x}")
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


TITLES = {
    "ttft": "time to first token, at the client",
    "engine_compute": "the engine's computing in it",
    "overhead": "added by everything else",
    "client_to_bus": "  client's bytes to the router's submission on the bus",
    "scheduler": "  to the scheduler's order on the bus (decision, Redis write)",
    "worker": "  to the pass begun (opening KV, waking the engine's thread)",
    "first_token_out": "  from the last layer to the token at the client (sampling, bus, router)",
}


def show(figures: dict[str, Any]) -> None:
    seconds = figures["seconds"]
    rows = [[title, *(report.ms(seconds[name][p]) for p in ("p50", "p90", "p99"))] for name, title in TITLES.items()]
    title = f"{figures['requests']} shorts of {figures['prompt_tokens']} tokens, one at a time, idle cluster"
    note = report.target("added, p50", seconds["overhead"]["p50"], TARGET_P50_S, report.ms)
    report.table(title, ["", "p50", "p90", "p99"], rows, ["", note])
