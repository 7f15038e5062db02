"""What every role measures of a mixed load: its real service and core, in one process and virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common import metrics as m
from common.runtime.virtual_time import virtual
from tests.cluster.world import Cluster, cluster
from tests.exposition import Scrape

LONGS = 2


def scrape(c: Cluster, name: str) -> Scrape:
    return Scrape(c.metrics[name].exposition())


async def mixed_load(c: Cluster) -> None:
    """Longs, and shorts that pause them; to the end."""
    for _ in range(LONGS):
        c.submit(6_000, max_tokens=16)
    await asyncio.sleep(0.5)
    while c.count("pauses") < 4:
        c.submit(c.random.randint(20, 300), max_tokens=6)
        await asyncio.sleep(0.1)
    await c.until(lambda: all(answer.ended for answer in c.answers))


@virtual
async def test_the_router_measures_what_its_clients_see():
    async with cluster() as c:
        await mixed_load(c)
        router = scrape(c, "r0")
        for cls in m.CLASSES:
            seen = [a for a in c.answers if (len(a.prompt_ids) > 1_000) == (cls == "long")]
            assert router.count(m.TTFT, length_class=cls) == len(seen)
            assert router.total(m.TTFT, length_class=cls) == pytest.approx(sum(a.ttft_s for a in seen))
            jct_s = sum(a.token_s[-1] - a.asked_s for a in seen)
            assert router.total(m.E2E, length_class=cls) == pytest.approx(jct_s)
            tokens = sum(len(a.tokens) for a in seen)
            assert router.value(m.GENERATION_TOKENS, length_class=cls) == tokens
            assert router.count(m.ITL, length_class=cls) == tokens - len(seen)
            between_s = sum(a.token_s[-1] - a.token_s[0] for a in seen)
            assert router.total(m.ITL, length_class=cls) == pytest.approx(between_s)
            assert router.value(m.PROMPT_TOKENS, length_class=cls) == sum(len(a.prompt_ids) for a in seen)
        assert router.value(m.SUCCESS, finished_reason="length") == len(c.answers)
        assert router.value(m.SUCCESS) == len(c.answers)
        assert router.value(m.FAILURE) == router.value(m.IN_HAND) == 0


@virtual
async def test_how_requests_end_is_counted_once():
    async with cluster() as c:
        left = c.submit(6_000)
        cancelled = c.submit(300, max_tokens=50)
        await c.until(lambda: cancelled.tokens)
        router = c.nodes["r0"].service
        assert scrape(c, "r0").value(m.IN_HAND) == 2
        await c.cancel(left)
        assert await router.cancel(cancelled.request_id)
        refused = c.submit(500_000)
        await c.until(lambda: refused.ended and cancelled.ended)
        found = scrape(c, "r0")
        assert (found.value(m.SUCCESS, finished_reason="abort"), found.value(m.SUCCESS)) == (2, 2)
        assert found.value(m.FAILURE, code="context_length_exceeded") == found.value(m.FAILURE) == 1
        await c.until(lambda: scrape(c, "scheduler").value(m.ENDED, how="cancelled") == 2)


@virtual
async def test_the_scheduler_measures_waiting_running_and_what_became_of_each():
    async with cluster() as c:
        started = [c.submit(6_000, max_tokens=16) for _ in range(3)]
        await asyncio.sleep(0.5)
        now = scrape(c, "scheduler")
        assert now.value(m.RUNNING, length_class="long") == 2
        assert now.value(m.WAITING, length_class="long") == 1
        assert now.value(m.STATES, length_class="long", state="running") == 2
        assert now.value(m.STATES, length_class="short") == 0
        assert now.value(m.WORKERS, role="prefill") == 2
        await c.until(lambda: all(answer.ended for answer in started))
        await mixed_load(c)
        await c.until(lambda: not c.view.requests)
        done = scrape(c, "scheduler")
        longs = 3 + LONGS
        for cls, count in (("long", longs), ("short", len(c.answers) - longs)):
            assert done.value(m.ENDED, length_class=cls, how="finished") == count
            for of in (m.QUEUE_TIME, m.PREFILL_TIME, m.DECODE_TIME):
                assert done.count(of, length_class=cls) == count
        jct_s = sum(a.token_s[-1] - a.asked_s for a in c.answers if len(a.prompt_ids) > 1_000)
        parts_s = sum(done.total(of, length_class="long") for of in (m.QUEUE_TIME, m.PREFILL_TIME, m.DECODE_TIME))
        assert parts_s == pytest.approx(jct_s, rel=0.02)
        assert done.total(m.QUEUE_TIME, length_class="long") > 1.0, "the third waited for one of the first two"
        assert done.count(m.SUSPENDED_SHARE) == longs
        assert done.total(m.PREEMPTIONS) == c.count("pauses")
        assert done.value(m.ACCEPTED) == len(c.answers)
        assert done.value(m.PLACED, rule="long") == longs
        assert done.value(m.PLANS, scheme="alone", degree="1") == longs
        assert done.count(m.DECISION_TIME) > 4 * len(c.answers)
        assert done.value(m.SCHEDULER_ACTIVE) == 1


@virtual
async def test_the_coordinator_measures_each_pause_once():
    async with cluster() as c:
        await mixed_load(c)
        found = scrape(c, "coordinator")
        assert found.value(m.PAUSES) == found.count(m.PAUSE_TIME) == found.count(m.PAUSE_LATENCY) == c.count("pauses")
        stood_s = found.total(m.PAUSE_TIME)
        scheduler = scrape(c, "scheduler")
        assert 0.0 < scheduler.total(m.SUSPENDED_SHARE) < LONGS
        assert stood_s < scheduler.total(m.PREFILL_TIME, length_class="long")
        assert (found.value(m.COORDINATOR_ACTIVE), found.value(m.GROUPS)) == (1, 0)


@virtual
async def test_workers_measure_their_kv():
    async with cluster(prefill=1) as c:
        c.hub.faults.delay_s = (0.05, 0.05)
        short = c.submit(300, max_tokens=40)
        in_flight = set()
        while not short.ended:
            in_flight |= {name for name in ("p0", "d0") if scrape(c, name).value(m.KV_IN_FLIGHT)}
            await asyncio.sleep(0.01)
        assert in_flight == {"p0", "d0"}
        long = c.submit(6_000, max_tokens=8)
        await c.until(lambda: long.tokens)
        p0 = scrape(c, "p0")
        assert p0.value(m.KV_USED, worker_id="p0") == 6_008
        assert p0.value(m.KV_CAPACITY) == c.shape.kv_capacity_tokens
        assert p0.value(m.KV_USAGE) == pytest.approx(6_008 / c.shape.kv_capacity_tokens)
        assert p0.value(m.HELD, phase="decode") == 1
        assert p0.count(m.TRANSFER_TAIL) == 1
        assert p0.value(m.TRANSFERS_FAILED) == 0
        await c.until(lambda: long.ended)
        await c.until(lambda: scrape(c, "p0").value(m.KV_USED) == scrape(c, "d0").value(m.KV_USED) == 0)


@virtual
async def test_losses_are_counted_by_who_sees_them():
    async with cluster(group_max=2) as c:
        long = c.submit(6_000, max_tokens=8)
        await asyncio.sleep(0.7)
        await c.kill("p1")
        await c.until(lambda: long.ended)
        c.start("p1")
        found = scrape(c, "scheduler")
        assert found.value(m.GROUPS_LOST) == found.value(m.INTERRUPTED) >= 1
        assert found.value(m.PLANS, degree="2") >= 1
        assert found.value(m.PLANS, degree="1") == 1, "in the end it was served by the one that was left"
        assert found.value(m.WORKERS, role="prefill") == 1


@virtual
async def test_a_process_that_stands_by_says_so():
    async with cluster(coordinators=2) as c:
        assert [scrape(c, name).value(m.COORDINATOR_ACTIVE) for name in ("coordinator", "coordinator-1")] == [1, 0]
        await c.kill("scheduler")
        c.start("scheduler")
        waiting = scrape(c, "scheduler")
        assert waiting.value(m.SCHEDULER_ACTIVE) == 0
        assert waiting.samples_of("pecsched_num_requests_running") == []
        await c.ready()
        assert scrape(c, "scheduler").value(m.SCHEDULER_ACTIVE) == 1
