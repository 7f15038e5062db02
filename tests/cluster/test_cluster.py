"""The whole cluster at work, in one process and virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.virtual_time import virtual
from tests.cluster.world import cluster, seeds


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


@seeds(5)
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


@virtual
async def test_mixed_load_under_fifo():
    async with cluster(policy="fifo") as c:
        for number in range(60):
            c.submit(3_000 if number % 15 == 0 else 60, max_tokens=6)
            await asyncio.sleep(c.random.expovariate(8.0))
    assert all(answer.error is None for answer in c.answers)
    assert c.count("pauses") == 0


MODES = {
    "pecsched": {},
    "fifo": {"policy": "fifo"},
    "reservation": {"policy": "reservation", "reserved_long_tokens": 5_000},
    "priority": {"policy": "priority"},
    "no preemption": {"preemption": False},
    "no disaggregation": {"disaggregation": False},
    "no colocation": {"colocation": False},
    "nothing": {"preemption": False, "disaggregation": False, "colocation": False},
    "nothing but preemption": {"disaggregation": False, "colocation": False},
    "fifo, no disaggregation": {"policy": "fifo", "disaggregation": False},
    "reservation, no disaggregation": {"policy": "reservation", "disaggregation": False},
    "priority, no disaggregation": {"policy": "priority", "disaggregation": False},
    "longs by arrival": {"long_order": "arrival"},
    "longs aging fast, shorts spared": {"long_aging": 5.0, "shorts_spare": 1.0},
}


@pytest.mark.parametrize("switches", MODES.values(), ids=MODES.keys())
def test_mixed_load_under_every_policy_and_switch(switches):
    @virtual
    async def run():
        async with cluster(prefill=3, decode=2, **switches) as c:
            for number in range(36):
                long = number % 6 == 0
                tokens = c.random.randint(1_500, 4_000) if long else c.random.randint(1, 300)
                c.submit(tokens, max_tokens=60 if long else 5)
                await asyncio.sleep(c.random.expovariate(12.0))
            await c.until(lambda: all(answer.ended for answer in c.answers), within_s=300.0)
            assert [answer.error for answer in c.answers] == [None] * 36
            assert c.count("interrupted") == 0
            paused = switches.get("policy", "pecsched") == "pecsched" and switches.get("preemption", True)
            assert (c.count("pauses") > 0) == paused
            decoded = sum(engine.steps_started for name, engine in c.engines().items() if name.startswith("d"))
            assert (decoded > 0) == switches.get("disaggregation", True)
            assert c.count("placed_colocate") == 0 or switches.get("colocation", True)
            for name, engine in c.engines().items():
                if name.startswith("p"):
                    assert max(engine.computed_tokens.values(), default=0) <= 1

    run()


@pytest.mark.parametrize("disaggregation", [True, False])
@pytest.mark.parametrize("colocation", [True, False])
def test_shorts_come_while_a_long_decodes(colocation, disaggregation):
    @virtual
    async def run():
        async with cluster(prefill=1, colocation=colocation, disaggregation=disaggregation) as c:
            long = c.submit(1_500, max_tokens=120)
            await c.until(lambda: len(long.tokens) > 3)
            before = len(long.tokens)
            shorts = []
            for _ in range(10):
                shorts.append(c.submit(150, max_tokens=6))
                await asyncio.sleep(0.2)
            assert not long.ended
            assert len(long.tokens) > before + 10, "shorts hold up a long's decode, they do not silence it"
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * 11
            shared, alone = c.count("placed_colocate"), c.count("placed_exclude")
            assert (shared, alone) == ((10, 0) if colocation else (0, 10))

    run()


@virtual
async def test_mixed_load_on_several_workers():
    async with cluster(prefill=3, decode=2) as c:
        for number in range(120):
            c.submit(c.random.randint(1_001, 5_000) if number % 15 == 0 else c.random.randint(1, 300), max_tokens=6)
            await asyncio.sleep(c.random.expovariate(10.0))
    assert all(answer.error is None for answer in c.answers)


@virtual
async def test_a_request_that_fits_nowhere_is_refused_at_the_door():
    async with cluster(prefill=1) as c:
        answer = c.submit(7_000, max_tokens=100_000)
        await c.until(lambda: answer.ended)
        assert answer.error is not None
        assert answer.error.status == 400


PHASES = {"queued or opening": 0.001, "prefilling": 0.03, "handoff or decoding": 0.1, "decoding": 0.3, "late": 0.6}


@pytest.mark.parametrize("delay_s", PHASES.values(), ids=PHASES.keys())
@pytest.mark.parametrize("tokens", [100, 3_000])
def test_cancelled_in_every_phase(tokens, delay_s):
    @virtual
    async def run():
        async with cluster(prefill=1) as c:
            answers = [c.submit(tokens, max_tokens=40) for _ in range(3)]
            await asyncio.sleep(delay_s * (20 if tokens > 1_000 else 1))
            for answer in answers[:2]:
                await c.cancel(answer)
            await c.until(lambda: answers[2].ended)
            assert answers[2].error is None

    run()


@seeds(10)
def test_cancelled_at_random_times(seed):
    @virtual
    async def run():
        async with cluster(seed=seed) as c:
            for _ in range(40):
                long = c.random.random() < 0.15
                answer = c.submit(c.random.randint(1_001, 4_000) if long else c.random.randint(1, 200), max_tokens=12)
                await asyncio.sleep(c.random.expovariate(8.0))
                victim = c.random.choice(c.answers)
                if c.random.random() < 0.5:
                    await c.cancel(victim)
                assert answer.error is None

    run()


@pytest.mark.parametrize("name", ["p0", "d0"])
@pytest.mark.parametrize("after_s", [0.01, 0.2, 1.0, 2.0, 3.0])
def test_a_killed_worker_is_survived(name, after_s):
    """What ran there is served again, with the very tokens it would have had."""

    @virtual
    async def run():
        async with cluster(prefill=2, decode=2) as c:
            for number in range(12):
                c.submit(3_000 if number % 4 == 0 else 80, max_tokens=30)
            await asyncio.sleep(after_s)
            await c.kill(name)
            await asyncio.sleep(1.0)
            c.start(name)
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * 12

    run()


@virtual
async def test_a_worker_that_never_comes_back():
    async with cluster(prefill=2, decode=2) as c:
        for _ in range(10):
            c.submit(80, max_tokens=30)
        await asyncio.sleep(0.2)
        await c.kill("p1")
        await c.kill("d1")
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert [answer.error for answer in c.answers] == [None] * 10


@virtual
async def test_without_any_worker_of_a_role_requests_end_in_a_clear_error():
    async with cluster(prefill=1, decode=1) as c:
        for tokens in (50, 3_000):
            c.submit(tokens, max_tokens=30)
        await asyncio.sleep(0.02)
        killed_s = asyncio.get_running_loop().time()
        await c.kill("p0")
        await c.until(lambda: all(answer.ended for answer in c.answers), within_s=15.0)
        assert asyncio.get_running_loop().time() - killed_s < 15.0
        for answer in c.answers:
            assert answer.error is not None
            assert answer.error.status == 503


@pytest.mark.parametrize("name", ["scheduler", "coordinator"])
@pytest.mark.parametrize("gap_s", [0.0, 6.0])
def test_a_killed_scheduler_or_coordinator_is_survived(name, gap_s):
    @virtual
    async def run():
        async with cluster() as c:
            for number in range(12):
                c.submit(3_000 if number % 6 == 0 else 80, max_tokens=30)
            await asyncio.sleep(0.5)
            await c.kill(name)
            await asyncio.sleep(gap_s)
            c.start(name)
            await asyncio.sleep(1.0)
            c.submit(80, max_tokens=5)
            c.submit(2_000, max_tokens=5)
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * 14

    run()


@pytest.mark.parametrize("name", ["scheduler", "coordinator", "p0", "d0"])
def test_stopped_in_order_and_started_again(name):
    @virtual
    async def run():
        async with cluster(prefill=2, decode=2) as c:
            for number in range(12):
                c.submit(3_000 if number % 6 == 0 else 80, max_tokens=10)
            await asyncio.sleep(0.3)
            await c.stop(name)
            c.start(name)
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * 12

    run()


@virtual
async def test_requests_of_a_killed_router_free_what_they_hold():
    async with cluster(routers=2) as c:
        lost = [c.submit(tokens, max_tokens=200, router="r1") for tokens in (80, 3_000, 80)]
        kept = c.submit(80, max_tokens=20, router="r0")
        await asyncio.sleep(1.5)
        assert any(engine.kv_used_tokens for engine in c.engines().values())
        await c.kill("r1")
        for answer in lost:
            await c.cancel(answer)
        await c.until(lambda: not c.view.requests, within_s=10.0)
        await c.until(lambda: kept.ended)
        assert kept.error is None


@pytest.mark.parametrize("name", ["scheduler", "coordinator", "p0", "d0", "r0", None])
@pytest.mark.parametrize("outage_s", [1.0, 10.0])
def test_cut_off_from_the_bus_for_a_while(name, outage_s):
    """`None`: the broker is down for everybody."""

    @virtual
    async def run():
        async with cluster(prefill=2, decode=2) as c:
            for number in range(12):
                c.submit(3_000 if number % 6 == 0 else 80, max_tokens=30)
            await asyncio.sleep(0.4)
            c.broker.cut(name)
            await asyncio.sleep(outage_s)
            c.broker.heal(name)
            await asyncio.sleep(2.0)
            c.submit(80, max_tokens=5)

    run()


@pytest.mark.parametrize("outage_s", [1.0, 10.0])
def test_without_the_store_for_a_while(outage_s):
    @virtual
    async def run():
        async with cluster() as c:
            for number in range(12):
                c.submit(3_000 if number % 6 == 0 else 80, max_tokens=30)
            await asyncio.sleep(0.4)
            c.store.down = True
            c.submit(80, max_tokens=5)
            await asyncio.sleep(outage_s)
            c.store.down = False
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * 13

    run()
