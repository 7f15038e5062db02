"""Each process of a real cluster is killed once while shorts and longs run; clients that leave leave nothing behind."""

from __future__ import annotations

import asyncio
import random
import signal

import pytest

from tests.e2e.served import Question, Served, clients, serving

HANG_S = 30.0
"""A client that has neither its tokens nor an error this long after the fault hangs."""
ERROR_S = 10.0
"""An error comes at most this long after the fault."""
LONG = 2_600
VERY_LONG = 4_500
"""Travels by reference."""


@pytest.fixture
def running(tmp_path):
    with serving(tmp_path) as found:
        yield found


async def under_load(served: Served) -> list[Question]:
    """Shorts that decode, prefill and wait, a long that prefills, another one beside or behind it."""
    longs = [served.ask(LONG, 12), served.ask(VERY_LONG, 12)]
    shorts = [served.ask(20 + 15 * number, 40) for number in range(8)]
    await asyncio.wait_for(asyncio.gather(*(short.began.wait() for short in shorts[:4])), HANG_S)
    shorts += [served.ask(60, 40) for _ in range(4)]
    assert not any(long.ended_s for long in longs)
    return longs + shorts


async def check_after(served: Served, fault_s: float, questions: list[Question]) -> None:
    await served.ended(questions, HANG_S)
    for question in questions:
        question.check()
        assert question.ended_s is not None
        assert not question.error or question.ended_s - fault_s < ERROR_S, f"a late error: {question}"


async def check_serves_again(served: Served, *, prompts: bool = True) -> None:
    """New requests are served, and when they have gone nothing of anybody is left."""
    again = [served.ask(80, 8), served.ask(LONG, 8)]
    await served.ended(again, HANG_S)
    for question in again:
        question.check()
        assert not question.error
    await served.settled(prompts=prompts)


@pytest.mark.parametrize("role", ["prefill-0", "prefill-1", "decode-0", "scheduler", "sp-coordinator", "nats", "redis"])
async def test_a_killed_process_costs_time_and_nothing_else(running, role):
    async with clients(running) as served:
        questions = await under_load(served)
        fault_s = asyncio.get_running_loop().time()
        assert served.kill(role)
        await check_after(served, fault_s, questions)
        assert [question.error for question in questions] == [""] * len(questions)
        await check_serves_again(served)


async def test_clients_of_a_killed_router_see_it_at_once_and_what_ran_for_them_ends(running):
    async with clients(running) as served:
        questions = await under_load(served)
        fault_s = asyncio.get_running_loop().time()
        assert served.kill("router")
        await check_after(served, fault_s, questions)
        assert all(question.error for question in questions)
        running.until("router runs again")
        await served.until(lambda view: len(view.routers) == 1 and not view.requests)
        await check_serves_again(served, prompts=False)


@pytest.mark.parametrize("tokens", [60, VERY_LONG])
async def test_a_client_that_leaves_frees_its_kv_at_both_ends(running, tokens):
    async with clients(running) as served:
        waiting = [served.ask(tokens, 200) for _ in range(4)]
        if tokens == VERY_LONG:
            await served.until(lambda view: sum(r.state == "running" for r in view.requests) == 2)
        else:
            await asyncio.gather(*(question.began.wait() for question in waiting))
        assert any(worker.kv_reserved_tokens for worker in (await served.until(bool)).workers)
        for question in waiting:
            await served.leave(question)
        await served.settled()
        view = await served.until(bool)
        assert view.counters["cancelled"] == 4


async def test_ten_longs_whose_clients_left_do_not_hold_up_a_short(running):
    async with clients(running) as served:
        longs = [served.ask(VERY_LONG, 200) for _ in range(10)]
        await served.until(lambda view: sum(r.state == "running" for r in view.requests) == 2)
        await asyncio.gather(*(served.leave(long) for long in longs))
        short = served.ask(60, 2)
        await served.ended([short], HANG_S)
        short.check()
        view = await served.until(bool)
        assert not short.error
        assert not any(request.length_class == "long" for request in view.requests)
        assert view.counters.get("pauses", 0) == 0, "a cancelled long was still there to be paused"
        await served.settled()


@pytest.mark.skipif("not config.getoption('--nightly')", reason="half a minute each; in virtual time in tests/cluster")
@pytest.mark.parametrize("name", ["prefill-0", "prefill-1"])
@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_a_worker_that_hangs_costs_the_group_its_lease_and_nothing_else(tmp_path, measured, phase, name):
    with serving(tmp_path, "--group-max", "2") as running:
        async with clients(running) as served:
            long = served.ask(VERY_LONG, 60)
            if phase == "decoding":
                await asyncio.wait_for(long.began.wait(), HANG_S)
            else:
                await served.until(lambda view: any(r.state == "running" for r in view.requests))
            view = await served.until(bool)
            assert len(view.requests[0].workers) == 2
            assert served.kill(name, signal.SIGSTOP)
            fault_s = asyncio.get_running_loop().time()
            shorts = [served.ask(60, 5) for _ in range(4)]
            await served.ended([long, *shorts], HANG_S)
            for question in [long, *shorts]:
                question.check()
                assert not question.error
            last_s = max(short.ended_s or 0.0 for short in shorts)
            measured(
                f"{name} hangs while a group is {phase}: the last short was served after {last_s - fault_s:.1f} s, the "
                f"long after {(long.ended_s or 0.0) - fault_s:.1f} s"
            )
            assert served.kill(name, signal.SIGCONT)
            await check_serves_again(served)


@pytest.mark.skipif("not config.getoption('--nightly')", reason="two minutes each")
@pytest.mark.parametrize("seed", range(4))
async def test_random_kills_under_random_load(tmp_path, seed):
    """Also of two at once, and of what is just coming back. No client hangs, and none gets a wrong token."""
    rng = random.Random(seed)
    roles = ["prefill-0", "prefill-1", "decode-0", "scheduler", "sp-coordinator", "nats", "redis"]
    with serving(tmp_path, "--restarts-max", "100") as running:
        async with clients(running) as served:
            loop, kills = asyncio.get_running_loop(), 0
            end_s, kill_s = loop.time() + 90.0, loop.time() + 2.0
            while loop.time() < end_s:
                served.ask(rng.choice([20, 60, 150, 300] * 5 + [LONG, VERY_LONG]), rng.randint(1, 40))
                if rng.random() < 0.1:
                    await served.leave(rng.choice(served.asked))
                if loop.time() > kill_s:
                    kill_s = loop.time() + rng.choice([0.1, 0.5, 5.0, 6.0, 7.0, 8.0])
                    kills += served.kill(rng.choice(roles))
                await asyncio.sleep(rng.expovariate(3.0))
            await served.ended(served.asked, 2 * HANG_S)
            for question in served.asked:
                question.check()
            assert kills > 5
            await served.settled()
