"""One process is active, the others stand by."""

from __future__ import annotations

import asyncio

import pytest

from common.runtime.lease import Lease, LeaseLost
from common.runtime.store_memory import MemoryStore
from common.runtime.virtual_time import virtual

KEY = "lease"
TTL_S = 4.0


@virtual
async def test_a_standby_waits_and_gets_a_higher_term() -> None:
    store = MemoryStore()
    first, second = Lease(store, KEY, "a", TTL_S), Lease(store, KEY, "b", TTL_S)
    term = await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    keeping = asyncio.create_task(first.keep())
    await asyncio.sleep(10 * TTL_S)
    assert not waiting.done()
    keeping.cancel()
    await first.release()
    assert await asyncio.wait_for(waiting, TTL_S) > term


@virtual
async def test_a_lease_that_ran_out_while_the_store_was_away_goes_on() -> None:
    store = MemoryStore()
    lease = Lease(store, KEY, "a", TTL_S)
    await lease.acquire()
    keeping = asyncio.create_task(lease.keep())
    for _ in range(2):
        store.down = True
        await asyncio.sleep(5 * TTL_S)
        store.down = False
        await asyncio.sleep(2 * TTL_S)
        assert not keeping.done()
        assert await store.renew_lease(KEY, "a", TTL_S)
    keeping.cancel()


@pytest.mark.parametrize("held_still", [True, False])
def test_a_lease_that_another_held_meanwhile_is_lost(held_still: bool) -> None:
    @virtual
    async def run() -> None:
        store = MemoryStore()
        lease = Lease(store, KEY, "a", TTL_S)
        await lease.acquire()
        keeping = asyncio.create_task(lease.keep())
        await store.release_lease(KEY, "a")  # as if it had run out unnoticed
        await store.acquire_lease(KEY, "b", 100.0)
        if not held_still:
            await store.release_lease(KEY, "b")
        with pytest.raises(LeaseLost, match="no longer ours"):
            await asyncio.wait_for(keeping, TTL_S)
        await lease.release()
        assert await store.renew_lease(KEY, "b", 1.0) is held_still

    run()
