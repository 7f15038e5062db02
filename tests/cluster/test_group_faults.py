"""The coordinator dies, a rank hangs, in every phase of a group: timed engines, links in memory, virtual time."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from common.runtime.virtual_time import run_virtual
from services.prefill_worker.service import PrefillWorker
from tests.cluster.world import Answer, Cluster, cluster, seeds

PHASES = ("forming", "prefilling", "paused", "decoding")
LEASE_S = SILENCE_S = 4.0
"""Of every process; of a rank in a pass. (The defaults, but for a second.)"""
MARGIN_S = 1.5
"""A heartbeat, and the orders that follow."""


def is_free(c: Cluster, name: str, answer: Answer) -> bool:
    """Nothing of this request's first attempt is held by that worker, nor waited for."""
    worker = cast(PrefillWorker, c.nodes[name].service)
    return (answer.request_id, 0) not in {(held.request_id, held.attempt) for held in worker.core.holdings()}


async def reach(c: Cluster, phase: str) -> Answer:
    """A long on both workers, in this phase; beside it shorts that wait, or pause it."""
    long = c.submit(6_000, max_tokens=60)
    match phase:
        case "forming":
            await c.until(lambda: c.view is not None and c.view.requests)
        case "prefilling":
            await asyncio.sleep(0.7)
        case "paused":
            await asyncio.sleep(0.7)
            for _ in range(3):
                c.submit(900, max_tokens=3)
            await c.until(lambda: c.count("pauses"))
        case "decoding":
            await c.until(lambda: len(long.tokens) > 10)
    return long


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("successor", ["at once", "late", "standby"])
def test_a_killed_coordinator_costs_its_groups_an_attempt_and_nothing_else(phase: str, successor: str) -> None:
    async def main() -> None:
        async with cluster(group_max=2, coordinators=2 if successor == "standby" else 1) as c:
            long = await reach(c, phase)
            await c.kill("coordinator")
            short = c.submit(200, max_tokens=3)
            if successor != "standby":
                await asyncio.sleep(0.1 if successor == "at once" else LEASE_S + 1.0)
                c.start("coordinator")
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)
            assert short.ttft_s < LEASE_S + MARGIN_S
            assert c.count("interrupted") <= 2  # once, and once more where it was formed again too early
            assert len(long.tokens) == long.max_tokens

    run_virtual(main())


@pytest.mark.parametrize("phase", PHASES)
def test_without_a_coordinator_longs_fail_clearly_and_shorts_are_served(phase: str) -> None:
    async def main() -> None:
        async with cluster(group_max=2, no_worker_s=5.0) as c:
            long = await reach(c, phase)
            await c.kill("coordinator")
            await c.until(lambda: long.ended, within_s=LEASE_S + 5.0 + MARGIN_S)
            if long.error is not None:  # else it was done before that
                assert long.error.status == 503
                assert "coordinator" in long.error.message
            short = c.submit(200, max_tokens=3)
            await c.until(lambda: short.ended, within_s=MARGIN_S)
            assert short.error is None

    run_virtual(main())


@pytest.mark.parametrize("name", ["p0", "p1"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_hangs_ends_its_group_within_the_bound(phase: str, name: str) -> None:
    async def main() -> None:
        async with cluster(group_max=2, worker={"silence_s": SILENCE_S}) as c:
            long = await reach(c, phase)
            other = "p1" if name == "p0" else "p0"
            c.hang(name)
            await c.until(lambda: is_free(c, other, long), within_s=max(LEASE_S, SILENCE_S) + MARGIN_S)
            shorts = [c.submit(200, max_tokens=3) for _ in range(4)]
            # Those that the scheduler gave to the one that hangs come back to it when its lease ends.
            await c.until(lambda: all(short.ended for short in shorts), within_s=LEASE_S + MARGIN_S)
            await c.until(lambda: long.ended)
            c.wake(name)
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)

    run_virtual(main())


@seeds(4)
def test_the_coordinator_dies_again_and_again(seed: int) -> None:
    async def main() -> None:
        async with cluster(prefill=3, group_max=3, seed=seed, coordinators=2, attempts_max=20) as c:
            for number in range(8):
                c.submit(c.random.randint(1_500, 5_000), max_tokens=c.random.randint(1, 60))
                c.submit(c.random.randint(20, 400), max_tokens=3)
                await asyncio.sleep(c.random.uniform(0.0, 2.0))
                name = "coordinator" if number % 2 else "coordinator-1"
                await c.kill(name)
                await asyncio.sleep(c.random.choice((0.0, 1.0, 5.0)))
                c.start(name)
            await c.until(lambda: all(answer.ended for answer in c.answers), within_s=120.0)
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)

    run_virtual(main())
