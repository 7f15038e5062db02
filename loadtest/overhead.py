"""`python -m loadtest overhead`: what everything but the engine adds to a short request on an idle cluster.

Requests go one at a time, over a kept-open connection, after the cluster has been quiet for a moment. Of
each, the time from sending it to the first token's event is taken, and `PrefillFinished.compute_s`, the time
the engine's thread spent on its pass, subtracted. The rest holds, both ways: HTTP on the loopback; the
router (parsing, limits, admission, rendering); NATS from router to scheduler, to the worker, and with the
token back to the router; the scheduler's decision and its writing to Redis; the worker's decisions, opening
the KV, and waking threads. It is all that router, scheduler and NATS add, and a little more: never less.

The engine's time is overheard on NATS, where the worker tells it the scheduler. With a real model its
threads compete with the other processes for the cores as they do in service: that is why the overhead
is taken on the real cluster, and not on one whose engine costs nothing (`--serve "--engine timed"` is close to that).
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

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
    """One request."""

    ttft_s: float
    compute_s: float

    @property
    def overhead_s(self) -> float:
        return self.ttft_s - self.compute_s


def run(options: OverheadOptions) -> dict[str, Any]:
    """Raises: PecSchedError."""
    return asyncio.run(_run(options))


async def _run(options: OverheadOptions) -> dict[str, Any]:
    with report.progress() as bars:
        if options.url:
            probes = await _measure(options, Place(options.url, options.nats_url, here=False), bars)
        else:
            with bars.waiting("cluster"):
                async with served(options.serve_flags, bars.say) as place:
                    probes = await _measure(options, place, bars)
    return {
        "requests": len(probes),
        "prompt_tokens": PROMPT_TOKENS,
        "overhead_s": percentiles([probe.overhead_s for probe in probes], 50, 90, 99),
        "ttft_s": percentiles([probe.ttft_s for probe in probes], 50, 90, 99),
        "engine_compute_s": percentiles([probe.compute_s for probe in probes], 50, 90, 99),
    }


async def _measure(options: OverheadOptions, place: Place, bars: report.Bars) -> list[Probe]:
    client = Client(place.url, timeout_s=ANSWER_S, api_key=options.api_key)
    rng = random.Random(options.seed)
    try:
        async with observing(place) as observer:
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
    ask = make_ask(rng, "short", PROMPT_TOKENS, OUTPUT_TOKENS)
    request_id = f"overhead-{number}-{rng.getrandbits(32):08x}"
    answer = await client.complete(ask, request_id)
    failure = answer.failure(ask)
    if failure is not None or answer.first_s is None:
        raise MeasurementFailed(f"request {number} failed: {failure}")
    prefill = await observer.prefill_of(request_id, HEARD_WITHIN_S)
    if prefill is None:
        raise MeasurementFailed(f"nothing was heard of request {number} on NATS: is --nats-url that of {client.url}?")
    return Probe(answer.first_s - answer.sent_s, prefill.compute_s)


def show(figures: dict[str, Any]) -> None:
    head = ["", "p50", "p90", "p99"]
    titles = {
        "ttft_s": "time to first token, at the client",
        "engine_compute_s": "the engine's computing in it",
        "overhead_s": "added by everything else",
    }
    rows = [[title, *(report.ms(figures[key][p]) for p in ("p50", "p90", "p99"))] for key, title in titles.items()]
    notes = [
        "",
        "Everything else: HTTP, router, three hops over NATS, the scheduler's decision and Redis write, the worker.",
        report.target("added, p50", figures["overhead_s"]["p50"], TARGET_P50_S, report.ms),
    ]
    title = f"{figures['requests']} shorts of {figures['prompt_tokens']} tokens, one at a time, idle cluster"
    report.table(title, head, rows, notes)
