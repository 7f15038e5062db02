"""Random schedules: load, cancels, kills, cuts, lost messages, delays, outages of the store, by seed.

While things go wrong a request may end in an error that the client can act on; its tokens are never wrong.
When they stop going wrong everything ends, and nothing is held (`settled`).
"""

from __future__ import annotations

import asyncio

from common.runtime.virtual_time import run_virtual
from services.engine.timed_language import TimedShape
from tests.cluster.world import SHAPE, VOCAB, Cluster, cluster, seeds

SERVERS = ("scheduler", "coordinator", "p0", "p1", "d0", "d1")


async def load(c: Cluster, seconds: float, rate: float, *, longs: float = 0.12) -> None:
    end_s = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end_s:
        long = c.random.random() < longs
        tokens = c.random.randint(1_001, 4_000) if long else c.random.randint(1, 250)
        answer = c.submit(tokens, max_tokens=c.random.randint(1, 20))
        if c.random.random() < 0.1:
            await asyncio.sleep(c.random.uniform(0.0, 1.0))
            await c.cancel(answer)
        await asyncio.sleep(c.random.expovariate(rate))


async def kill_and_restart(c: Cluster, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(c.random.uniform(0.2, 4.0))
        name = c.random.choice(SERVERS)
        await (c.kill(name) if c.random.random() < 0.7 else c.stop(name))
        await asyncio.sleep(c.random.choice((0.0, 0.5, 6.0)))
        c.start(name)


async def cut_and_heal(c: Cluster, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(c.random.uniform(0.2, 4.0))
        name = c.random.choice((*SERVERS, "r0", None))
        c.broker.cut(name)
        await asyncio.sleep(c.random.choice((0.1, 1.0, 6.0)))
        c.broker.heal(name)


async def store_outages(c: Cluster, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(c.random.uniform(1.0, 4.0))
        c.store.down = True
        await asyncio.sleep(c.random.choice((0.3, 2.0, 8.0)))
        c.store.down = False


async def transfer_faults(c: Cluster, times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(c.random.uniform(0.5, 3.0))
        c.hub.faults.delay_s = (0.0, c.random.choice((0.0, 0.01, 0.1)))
        c.hub.faults.corrupt_pieces = c.random.choice((0, 1, 5))
        c.hub.faults.frozen = c.random.random() < 0.4
        await asyncio.sleep(c.random.choice((0.5, 3.0)))
        c.hub.faults = type(c.hub.faults)()


def check_errors(c: Cluster) -> None:
    for answer in c.answers:
        assert answer.error is None or answer.error.status in (408, 429, 503), answer.error


def run(scenario, **options) -> None:
    async def main():
        async with cluster(prefill=2, decode=2, **options) as c:
            await scenario(c)
            c.broker.faults.drop_share = 0.0
            c.broker.faults.delay_s = (0.0, 0.0)
        check_errors(c)

    run_virtual(main())


@seeds(20)
def test_processes_die_at_random(seed):
    async def scenario(c):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=6.0))
            tasks.create_task(kill_and_restart(c, 3))

    run(scenario, seed=seed)


@seeds(20)
def test_messages_are_lost_and_late(seed):
    async def scenario(c):
        c.broker.faults.drop_share = c.random.choice((0.005, 0.02, 0.05))
        c.broker.faults.delay_s = (0.0, c.random.choice((0.0, 0.02, 0.2)))
        await load(c, 10.0, rate=6.0)
        await asyncio.sleep(3.0)

    run(scenario, seed=seed)


@seeds(12)
def test_connections_break_at_random(seed):
    async def scenario(c):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=5.0))
            tasks.create_task(cut_and_heal(c, 3))

    run(scenario, seed=seed)


@seeds(6)
def test_the_store_goes_away_at_random(seed):
    async def scenario(c):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=5.0))
            tasks.create_task(store_outages(c, 2))

    run(scenario, seed=seed)


@seeds(12)
def test_everything_goes_wrong(seed):
    async def scenario(c):
        c.broker.faults.drop_share = 0.01
        c.broker.faults.delay_s = (0.0, 0.05)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 15.0, rate=5.0))
            tasks.create_task(kill_and_restart(c, 2))
            tasks.create_task(store_outages(c, 1))

    run(scenario, seed=seed)


@seeds(8)
def test_everything_goes_wrong_where_shorts_decode_on_prefill_workers(seed):
    async def scenario(c):
        c.broker.faults.drop_share = 0.01
        c.broker.faults.delay_s = (0.0, 0.05)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=5.0))
            tasks.create_task(kill_and_restart(c, 2))

    policy = ("pecsched", "pecsched", "fifo", "priority")[seed % 4]
    run(scenario, seed=seed, policy=policy, disaggregation=False, colocation=seed % 2 == 0)


@seeds(12)
def test_transfers_break_at_random(seed):
    async def scenario(c):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=6.0))
            tasks.create_task(transfer_faults(c, 4))

    run(scenario, seed=seed)


@seeds(6)
def test_a_few_processes_and_a_full_house(seed):
    """One worker of each kind with hardly any room: requests wait, none is refused, pauses still end."""

    async def main():
        small = TimedShape(layers=4, vocab=VOCAB, kv_capacity_tokens=6_000, step_cost=SHAPE.step_cost, rows_max=3)
        async with cluster(prefill=1, decode=1, seed=seed, shape=small) as c:
            await load(c, 10.0, rate=5.0)
            await c.until(lambda: all(answer.ended for answer in c.answers), 300.0)
            assert all(answer.error is None for answer in c.answers)

    run_virtual(main())
