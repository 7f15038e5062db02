"""Writes that nothing waits for: they arrive in the end, are renewed, and lapse with their process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.runtime.store_memory import MemoryStore
from common.runtime.virtual_time import virtual
from common.runtime.write_behind import GATHER_S, WRITES_PER_COMMIT_MAX, WriteBehind

TTL_S = 3.0


@asynccontextmanager
async def behind(store: MemoryStore) -> AsyncIterator[WriteBehind]:
    kept = WriteBehind(store, ttl_s=TTL_S, encode=bytes)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(kept.run())
        yield kept
        running.cancel()


@virtual
async def test_the_last_word_per_key_arrives_and_is_renewed():
    store = MemoryStore()
    async with behind(store) as kept:
        kept.put("a", b"1")
        kept.put("a", b"2")
        kept.put("b", b"1")
        kept.delete("b")
        await asyncio.sleep(10 * TTL_S)
        assert await store.scan("") == {"a": b"2"}


@virtual
async def test_words_of_a_dead_process_lapse():
    store = MemoryStore()
    async with behind(store) as kept:
        kept.put("a", b"1")
        await asyncio.sleep(2 * GATHER_S)
        assert await store.get("a") == b"1"
    await asyncio.sleep(TTL_S + 0.1)
    assert await store.scan("") == {}


@virtual
async def test_an_outage_is_made_good_and_a_store_that_came_back_empty_too():
    store = MemoryStore()
    async with behind(store) as kept:
        store.down = True
        kept.put("a", b"1")
        kept.put("b", b"1")
        await asyncio.sleep(2 * TTL_S)
        kept.put("a", b"2")
        kept.delete("b")
        store.down = False
        await asyncio.sleep(TTL_S)
        assert await store.scan("") == {"a": b"2"}
        store._values.clear()
        await asyncio.sleep(TTL_S)
        assert await store.scan("") == {"a": b"2"}


@virtual
async def test_a_word_said_while_an_older_one_is_on_its_way_is_not_lost():
    class SlowStore(MemoryStore):
        async def commit(self, writes):
            await asyncio.sleep(0.2)
            await super().commit(writes)

    store = SlowStore()
    async with behind(store) as kept:
        kept.put("a", b"1")
        await asyncio.sleep(GATHER_S + 0.1)
        kept.put("a", b"2")
        await asyncio.sleep(0.5)
        assert await store.get("a") == b"2"


@virtual
async def test_many_words_go_in_bounded_commits():
    store = MemoryStore()
    async with behind(store) as kept:
        for number in range(3 * WRITES_PER_COMMIT_MAX):
            kept.put(f"k{number}", b"1")
        await asyncio.sleep(2 * GATHER_S)
        assert store.commits == 3


@virtual
async def test_close_takes_everything_back_as_far_as_the_store_answers():
    store = MemoryStore()
    async with behind(store) as kept:
        kept.put("a", b"1")
        await asyncio.sleep(2 * GATHER_S)
        assert await store.get("a") == b"1"
    store.down = True
    await kept.close()
    store.down = False
    await kept.close()
    assert await store.scan("") == {}


@virtual
async def test_what_is_taken_back_at_once_never_reaches_the_store():
    store = MemoryStore()
    commits, commit = [], store.commit

    async def counting(writes):
        commits.append(len(writes))
        await commit(writes)

    store.commit = counting
    async with behind(store) as kept:
        for number in range(100):
            kept.put(f"short-{number}", b"1")
            kept.put(f"short-{number}", b"2")
            kept.delete(f"short-{number}")
        await asyncio.sleep(2 * GATHER_S)
        assert sum(commits) == 0
        kept.put("long", b"1")
        await asyncio.sleep(2 * GATHER_S)
        kept.delete("long")
        await asyncio.sleep(2 * GATHER_S)
        assert commits == [1, 1]
        assert await store.scan("") == {}
        assert not kept._said


@virtual
async def test_a_word_that_lives_long_is_written_though_others_come_and_go_around_it():
    store = MemoryStore()
    encoded = []

    def encode(value: bytes) -> bytes:
        encoded.append(value)
        return value

    kept = WriteBehind(store, ttl_s=TTL_S, encode=encode)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(kept.run())
        for number in range(50):
            kept.put(f"short-{number}", b"short")
            if number == 20:
                kept.put("long", b"long")
            await asyncio.sleep(0.01)
            kept.delete(f"short-{number}")
        assert encoded == [b"long"], "what lived ten milliseconds cost nothing"
        assert await store.scan("") == {"long": b"long"}
        running.cancel()
