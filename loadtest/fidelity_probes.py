"""The live part of `loadtest fidelity`'s calibration: probes of an idle cluster, one request at a time."""

from __future__ import annotations

import asyncio
import random
from uuid import uuid4

from common.runtime.supervisor import Supervisor
from loadtest.client import Client
from loadtest.fidelity_model import LiveCluster, Probe, Probes
from loadtest.overhead import told
from loadtest.report import Bars
from loadtest.runner import MeasurementFailed, run_in_turn
from loadtest.workload import OUTPUT_TOKENS, Ask, even_asks, make_ask

WARM_UP = 4
ALONE = 16
BESIDE_MOST = 40
"""Shorts beside a long; its end ends them sooner."""
FEW_TOKENS = 2
"""Output of every second short: the difference to the others is decode steps alone."""
SETTLE_S = 1.5
"""After a long was sent, until it prefills."""
QUIET_S = 0.1
"""Before every probe: what the last one left behind is cleared away."""


async def warm_up(
    client: Client, live: LiveCluster, short_tokens: tuple[int, int], long_tokens: tuple[int, int], bars: Bars
) -> None:
    """Raises: MeasurementFailed."""
    rng = random.Random("warm-up")
    long = make_ask(rng, "long", min(long_tokens[0], live.config.threshold_tokens + 256))
    first = [*_shorts(rng, short_tokens, WARM_UP), long]
    with bars.counting("warming up", len(first)) as step:
        for sample in (await run_in_turn(client, first, step)).samples:
            if sample.failure is not None:
                raise MeasurementFailed(f"warm-up: a request failed: {sample.failure}")


async def probe(
    client: Client, live: LiveCluster, short_tokens: tuple[int, int], long_tokens: tuple[int, int], bars: Bars
) -> Probes:
    """Prompts as long as those of the load (beside shorts a shorter long, that it may not take too long).
    Raises: MeasurementFailed."""
    rng = random.Random("probes")
    threshold = live.config.threshold_tokens
    low, high = long_tokens
    alone = []
    with bars.counting("probes: shorts alone", ALONE) as step:
        for ask in _shorts(rng, short_tokens, ALONE):
            alone.append(await _one(client, ask))
            step()
    with bars.waiting("probes: a long alone"):
        long_alone = await _one(client, make_ask(rng, "long", (low + high) // 2))
    beside: list[tuple[Probe, ...]] = []
    # Without shared cores there is nothing to learn; with one prefill worker, one long takes all there are.
    for longs in (1, len(live.prefill))[: len(live.prefill) if live.cores else 0]:
        with bars.waiting(f"probes: shorts beside {longs} long{'s' * (longs > 1)}"):
            asks = [make_ask(rng, "long", min(low, 2 * threshold)) for _ in range(longs)]
            beside.append(await _beside(client, asks, _shorts(rng, short_tokens, BESIDE_MOST)))
    return Probes(tuple(alone), long_alone, *beside)


async def _beside(client: Client, longs: list[Ask], shorts: list[Ask]) -> tuple[Probe, ...]:
    """Shorts in turn, those that began and ended while all the longs prefilled. Raises: MeasurementFailed."""
    loop = asyncio.get_running_loop()
    served: list[tuple[float, Probe]] = []
    async with Supervisor() as tasks:
        running = [tasks.spawn(client.complete(long, _name()), name="a long") for long in longs]
        await asyncio.sleep(SETTLE_S)
        for ask in shorts:
            if any(task.done() for task in running):
                break
            probe = await _one(client, ask)
            served.append((loop.time(), probe))
        answers = await asyncio.gather(*running)
    for long, answer in zip(longs, answers, strict=True):
        if answer.failure(long) is not None:
            raise MeasurementFailed(f"probes: a long failed: {answer.failure(long)}")
    until_s = min(answer.first_s for answer in answers if answer.first_s is not None)
    beside = tuple(probe for ended_s, probe in served if ended_s < until_s)
    if not beside:
        raise MeasurementFailed("probes: no short was served while longs prefilled: is preemption off?")
    return beside


async def _one(client: Client, ask: Ask) -> Probe:
    """Raises: MeasurementFailed, ClientError."""
    await asyncio.sleep(QUIET_S)
    name = _name()
    answer = await client.complete(ask, name)
    failure = answer.failure(ask)
    if failure is not None or answer.first_s is None or answer.last_s is None:
        raise MeasurementFailed(f"probes: a request failed: {failure}")
    story = await client.get(f"/v1/requests/{name}/story")
    word = "PrefillFinished" if ask.kind == "short" else "GroupPrefillFinished"
    return Probe(
        prompt_tokens=ask.prompt_tokens,
        output_tokens=ask.output_tokens,
        ttft_s=answer.first_s - answer.sent_s,
        jct_s=answer.last_s - answer.sent_s,
        compute_s=told(story, word, "compute_s"),
    )


def _shorts(rng: random.Random, tokens: tuple[int, int], count: int) -> list[Ask]:
    """Lengths spread evenly over the range, shuffled."""
    spread = even_asks(rng.getrandbits(16), "probes", "short", tokens, count)
    lengths = [next(spread).prompt_tokens for _ in range(count)]
    return [make_ask(rng, "short", n, OUTPUT_TOKENS if i % 2 else FEW_TOKENS) for i, n in enumerate(lengths)]


def _name() -> str:
    return f"probe-{uuid4().hex[:12]}"
