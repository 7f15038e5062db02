"""A long that prefills takes in workers that come, or have become idle; whatever happens meanwhile, its tokens are
right and nothing is left. Every role's service and core, timed engines, virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.virtual_time import virtual
from tests.cluster.test_groups import computed_once
from tests.cluster.world import Answer, Cluster, cluster, seeds

GROWTHS = [(1, 2), (2, 3), (2, 4), (1, 3)]


async def long_on_few(c: Cluster, few: int, tokens: int = 8_000, max_tokens: int = 30) -> Answer:
    """A long that prefills on the first workers; the others are not there."""
    for name in late(c, few):
        await c.stop(name)
    long = c.submit(tokens, max_tokens=max_tokens)
    await c.until(lambda: c.view.requests and c.view.requests[0].state == "running")
    assert len(c.view.requests[0].workers) == few
    return long


def late(c: Cluster, few: int) -> list[str]:
    return [name for name in sorted(c.nodes) if name[0] == "p"][few:]


def joining(c: Cluster) -> bool:
    scheduler = c.scheduler
    return scheduler is not None and any(request.joining for request in scheduler.cluster.requests.values())


@pytest.mark.parametrize("steps", GROWTHS, ids=lambda steps: "-".join(map(str, steps)))
@pytest.mark.parametrize(("elastic", "gathers"), [(True, False), (False, False), (True, True)])
def test_workers_that_come_are_taken_in(steps, elastic, gathers):
    """Each sets aside its share of the KV in the group that it comes into; one that gathers it has all."""
    few, many = steps

    @virtual
    async def go():
        async with cluster(prefill=many, group_max=many, elastic=elastic, group_gathers=gathers) as c:
            long = await long_on_few(c, few)
            await asyncio.sleep(0.5)
            for name in late(c, few):
                c.start(name)
            await c.until(lambda: len(long.tokens) > (8 if gathers else 3))
            held = [engine.kv_used_tokens for name, engine in c.engines().items() if name.startswith("p")]
            was, share = -(-8_030 // few), -(-8_030 // many)
            kept = [was] * few + [share if elastic else 0] * (many - few)
            assert held == ([8_030] + [0] * (many - 1) if gathers else kept)
            assert c.count("grown") == elastic
            books = {worker.profile.worker_id: worker.kv_reserved_tokens for worker in c.view.workers}
            assert [books[name] for name in sorted(books) if name[0] == "p"] == held
            await c.until(lambda: long.ended)
            assert long.error is None
            assert computed_once(c) == (elastic or few > 1)
            took_s.append(long.ttft_s)

    took_s = []
    go()
    assert len(took_s) == 1


def test_a_group_that_grows_is_done_sooner():
    took_s = {}
    for elastic in (True, False):

        @virtual
        async def go(elastic=elastic):
            async with cluster(prefill=2, group_max=2, elastic=elastic) as c:
                long = await long_on_few(c, 1)
                c.start("p1")
                await c.until(lambda: long.ended)
                took_s[elastic] = long.ttft_s

        go()
    assert took_s[True] < 0.75 * took_s[False]


@virtual
async def test_a_worker_that_another_long_leaves_is_taken_in():
    async with cluster(prefill=2, group_max=2, shorts_spare=0.0) as c:
        first = await long_on_few(c, 1)
        c.start("p1")
        second = c.submit(3_000, max_tokens=4)
        await c.until(lambda: second.ended)
        assert c.count("grown") == 0, "somebody waited, or was there"
        await c.until(lambda: first.ended)
        assert first.error is second.error is None
        assert c.count("grown") == 1


@seeds(4)
def test_shorts_pause_a_group_while_it_grows_and_afterwards(seed):
    @virtual
    async def go():
        async with cluster(prefill=3, group_max=3, seed=seed, shorts_spare=0.0) as c:
            few = c.random.choice((1, 2))
            long = await long_on_few(c, few)
            for name in late(c, few):
                c.start(name)
            while not long.tokens and not long.ended:
                await asyncio.sleep(c.random.choice((0.05, 0.3, 1.5)))
                c.submit(c.random.randint(20, 300), max_tokens=4)
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)
            assert c.count("interrupted") == 0
            assert c.count("grown") + c.count("growth_failed") > 0
            computed_once(c)

    go()


@seeds(6)
def test_an_old_or_a_new_rank_is_lost_during_the_switch(seed):
    @virtual
    async def go():
        async with cluster(prefill=3, group_max=3, seed=seed) as c:
            few = c.random.choice((1, 2))
            long = await long_on_few(c, few)
            for name in late(c, few):
                c.start(name)
            await c.until(lambda: joining(c))
            await asyncio.sleep(c.random.choice((0.0, 0.02, 0.1, 0.3)))
            victim = c.random.choice(("p0", "p2"))
            if c.random.random() < 0.3:
                c.hang(victim)
                await asyncio.sleep(8.0)
                c.wake(victim)
            else:
                await c.kill(victim)
                await asyncio.sleep(c.random.uniform(0.0, 6.0))
                c.start(victim)
            await c.until(lambda: long.ended, within_s=120.0)
            assert long.error is None

    go()


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.1, 0.4])
def test_a_long_is_cancelled_while_it_grows(delay_s):
    @virtual
    async def go():
        async with cluster(prefill=2, group_max=2) as c:
            long = await long_on_few(c, 1)
            c.start("p1")
            await c.until(lambda: joining(c))
            await asyncio.sleep(delay_s)
            await c.cancel(long)

    go()


@seeds(4)
def test_lost_messages_cost_time_and_nothing_else(seed):
    @virtual
    async def go():
        async with cluster(prefill=3, group_max=3, seed=seed) as c:
            few = c.random.choice((1, 2))
            long = await long_on_few(c, few)
            for name in late(c, few):
                c.start(name)
            await c.until(lambda: joining(c))
            c.broker.faults.drop_share = c.random.choice((0.1, 0.3))
            await asyncio.sleep(3.0)
            c.broker.faults.drop_share = 0.0
            await c.until(lambda: long.ended, within_s=180.0)
            assert long.error is None

    go()
