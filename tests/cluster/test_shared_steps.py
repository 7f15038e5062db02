"""Longs that decode on several workers and shorts that share their steps: what each of them waits for the other, and
two longs at a time among two hundred shorts. Timed engines, virtual time."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from common.runtime.virtual_time import run_virtual
from tests.cluster.world import SHAPE, Answer, Cluster, cluster

ROW_STEP_S = SHAPE.step_cost.pass_s + 2e-3
"""A step of a long's decode that nobody shares: the fixed part, one token, its attention."""


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


async def decode_beside_shorts(ranks: int, itl_ms_max: float) -> tuple[list[float], int]:
    """Seconds between the tokens of a long whose workers have shorts all the time; and how many shorts there were."""
    worker = {"long_itl_ms_max": itl_ms_max}
    async with cluster(prefill=ranks, group_max=ranks, decode=2, worker=worker, group_gathers=False) as c:
        long = c.submit(3_000, max_tokens=50)
        await c.until(lambda: len(long.tokens) > 3)
        while not long.ended:
            if sum(not answer.ended for answer in c.answers) < 6 * ranks:
                c.submit(c.random.randint(60, 190), max_tokens=2)
            await asyncio.sleep(c.random.expovariate(20.0 * ranks))
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert [answer.error for answer in c.answers] == [None] * len(c.answers)
        assert c.count("interrupted") == 0
        return [later - earlier for earlier, later in pairwise(long.token_s[3:])], c.count("placed_colocate")


@pytest.mark.parametrize(("ranks", "itl_ms_max"), [(1, 70.0), (2, 70.0), (3, 70.0)])
def test_a_longs_inter_token_latency_stays_within_its_bound(ranks: int, itl_ms_max: float) -> None:
    kept, shorts = run_virtual(decode_beside_shorts(ranks, itl_ms_max))
    free, _ = run_virtual(decode_beside_shorts(ranks, 10_000.0))
    assert shorts > 5 * ranks
    assert percentile(kept, 0.99) <= itl_ms_max / 1e3
    assert percentile(free, 0.99) > itl_ms_max / 1e3, "it is the bound that does it"
    assert sum(kept) / len(kept) > 1.5 * ROW_STEP_S, "shorts did share the steps"


async def short_by_short(ranks: int, *, beside_a_long: bool) -> list[float]:
    """TTFT of shorts that come one at a time, at the same moments in both cases."""
    async with cluster(prefill=ranks, group_max=ranks, decode=2, group_gathers=False) as c:
        long = c.submit(3_000, max_tokens=600) if beside_a_long else None
        if long is not None:
            await c.until(lambda: len(long.tokens) > 3)
        shorts: list[Answer] = []
        for number in range(24):
            short = c.submit(10 + 7 * number, max_tokens=1)
            await c.until(lambda short=short: short.ended)
            await asyncio.sleep(0.0137 * (number % 5))
            shorts.append(short)
        assert long is None or not long.ended
        if long is not None:
            await c.cancel(long)
        return [short.ttft_s for short in shorts]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_short_loses_against_an_idle_worker_no_more_than_the_step_that_runs_and_the_rows_share(ranks: int) -> None:
    idle = run_virtual(short_by_short(ranks, beside_a_long=False))
    shared = run_virtual(short_by_short(ranks, beside_a_long=True))
    lost = [beside - alone for alone, beside in zip(idle, shared, strict=True)]
    # The step it came into, and in its own the row; a group's rank may wait as long for the others.
    assert max(lost) <= 2 * ROW_STEP_S
    assert sum(lost) / len(lost) <= ROW_STEP_S


async def two_longs(c: Cluster, *, second_when_first_decodes: bool) -> tuple[list[set[str]], list[Answer]]:
    """Two longs, and 200 shorts meanwhile. Returns on which workers each long was, and the shorts."""
    first = c.submit(5_000, max_tokens=150)
    if second_when_first_decodes:
        await c.until(lambda: len(first.tokens) > 3)
    second = c.submit(5_000, max_tokens=150)
    await c.until(lambda: c.view is not None and sum(r.state == "running" for r in c.view.requests) >= 1)
    assert c.view is not None
    on = {r.request_id: set(r.workers) for r in c.view.requests}
    shorts: list[Answer] = []
    while len(shorts) < 200:
        shorts.append(c.submit(c.random.randint(5, 250), max_tokens=3))
        await asyncio.sleep(c.random.expovariate(25.0))
    assert not second.ended
    await c.until(lambda: all(answer.ended for answer in c.answers))
    return [on[first.request_id], on[second.request_id]], shorts


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("overlapping", [False, True])
def test_two_longs_and_two_hundred_shorts(overlapping: bool, gathers: bool) -> None:
    """Where the first gathers its KV on one worker, the second, which comes when it decodes, has two others."""

    async def alone_s() -> float:
        async with cluster(prefill=2, group_max=2, group_gathers=gathers) as c:
            long = c.submit(5_000, max_tokens=150)
            await c.until(lambda: long.ended)
            return long.token_s[-1] - long.asked_s

    async def main() -> tuple[list[float], list[float]]:
        workers = 3 if overlapping else 4
        async with cluster(prefill=workers, group_max=2, decode=2, group_gathers=gathers) as c:
            (first, second), shorts = await two_longs(c, second_when_first_decodes=overlapping)
            assert len(second) == 2
            assert len(first) == (1 if overlapping and gathers else 2)
            assert bool(first & second) is (overlapping and not gathers)
            assert [answer.error for answer in c.answers] == [None] * 202
            assert c.count("interrupted") == 0
            longs = [answer for answer in c.answers if answer.max_tokens > 3]
            return [long.token_s[-1] - long.asked_s for long in longs], [short.ttft_s for short in shorts]

    alone = run_virtual(alone_s())
    longs_s, ttft_s = run_virtual(main())
    assert max(longs_s) < 4 * alone
    assert max(ttft_s) < 1.0
