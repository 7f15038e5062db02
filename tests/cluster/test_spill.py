"""Longs that fill the KV of their replicas make room for shorts: every role's service and core, timed engines, virtual
time. In each state of a move something is lost or not wanted any more; nothing stays held, here or elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from common.messages.locations import KvLocation
from common.policy.lifecycle import RequestState
from common.runtime import keys
from common.runtime.virtual_time import run_virtual, virtual
from common.runtime.wire import decode_record
from common.runtime.write_behind import GATHER_S
from services.engine.timed_prefill import TimedPrefillEngine
from tests.cluster.test_groups import computed_once
from tests.cluster.world import SHAPE, Answer, Cluster, cluster

MOVED = (RequestState.SPILLING, RequestState.SPILLED, RequestState.RESTORING)
FULL_TOKENS = 3_700
"""A long of so many leaves a replica KV for less than 400 tokens."""
SLOW = replace(SHAPE, kv_capacity_tokens=4_096, spill_bytes_s=5e5, spill_to="disk")
"""So that to move a share takes some tenths of a second."""


def crowded(**options: Any) -> Any:
    return cluster(**{"spill": "memory", "shape": SLOW, "shorts_spare": 0.0} | options)


async def reach(c: Cluster, state: RequestState | None = None) -> tuple[Answer, Answer]:
    """A long on all workers, half done, and a short for which there is no room: until the long is in this state."""
    workers = sum(name.startswith("p") for name in c.nodes)
    long = c.submit(FULL_TOKENS * workers, max_tokens=16)
    await asyncio.sleep(1.0)
    short = c.submit(800, max_tokens=3)
    if state is not None:
        await c.until(lambda: state_of(c, long) is state)
    return long, short


def state_of(c: Cluster, answer: Answer) -> RequestState | None:
    request = None if c.scheduler is None else c.scheduler.cluster.requests.get(cast(Any, answer.request_id))
    return None if request is None else request.state


def elsewhere(c: Cluster) -> int:
    """Bytes that engines hold outside their caches."""
    return sum(engine._mover.used_bytes for engine in c.engines().values() if isinstance(engine, TimedPrefillEngine))


@pytest.mark.parametrize("workers", [1, 2])
def test_shorts_are_served_while_a_long_that_filled_all_kv_is_elsewhere(workers: int) -> None:
    async def main() -> None:
        async with crowded(prefill=workers, group_max=workers) as c:
            long, short = await reach(c)
            assert not long.tokens
            for _ in range(5):
                c.submit(c.random.randint(400, 900), max_tokens=3)
                await asyncio.sleep(1.0)
            await c.until(lambda: short.ended)
            assert not long.tokens, "without it, the short would wait for the long's end"
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)
            assert c.count("spills") >= 1
            assert c.count("interrupted") == 0
            assert computed_once(c) == workers - 1
            assert elsewhere(c) == 0

    run_virtual(main())


@virtual
async def test_without_it_shorts_wait_until_the_long_is_done():
    async with crowded(prefill=1, spill="off") as c:
        long, short = await reach(c)
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert short.first_token_s > long.token_s[-1]
        assert c.count("spills") == 0


@pytest.mark.parametrize("state", MOVED)
def test_where_it_lies_is_written_down_and_the_books_are_those_of_the_workers(state: RequestState) -> None:
    async def main() -> None:
        async with crowded(prefill=2, group_max=2) as c:
            long, _ = await reach(c, state)
            await asyncio.sleep(0.01)
            assert state_of(c, long) is state
            scheduler = c.scheduler
            assert scheduler is not None
            booked = {worker.worker_id: worker.kv_reserved for worker in scheduler.cluster.replicas.values()}
            assert booked == {name: c.engines()[name].kv_used_tokens for name in booked}
            await asyncio.sleep(2 * GATHER_S if state is RequestState.SPILLED else 0.0)  # records follow behind
            written = await c.store.get(keys.kv(cast(Any, long.request_id), cast(Any, "p0")))
            assert written is not None
            found = decode_record(written, KvLocation)
            if state is RequestState.SPILLED:
                assert (found.state, found.moved_to, found.reserved_tokens) == ("spilled", "disk", 0)
                assert elsewhere(c) > 0
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert c.count("interrupted") == 0

    run_virtual(main())


@pytest.mark.parametrize("state", MOVED)
@pytest.mark.parametrize("what", ["cancel", "p0", "p1", "coordinator", "scheduler"])
def test_in_every_state_what_is_lost_or_cancelled_leaves_nothing_behind(state: RequestState, what: str) -> None:
    async def main() -> None:
        async with crowded(prefill=2, group_max=2) as c:
            long, _ = await reach(c, state)
            if what == "cancel":
                await c.cancel(long)
                await c.until(lambda: elsewhere(c) == 0, 1.0)
            else:
                await c.kill(what)
                await asyncio.sleep(0.5)
                c.start(what)
            await c.until(lambda: all(answer.ended for answer in c.answers))
            assert [answer.error for answer in c.answers] == [None] * len(c.answers)
            assert elsewhere(c) == 0

    run_virtual(main())


@virtual
async def test_where_there_is_no_room_elsewhere_it_goes_on_as_without_it():
    shape = replace(SLOW, spill_bytes_max=1_000)
    async with crowded(prefill=2, group_max=2, shape=shape) as c:
        long, short = await reach(c)
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert short.first_token_s > long.token_s[-1]
        assert c.count("spills") == 0
        assert c.count("spills_refused") == 1
        assert c.count("interrupted") == 0
        assert any("NotSpilled" in line for line in c.scheduler.story(cast(Any, long.request_id)))


@virtual
async def test_a_worker_that_moves_nothing_is_not_asked():
    async with crowded(prefill=1, shape=replace(SLOW, spill_bytes_max=0)) as c:
        await reach(c)
        await c.until(lambda: all(answer.ended for answer in c.answers))
        assert c.count("spills_refused") == c.count("spills") == 0
