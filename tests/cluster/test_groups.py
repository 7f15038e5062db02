"""Longs over several workers, live: every role's service and core, timed engines, links in memory, virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.subjects import worker
from common.runtime.virtual_time import virtual
from common.units import WorkerId
from tests.cluster.test_cluster import MODES
from tests.cluster.test_group_faults import is_free
from tests.cluster.test_random_schedules import cut_and_heal, kill_and_restart, load, run
from tests.cluster.world import Cluster, cluster, seeds

SWITCHES = ("pecsched", "fifo", "reservation", "priority", "no disaggregation", "no colocation", "nothing")


def computed_once(c: Cluster) -> int:
    """Each position of a prompt on one worker of its group, once. Returns how many prompts were shared out."""
    counts = [engine.computed_tokens for name, engine in c.engines().items() if name.startswith("p")]
    for request_id, position in set().union(*counts):
        assert sum(count[request_id, position] for count in counts) == 1, f"{request_id}: token {position}"
    prompts = [{request_id for request_id, _ in count} for count in counts]
    return sum(sum(answer.request_id in some for some in prompts) > 1 for answer in c.answers)


@virtual
async def test_a_long_over_two_workers_is_prefilled_faster_and_decodes_on_both():
    took_s = {}
    for group_max in (1, 2):
        async with cluster(group_max=group_max, group_gathers=False) as c:
            long = c.submit(8_000, max_tokens=20)
            await c.until(lambda long=long: len(long.tokens) > 3)
            held = [engine.kv_used_tokens for name, engine in c.engines().items() if name.startswith("p")]
            assert sorted(held) == ([0, 8_020] if group_max == 1 else [4_010, 4_010])
            await c.until(lambda long=long: long.ended)
            took_s[group_max] = long.ttft_s
            assert computed_once(c) == group_max - 1
    assert took_s[2] < 0.65 * took_s[1]


def kv_held(c: Cluster) -> list[int]:
    """On each prefill worker: by its engine, and by the scheduler's books, which must agree."""
    workers = [name for name in sorted(c.engines()) if name.startswith("p")]
    held = [c.engines()[name].kv_used_tokens for name in workers]
    assert held == [c.scheduler.cluster.replicas[name].kv_reserved for name in workers]
    return held


@virtual
async def test_the_first_of_two_workers_gathers_the_kv_and_decodes_alone():
    """The other is free for the next long, and for shorts that share no step with a decode."""
    async with cluster(group_max=2) as c:
        first = c.submit(6_000, max_tokens=300)
        await c.until(lambda: c.view.requests and c.view.requests[0].state == "running")
        assert kv_held(c) == [6_300, 3_150]
        await c.until(lambda: len(first.tokens) > 8)
        assert kv_held(c) == [6_300, 0]
        assert c.view.requests[0].workers == ("p0",)
        second = c.submit(3_000, max_tokens=4)
        await c.until(lambda: second.ended)
        assert not first.ended
        short = c.submit(200, max_tokens=3)
        await c.until(lambda: short.ended)
        assert c.count("placed_idle") == 1
        await c.until(lambda: first.ended)
        assert [answer.error for answer in c.answers] == [None] * 3
        assert c.count("interrupted") == 0
        assert computed_once(c) >= 1


@pytest.mark.parametrize("moment", ["at once", "later"])
def test_a_worker_that_gave_its_kv_away_is_lost_and_nobody_minds(moment):
    @virtual
    async def go():
        async with cluster(group_max=2) as c:
            long = c.submit(6_000, max_tokens=60)
            await c.until(lambda: long.tokens)
            if moment == "later":
                await c.until(lambda: len(long.tokens) > 10)
            else:
                await c.until(lambda: c.view.requests[0].state == "decoding")
            await c.kill("p1")
            await c.until(lambda: long.ended)
            assert long.error is None
            assert c.count("interrupted") == 0
            c.start("p1")
            await c.until(lambda: not c._leftovers())

    go()


@virtual
async def test_an_order_to_drop_what_was_gathered_may_be_lost():
    """Both of them, the coordinator's and the scheduler's: heartbeats tell."""
    async with cluster(group_max=2) as c:
        long = c.submit(6_000, max_tokens=400)
        await c.until(lambda: c.view.requests and c.view.requests[0].state == "running")
        c.broker.faults.drop_if = lambda _, sent: sent.subject == worker(WorkerId("p1")) and b"Drop" in sent.data
        await c.until(lambda: len(long.tokens) > 8)
        assert kv_held(c) == [6_400, 3_200]
        c.broker.faults.drop_if = None
        await c.until(lambda: kv_held(c) == [6_400, 0], within_s=10.0)
        await c.until(lambda: long.ended)
        assert long.error is None


