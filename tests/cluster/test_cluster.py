"""The whole cluster at work, in one process and virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.virtual_time import virtual
from tests.cluster.world import cluster


@virtual
async def test_two_hundred_shorts_get_their_tokens():
    async with cluster() as c:
        for number in range(200):
            c.submit(10 + number % 150, max_tokens=1 + number % 12)
            await asyncio.sleep(c.random.expovariate(20.0))
    assert all(answer.error is None for answer in c.answers)


@virtual
async def test_a_long_gets_its_tokens():
    async with cluster() as c:
        c.submit(4_000, max_tokens=16)


@pytest.mark.parametrize("seed", range(5))
def test_shorts_pause_a_long_and_nothing_is_computed_twice(seed):
    @virtual
    async def run():
        async with cluster(prefill=1, seed=seed) as c:
            long = c.submit(6_000, max_tokens=16)
            await asyncio.sleep(0.5)
            shorts = []
            while not long.tokens and not long.ended:
                shorts.append(c.submit(40, max_tokens=4))
                await asyncio.sleep(c.random.uniform(0.1, 0.5))
            await c.until(lambda: all(answer.ended for answer in c.answers))
            computed = c.engines()["p0"].computed_tokens
            assert c.count("pauses") > 0
            assert max(computed.values()) == 1
            assert all(answer.error is None for answer in c.answers)

    run()
