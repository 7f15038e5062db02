"""Longs whose group gives workers back while it prefills: rank 0 takes in all KV and goes on alone. Every role's
service and core, timed engines, virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common.messages.sp import PartSegment, SegmentParted
from common.policy.live_planner import MeasuredPlanner
from common.runtime.virtual_time import virtual
from tests.cluster.test_groups import computed_once, kv_held
from tests.cluster.test_random_schedules import cut_and_heal, kill_and_restart, load, run
from tests.cluster.world import Answer, Cluster, cluster, seeds


@pytest.fixture
def hardly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two are said to be 1.2 times as fast as one worker: longs take them where nobody waits, and go on alone
    where somebody does."""
    measured = MeasuredPlanner.prefill_s

    def prefill_s(self: MeasuredPlanner, tokens: int, layout: tuple[int, ...]) -> float:
        return measured(self, tokens, (1,)) / (1.2 if sum(layout) > 1 else 1.0)

    monkeypatch.setattr(MeasuredPlanner, "prefill_s", prefill_s)


async def long_on_two(c: Cluster, tokens: int = 7_000, max_tokens: int = 30) -> Answer:
    long = c.submit(tokens, max_tokens=max_tokens)
    await c.until(lambda: c.view.requests and c.view.requests[0].state == "running")
    assert kv_held(c) == [tokens + max_tokens, -(-(tokens + max_tokens) // 2)]
    await asyncio.sleep(0.5)
    return long


@virtual
async def test_a_long_that_waits_gets_a_worker_where_a_group_is_hardly_faster(hardly_faster):
    async with cluster(group_max=2) as c:
        first = await long_on_two(c)
        second = c.submit(3_000, max_tokens=4)
        await c.until(lambda: c.count("parted"))
        await c.until(lambda: kv_held(c) == [7_030, 3_004], within_s=1.0)
        assert not first.tokens
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert [answer.error for answer in c.answers] == [None, None]
        assert second.token_s[0] < first.token_s[0]
        assert c.count("interrupted") == 0
        assert computed_once(c) == 1


@virtual
async def test_a_group_that_is_worth_it_keeps_its_workers():
    async with cluster(group_max=2) as c:
        first = await long_on_two(c)
        second = c.submit(6_500, max_tokens=4)
        await c.until(lambda: first.ended and second.ended)
        assert c.count("parted") == 0
        assert computed_once(c) == 2


@virtual
async def test_a_group_that_shorts_keep_standing_goes_on_alone():
    """The other worker serves most of them from then on: fewer pause the long."""
    async with cluster(group_max=2, decode=2, shorts_spare=0.0, pause_immunity_s=0.01) as c:
        long = await long_on_two(c)
        at_parting: tuple[int, int] | None = None
        while not long.tokens and not long.ended:
            c.submit(c.random.randint(100, 250), max_tokens=2)
            await asyncio.sleep(c.random.uniform(0.05, 0.15))
            if c.count("parted") and at_parting is None:
                at_parting = c.count("pauses"), len(c.answers)
        assert at_parting is not None
        pauses, sent = at_parting
        assert (c.count("pauses") - pauses) / (len(c.answers) - sent) < 0.8 * pauses / sent
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert [answer.error for answer in c.answers] == [None] * len(c.answers)
        assert c.count("interrupted") == 0
        computed_once(c)


@pytest.mark.parametrize("lost", [PartSegment, SegmentParted], ids=lambda message: message.__name__)
def test_a_lost_message_delays_it_and_no_more(hardly_faster, lost):
    @virtual
    async def go():
        async with cluster(group_max=2) as c:
            first = await long_on_two(c)
            name = lost.__name__.encode()
            drops = iter([True])
            c.broker.faults.drop_if = lambda _, sent: name in sent.data and next(drops, False)
            second = c.submit(3_000, max_tokens=4)
            await c.until(lambda: c.count("parted"), within_s=10.0)
            assert next(drops, None) is None, "one was lost"
            await c.until(lambda: first.ended and second.ended)
            assert first.error is second.error is None
            assert c.count("interrupted") == 0

    go()


@pytest.mark.parametrize("victim", ["p0", "p1", "coordinator"])
def test_whoever_is_lost_meanwhile_both_longs_are_served(hardly_faster, victim):
    @virtual
    async def go():
        async with cluster(group_max=2) as c:
            await long_on_two(c)
            c.submit(3_000, max_tokens=4)
            await c.until(lambda: any(r.parting_since_s for r in c.scheduler.cluster.requests.values()))
            await asyncio.sleep(c.random.uniform(0.0, 0.3))
            await c.kill(victim)
            c.start(victim)
            await c.until(lambda: all(answer.ended for answer in c.answers), within_s=120.0)
            assert [answer.error for answer in c.answers] == [None, None]

    go()


@seeds(6)
def test_everything_goes_wrong_where_groups_are_hardly_faster(seed, hardly_faster):
    async def scenario(c):
        c.broker.faults.drop_share = c.random.choice((0.0, 0.01))
        c.broker.faults.delay_s = (0.0, c.random.choice((0.0, 0.02)))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 15.0, rate=4.0, longs=0.3))
            tasks.create_task(cut_and_heal(c, 1) if seed % 2 else kill_and_restart(c, 2))

    run(scenario, seed=seed, group_max=2)