@seeds(3)
def test_shorts_pause_both_workers_of_a_long_as_one(seed):
    @virtual
    async def go():
        async with cluster(group_max=2, seed=seed) as c:
            long = c.submit(8_000, max_tokens=16)
            await asyncio.sleep(0.5)
            while not long.tokens and not long.ended:
                c.submit(c.random.randint(20, 300), max_tokens=4)
                await asyncio.sleep(c.random.uniform(0.05, 0.4))
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert c.count("pauses") > 3
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)
            assert c.count("interrupted") == 0
            stops = [engine.stops for name, engine in c.engines().items() if name.startswith("p")]
            assert min(stops) > 0
            if not c.count("parted"):  # else rank 0 went on alone
                assert min(stops) == max(stops), "every stop is a stop of both"
            assert computed_once(c) == 1

    go()


@virtual
async def test_shorts_share_the_steps_of_a_long_that_decodes_on_three_workers():
    async with cluster(prefill=3, group_max=3, group_gathers=False) as c:
        long = c.submit(3_000, max_tokens=120)
        await c.until(lambda: len(long.tokens) > 3)
        for _ in range(20):
            c.submit(c.random.randint(20, 400), max_tokens=6)
            await asyncio.sleep(0.15)
        assert not long.ended
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert [answer.error for answer in c.answers] == [None] * 21
        assert c.count("interrupted") == 0


@pytest.mark.parametrize("switches", [MODES[name] for name in SWITCHES], ids=SWITCHES)
def test_mixed_load_with_groups_under_every_policy_and_switch(switches):
    @virtual
    async def go():
        async with cluster(prefill=3, decode=2, group_max=3, **switches) as c:
            for number in range(24):
                long = number % 6 == 0
                tokens = c.random.randint(1_500, 4_000) if long else c.random.randint(1, 300)
                c.submit(tokens, max_tokens=60 if long else 5)
                await asyncio.sleep(c.random.expovariate(12.0))
            await c.until(lambda: all(answer.ended for answer in c.answers), within_s=300.0)
            assert [answer.error for answer in c.answers] == [None] * 24
            assert c.count("interrupted") == 0
            # Reservation sets one of three replicas aside for longs.
            assert (computed_once(c) > 0) == (switches.get("policy") != "reservation")

    go()


@pytest.mark.parametrize("name", ["p0", "p1"])
@pytest.mark.parametrize("phase", ["forming", "prefilling", "paused", "decoding"])
def test_a_lost_rank_frees_the_other_and_the_long_is_served_again(name, phase):
    @virtual
    async def go():
        async with cluster(group_max=2) as c:
            long = c.submit(6_000, max_tokens=60)
            short = None
            match phase:
                case "forming":
                    await c.until(lambda: c.view.requests)
                case "prefilling":
                    await asyncio.sleep(0.7)
                case "paused":
                    await asyncio.sleep(0.7)
                    short = c.submit(900, max_tokens=3)
                    await c.until(lambda: c.count("pauses"))
                case "decoding":
                    await c.until(lambda: len(long.tokens) > 10)
            other = "p1" if name == "p0" else "p0"
            await c.kill(name)
            await c.until(lambda: is_free(c, other, long), within_s=1.0)
            await asyncio.sleep(2.0)
            c.start(name)
            await c.until(lambda: long.ended and (short is None or short.ended))
            assert long.error is None
            assert short is None or short.error is None

    go()


@pytest.mark.parametrize("delay_s", [0.001, 0.03, 0.7, 2.0, 3.5])
def test_a_shared_long_is_cancelled_in_every_phase(delay_s):
    @virtual
    async def go():
        async with cluster(group_max=2) as c:
            long = c.submit(6_000, max_tokens=100)
            await asyncio.sleep(delay_s)
            await c.cancel(long)
            after = c.submit(3_000, max_tokens=5)
            await c.until(lambda: after.ended)
            assert after.error is None

    go()


@seeds(5)
def test_processes_die_at_random_with_groups(seed):
    async def scenario(c):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=5.0))
            tasks.create_task(kill_and_restart(c, 3))

    run(scenario, seed=seed, group_max=2)


@seeds(4)
def test_messages_are_lost_and_connections_break_with_groups(seed):
    async def scenario(c):
        c.broker.faults.drop_share = c.random.choice((0.005, 0.02))
        c.broker.faults.delay_s = (0.0, c.random.choice((0.0, 0.02, 0.2)))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load(c, 12.0, rate=5.0))
            tasks.create_task(cut_and_heal(c, 1))

    run(scenario, seed=seed, group_max=2)


@virtual
async def test_shorts_that_share_the_steps_of_a_long_outlive_it():
    async with cluster(group_max=2) as c:
        for _ in range(10):
            long = c.submit(1_500, max_tokens=400)
            await c.until(lambda long=long: len(long.tokens) > 3)
            for _ in range(6):
                c.submit(c.random.randint(100, 400), max_tokens=4)
                await asyncio.sleep(c.random.uniform(0.0, 0.03))
            await c.cancel(long)
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert c.count("placed_colocate") > 20
        assert c.count("interrupted") == 0
