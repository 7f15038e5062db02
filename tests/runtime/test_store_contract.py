"""One contract, two stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.runtime import keys
from common.runtime.store import Delete, Put, Store, StoreError, Touch
from common.runtime.store_memory import MemoryStore
from common.runtime.store_redis import connect_redis
from services.embedded import EmbeddedServer

WAIT_S = 10.0
SHORT_S = 0.06
"""A time to live that a test waits out."""
LONG_S = 60.0


class MemoryWorld:
    def __init__(self) -> None:
        self.store: Store = MemoryStore()

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        assert isinstance(self.store, MemoryStore)
        self.store.down = True
        yield
        self.store.down = False


class RedisWorld:
    def __init__(self, server: EmbeddedServer, store: Store) -> None:
        self.server = server
        self.store = store

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        await self.server.stop()
        yield
        await self.server.start()


World = MemoryWorld | RedisWorld


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "memory":
        yield MemoryWorld()
        return
    async with EmbeddedServer.redis(folder=tmp_path) as server:
        store = await connect_redis(server.url, patience_s=0.2)
        yield RedisWorld(server, store)
        await store.close()


@pytest.fixture
def store(world: World) -> Store:
    return world.store


async def gone(store: Store, key: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while await store.get(key) is not None:  # noqa: ASYNC110 - the server's clock decides
            await asyncio.sleep(0.005)


async def test_put_get_delete(store: Store) -> None:
    assert await store.get("k") is None
    await store.commit([Put("k", b"\x00\xff")])
    assert await store.get("k") == b"\x00\xff"
    await store.commit([Put("k", b"newer")])
    assert await store.get("k") == b"newer"
    await store.commit([Delete("k"), Delete("never there")])
    assert await store.get("k") is None


async def test_writes_of_one_commit_apply_in_order(store: Store) -> None:
    await store.commit([Put("a", b"1"), Delete("a"), Put("b", b"1"), Put("b", b"2")])
    assert (await store.get("a"), await store.get("b")) == (None, b"2")
    await store.commit([])


async def test_a_prompt_of_a_million_tokens_fits(store: Store) -> None:
    prompt = bytes(range(256)) * (4_000_000 // 256)
    await store.commit([Put("prompt", prompt, LONG_S)])
    assert await store.get("prompt") == prompt


async def test_a_time_to_live_ends(store: Store) -> None:
    await store.commit([Put("brief", b"1", SHORT_S), Put("kept", b"2", LONG_S), Put("ever", b"3")])
    await gone(store, "brief")
    assert await store.scan("") == {"kept": b"2", "ever": b"3"}


async def test_touch_renews_only_what_is_there(store: Store) -> None:
    await store.commit([Put("touched", b"1", SHORT_S), Put("not", b"1", SHORT_S)])
    await store.commit([Touch("touched", LONG_S), Touch("absent", LONG_S)])
    await gone(store, "not")
    assert await store.get("touched") == b"1"
    assert await store.get("absent") is None


async def test_a_put_without_ttl_ends_an_earlier_one(store: Store) -> None:
    await store.commit([Put("k", b"1", SHORT_S), Put("brief", b"1", SHORT_S)])
    await store.commit([Put("k", b"2")])
    await gone(store, "brief")
    assert await store.get("k") == b"2"


async def test_scan_takes_the_prefix_literally(store: Store) -> None:
    names = ["kv:a*:w", "kv:ab:w", "kv:a?:w", "kv:[a]:w", "kw:a*:w"]
    await store.commit([Put(name, name.encode()) for name in names])
    assert await store.scan("kv:a*") == {"kv:a*:w": b"kv:a*:w"}
    assert set(await store.scan("kv:")) == set(names[:4])
    assert set(await store.scan("kv:[a")) == {"kv:[a]:w"}
    assert await store.scan("absent") == {}


async def test_scan_finds_all_of_many(store: Store) -> None:
    many = {f"many:{i}": str(i).encode() for i in range(2_500)}
    await store.commit([Put(key, value) for key, value in many.items()])
    assert await store.scan("many:") == many


async def test_a_lease_has_one_holder_and_a_rising_term(store: Store) -> None:
    first = await store.acquire_lease("lease", "anna", LONG_S)
    assert first is not None
    assert first >= 1
    assert await store.acquire_lease("lease", "bert", LONG_S) is None
    assert await store.acquire_lease("lease", "anna", LONG_S) == first
    await store.release_lease("lease", "bert")
    assert await store.acquire_lease("lease", "bert", LONG_S) is None
    await store.release_lease("lease", "anna")
    second = await store.acquire_lease("lease", "bert", LONG_S)
    assert second is not None
    assert second > first
    assert await store.get("lease") == b"bert"
    last = await store.get(keys.term("lease"))
    assert last is not None
    assert int(last) == second


async def test_a_lease_that_ran_out_is_lost_and_free(store: Store) -> None:
    first = await store.acquire_lease("lease", "anna", SHORT_S)
    assert await store.renew_lease("lease", "anna", SHORT_S)
    assert not await store.renew_lease("lease", "bert", SHORT_S)
    await gone(store, "lease")
    assert not await store.renew_lease("lease", "anna", LONG_S)
    second = await store.acquire_lease("lease", "anna", LONG_S)
    assert first is not None
    assert second is not None
    assert second > first


async def test_of_many_who_want_the_lease_one_gets_it(store: Store) -> None:
    terms = await asyncio.gather(*(store.acquire_lease("lease", f"owner-{i}", LONG_S) for i in range(20)))
    assert len([term for term in terms if term is not None]) == 1


async def test_leases_do_not_share_terms_or_holders(store: Store) -> None:
    assert await store.acquire_lease("one", "anna", LONG_S)
    assert await store.acquire_lease("two", "bert", LONG_S)


CALLS: list[Callable[[Store], Awaitable[object]]] = [
    lambda store: store.commit([Put("k", b"1")]),
    lambda store: store.get("k"),
    lambda store: store.scan("k"),
    lambda store: store.acquire_lease("lease", "anna", LONG_S),
    lambda store: store.renew_lease("lease", "anna", LONG_S),
    lambda store: store.release_lease("lease", "anna"),
    lambda store: store.ping(),
]


async def test_an_outage_is_an_error_within_bounds_and_then_over(world: World) -> None:
    store = world.store
    await store.commit([Put("before", b"1")])
    async with world.outage():
        for call in CALLS:
            with pytest.raises(StoreError):
                await asyncio.wait_for(call(store), WAIT_S)
    assert await store.get("before") == b"1"
    for call in CALLS:
        await call(store)


async def test_redis_restarted_while_a_commit_waits_is_only_a_pause(tmp_path: Path) -> None:
    async with EmbeddedServer.redis(folder=tmp_path) as server:
        store = await connect_redis(server.url, patience_s=WAIT_S)
        first = await store.acquire_lease("lease", "anna", LONG_S)
        await store.commit([Put("before", b"1")])
        await server.stop()
        async with asyncio.TaskGroup() as group:
            group.create_task(store.commit([Put("a", b"1"), Put("b", b"2")]))
            group.create_task(server.start())
        assert await store.scan("") == {
            "before": b"1",
            "a": b"1",
            "b": b"2",
            "lease": b"anna",
            keys.term("lease"): str(first).encode(),
        }
        await store.close()


async def test_a_term_does_not_fall_when_redis_loses_its_data() -> None:
    server = EmbeddedServer.redis()
    try:
        await server.start()
        store = await connect_redis(server.url)
        terms = [await store.acquire_lease("lease", "anna", LONG_S)]
        await server.close()  # and its temporary folder with it
        await server.start()
        assert await store.scan("") == {}
        terms.append(await store.acquire_lease("lease", "bert", LONG_S))
        await store.close()
        assert None not in terms
        assert terms == sorted(terms)
        assert terms[0] != 1
    finally:
        await server.close()


async def test_a_wrong_type_is_an_error_at_once(tmp_path: Path) -> None:
    async with EmbeddedServer.redis(folder=tmp_path) as server:
        store = await connect_redis(server.url, patience_s=1_000.0)
        await store._client.lpush("list", b"1")
        with pytest.raises(StoreError, match="WRONGTYPE"):
            await asyncio.wait_for(store.get("list"), WAIT_S)
        assert await store.scan("li") == {}
        await store.close()


async def test_a_redis_that_is_not_there_is_named_without_its_password() -> None:
    expected = r"cannot reach Redis at redis://\*\*\*@127\.0\.0\.1:1/0: connection refused"
    with pytest.raises(StoreError, match=expected) as error:
        await connect_redis("redis://:secret@127.0.0.1:1/0", patience_s=0.1)
    assert "secret" not in str(error.value)
    with pytest.raises(StoreError, match="cannot reach Redis at 127"):
        await connect_redis("127.0.0.1:6379", patience_s=0.1)
