"""Longs over several workers by every scheme: what the scheduler chose by what workers measured is what they do, and
its books are theirs."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from common.messages.cluster import ExchangeCost
from common.messages.groups import GroupScheme
from common.policy import live_planner
from common.policy.live_costs import SchemeTimes, scheme_times
from common.runtime.virtual_time import virtual
from services.prefill_worker.service import PrefillWorker
from tests.cluster.test_groups import computed_once
from tests.cluster.test_random_schedules import load
from tests.cluster.world import SHAPE, Cluster, cluster, seeds

EXCHANGE = ExchangeCost(message_s=1e-5, byte_s=2e-10, merge_element_s=5e-10)


def shape(query_heads: int, kv_heads: int):
    return replace(SHAPE, query_heads=query_heads, kv_heads=kv_heads, exchange=EXCHANGE)


def same_books(c: Cluster) -> bool:
    """What the scheduler has set aside on each worker, what the worker says of it, what its engine holds."""
    assert c.view is not None
    booked = {worker.profile.worker_id: worker.kv_reserved_tokens for worker in c.view.workers}
    held = {name: engine.kv_used_tokens for name, engine in c.engines().items()}
    said = {
        node.name: sum(holding.kv_tokens for holding in node.service.core.holdings())
        for node in c.nodes.values()
        if isinstance(node.service, PrefillWorker)
    }
    return all(booked[name] == held[name] == said[name] for name in said)


def schemes(c: Cluster) -> dict[str, str]:
    """By request: the scheme of the group that serves it, in words."""
    workers = [node.service for node in c.nodes.values() if isinstance(node.service, PrefillWorker)]
    jobs = [job for worker in workers for job in worker.core.books.longs()]
    return {job.request_id: job.scheme.name(job.size) for job in jobs}


@pytest.mark.parametrize(
    ("workers", "nodes", "heads", "scheme", "kv"),
    [
        (2, 1, (8, 4), "ulysses 2", [2_010, 2_010]),
        (2, 2, (8, 4), "ring 2", [2_010, 2_010]),
        (2, 1, (3, 3), "ring 2", [2_010, 2_010]),
        (2, 1, (9, 3), "ulysses 2", [2_680, 2_680]),
        (3, 1, (9, 3), "ulysses 3", [1_340, 1_340, 1_340]),
        (4, 2, (8, 8), "ring 2 x ulysses 2", [1_005, 1_005, 1_005, 1_005]),
        (4, 1, (8, 2), "ulysses 4", [2_010, 2_010, 2_010, 2_010]),
    ],
)
def test_the_cheapest_scheme_is_what_the_workers_do(workers, nodes, heads, scheme, kv):
    @virtual
    async def go():
        settings = {"group_max": workers, "group_gathers": False}
        async with cluster(prefill=workers, nodes=nodes, shape=shape(*heads), **settings) as c:
            long = c.submit(4_000, max_tokens=20)
            await c.until(lambda: len(long.tokens) > 3)
            assert schemes(c) == {long.request_id: scheme}
            assert sorted(e.kv_used_tokens for name, e in c.engines().items() if name.startswith("p")) == sorted(kv)
            assert same_books(c)
            assert any(f" by {scheme} (" in line for line in c.scheduler.story(long.request_id))
            await c.until(lambda: long.ended)
            assert computed_once(c) == 1

    go()


class Prices:
    """Every scheme costs by chance, so that each is chosen at times."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.chosen: set[GroupScheme] = set()

    def __call__(self, *args, **more) -> SchemeTimes:
        times = scheme_times(*args, **more)
        chosen = self._random.choice(times.possible)[0]
        if sum(args[2]) > 1:
            self.chosen.add(chosen)
        priced = tuple((scheme, took_s if scheme == chosen else 2.0 * took_s) for scheme, took_s in times.possible)
        return times._replace(possible=priced)


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch, seed: int) -> Prices:
    found = Prices(seed)
    monkeypatch.setattr(live_planner, "scheme_times", found)
    return found


@seeds(6)
def test_groups_of_every_scheme_under_load(seed, prices):
    """Nothing goes wrong but cancels: whenever nobody talks, the books agree."""

    @virtual
    async def go():
        async with cluster(prefill=4, nodes=2, decode=2, group_max=4, seed=seed, shape=shape(9, 3)) as c:
            for _ in range(3):
                await load(c, 4.0, rate=3.0)
                long = c.submit(2_000, max_tokens=300)
                await c.until(lambda long=long: len(long.tokens) > 3, within_s=120.0)
                await c.until(lambda: same_books(c), within_s=120.0)
                await c.cancel(long)
            await c.until(lambda: all(answer.ended for answer in c.answers), within_s=300.0)
            assert c.count("interrupted") == 0
            assert all(answer.error is None for answer in c.answers)

    go()
    assert len(prices.chosen) > 2


@seeds(6)
def test_processes_die_at_random_in_groups_of_every_scheme(seed, prices):
    async def die(c: Cluster) -> None:
        for _ in range(3):
            await asyncio.sleep(c.random.uniform(0.2, 4.0))
            name = c.random.choice(("p0", "p1", "p2", "p3", "coordinator", "scheduler"))
            await (c.kill(name) if c.random.random() < 0.7 else c.stop(name))
            await asyncio.sleep(c.random.choice((0.0, 0.5, 6.0)))
            c.start(name)

    @virtual
    async def go():
        heads = ((9, 3), (8, 8), (4, 1))[seed % 3]
        options = {"group_max": 4, "shorts_spare": 0.0, "shape": shape(*heads)}
        async with (
            cluster(prefill=4, nodes=2, decode=1, seed=seed, **options) as c,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(load(c, 12.0, rate=3.0, longs=0.4))
            tasks.create_task(die(c))
        for answer in c.answers:
            assert answer.error is None or answer.error.status in (408, 429, 503), answer.error

    go()
    assert prices.chosen
