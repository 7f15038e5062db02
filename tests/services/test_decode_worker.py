"""The decode worker's shell on in-memory ports and virtual time, fed by a prefill engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from common.errors import StartupError
from common.messages.cluster import WorkerLeft
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished
from common.messages.locations import KvLocation, WorkerLease
from common.messages.prefill import KvReleased
from common.metrics import Metrics
from common.runtime import keys, subjects
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.virtual_time import virtual
from common.runtime.wire import decode_record
from common.runtime.write_behind import GATHER_S
from common.settings import DecodeWorkerSettings
from services.decode_worker.main import load_engine, serve
from services.decode_worker.service import DecodeWorker
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.transport import open_data_plane
from services.worker.process import WorkerMeans
from tests.services.decode_world import SHAPE, WORKER, DecodeWorld, decode_world, spec_of, wanted_tokens


async def serve_one(world: DecodeWorld, request_id: str, **more: object) -> None:
    """One request from its order to its release, with the right tokens."""
    spec = spec_of(request_id, **more)
    await world.expect(spec)
    await world.hand_over(spec)
    await world.until(lambda: world.released(request_id, spec.attempt))
    assert world.tokens(request_id) == wanted_tokens(spec)


@virtual
async def test_a_request_from_its_order_to_its_release() -> None:
    async with decode_world() as world:
        spec = spec_of("a", max_tokens=80)
        await world.expect(spec)
        await world.hand_over(spec)
        await asyncio.sleep(2 * GATHER_S)
        assert world.messages
        assert not world.released("a")
        record = await world.store.get(keys.kv("a", WORKER))
        assert record is not None
        place = decode_record(record, KvLocation)
        assert (place.state, place.tokens, place.layers, place.reserved_tokens) == ("decoding", 20, 4, 100)
        await world.until(lambda: world.released("a"))
        assert world.tokens("a") == wanted_tokens(spec)
        assert [type(message) for message in world.said] == [DecodeFinished]
        (finished,) = world.said
        assert 0.0 < finished.first_layer_received_s <= finished.last_layer_received_s
        assert (finished.finish_reason, finished.generated, finished.kv_tokens) == ("length", 80, 100)
        assert all(message.cause for message in world.said)
        assert world.engine.kv_used_tokens == 0
        await asyncio.sleep(2 * GATHER_S)
        assert await world.kept() == set()


@virtual
async def test_all_share_steps_and_each_router_hears_once_per_step() -> None:
    async with decode_world() as world:
        specs = [spec_of(name, 10 + number, router=f"r{number % 2}") for number, name in enumerate("abcd")]
        for spec in specs:
            await world.expect(spec)
        for spec in specs:  # one prefill engine: one after the other
            await world.hand_over(spec)
        await world.until(lambda: all(world.released(spec.request_id) for spec in specs))
        for spec in specs:
            assert world.tokens(spec.request_id) == wanted_tokens(spec)
        assert world.engine.steps_started < 4 * 4
        shared = [message for message in world.messages if len(message.chunks) > 1]
        assert shared
        for message in world.messages:
            assert {f"r{'abcd'.index(chunk.request_id) % 2}" for chunk in message.chunks} == {message.router_id}


@virtual
async def test_kv_may_come_before_its_order() -> None:
    async with decode_world() as world:
        spec = spec_of("a")
        sending = asyncio.ensure_future(world.hand_over(spec))
        await asyncio.sleep(0.5)
        await world.expect(spec)
        await sending
        await world.until(lambda: world.released("a"))
        assert world.tokens("a") == wanted_tokens(spec)


@virtual
async def test_kv_that_nobody_announces_is_refused_before_the_sender_gives_up() -> None:
    async with decode_world() as world:
        await world.hand_over(spec_of("a"))
        assert "nobody announced it" in world.failed_transfers["a"]
        assert not world.said


@virtual
async def test_another_models_kv_is_refused() -> None:
    async with decode_world(expect_s=3.0) as world:
        spec = spec_of("a")
        await world.expect(spec)
        await world.hand_over(spec, fingerprint="another")
        assert "another model" in world.failed_transfers["a"]
        await world.until(lambda: world.released("a"))  # the reservation lapses
        assert "within 3.0 s" in world.heard(DecodeFailed, "a")[0].reason


@virtual
async def test_corrupt_kv_is_never_decoded_from() -> None:
    async with decode_world() as world:
        spec = spec_of("a")
        await world.expect(spec)
        world.hub.faults.corrupt_pieces = 1
        await world.hand_over(spec)
        await world.until(lambda: world.released("a"))
        assert "checksum" in world.heard(DecodeFailed, "a")[0].reason
        assert not world.messages
        await serve_one(world, "a", attempt=1)


@virtual
async def test_a_sender_lost_in_the_middle() -> None:
    async with decode_world() as world:
        world.hub.faults.delay_s = (0.05, 0.05)
        spec = spec_of("a")
        await world.expect(spec)
        sending = asyncio.ensure_future(world.hand_over(spec))
        await world.until(lambda: world.worker.core.receives("a", 0))
        world.hub.sever(world.plane.address)
        await sending
        await world.until(lambda: world.released("a"))
        assert world.heard(DecodeFailed, "a")
        assert world.engine.kv_used_tokens == 0


@virtual
async def test_a_silent_sender_frees_the_memory_within_the_bound() -> None:
    async with decode_world(transfer_s=2.0) as world:
        spec = spec_of("a")
        await world.expect(spec)
        sending = asyncio.ensure_future(world.hand_over(spec))
        await world.until(lambda: world.worker.core.receives("a", 0))
        world.hub.faults.frozen = True
        await sending
        await world.until(lambda: world.released("a"))
        assert "silent" in world.heard(DecodeFailed, "a")[0].reason


@pytest.mark.parametrize("drop_ms", range(0, 260, 13))
def test_a_cancel_at_any_moment_frees_everything(drop_ms: int) -> None:
    @virtual
    async def run() -> None:
        async with decode_world() as world:
            world.hub.faults.delay_s = (0.01, 0.03)
            spec = spec_of("a")
            await world.expect(spec)
            sending = asyncio.ensure_future(world.hand_over(spec))
            await asyncio.sleep(drop_ms / 1000)
            await world.drop("a")
            await world.until(lambda: world.released("a"))
            sent = len(world.messages)
            assert world.engine.kv_used_tokens == 0
            # What another request now writes to the same memory stays its own.
            await sending
            await serve_one(world, "b")
            assert all(chunk.request_id == "b" for message in world.messages[sent:] for chunk in message.chunks)
            assert world.tokens("a") == wanted_tokens(spec)[: len(world.tokens("a"))]
            ends = [*world.heard(KvReleased, "a"), *world.heard(DecodeFinished, "a")]
            assert len([m for m in ends if m.kv_tokens]) == 1

    run()


@virtual
async def test_a_failed_step_ends_its_rows_and_no_more() -> None:
    async with decode_world(replace(SHAPE, fail_at_pass=1)) as world:
        spec = spec_of("a")
        await world.expect(spec)
        await world.hand_over(spec)
        await world.until(lambda: world.released("a"))
        assert "failed as it was told to" in world.heard(DecodeFailed, "a")[0].reason
        assert world.tokens("a") == wanted_tokens(spec)[:1]
        await serve_one(world, "b")


@virtual
async def test_a_full_worker_says_so_and_holds_nothing() -> None:
    async with decode_world() as world:
        await world.expect(spec_of("a", 390, max_tokens=5))
        await world.expect(spec_of("b", 5, max_tokens=5))
        await world.until(lambda: world.heard(DecodeBusy, "a") or world.heard(DecodeBusy, "b"))
        assert not world.heard(DecodeBusy, "a")
        assert world.engine.kv_used_tokens == 395
        await world.drop("a")
        await world.until(lambda: world.released("a"))
        await serve_one(world, "b", tokens=5)


@virtual
async def test_heartbeats_at_start_regularly_and_when_the_bus_came_back() -> None:
    async with decode_world(heartbeat_s=1.0) as world:
        assert world.beats[0].holdings == ()
        profile = world.beats[0].profile
        assert (profile.role, profile.worker_id, profile.rows_max) == ("decode", WORKER, 4)
        await asyncio.sleep(2 * GATHER_S)
        lease = await world.store.get(keys.worker_lease(WORKER))
        assert lease is not None
        assert decode_record(lease, WorkerLease).profile == profile
        await world.expect(spec_of("a"))
        await world.until(lambda: world.beats[-1].holdings)
        assert [(h.request_id, h.phase, h.kv_tokens) for h in world.beats[-1].holdings] == [("a", "expected", 25)]
        before = len(world.beats)
        world.broker.cut(WORKER)
        await asyncio.sleep(0.01)
        world.broker.heal(WORKER)
        await asyncio.sleep(0.01)
        assert len(world.beats) == before + 1
        await world.drop("a")
        await world.until(lambda: world.released("a"))


@virtual
async def test_it_decodes_on_while_the_store_is_away() -> None:
    async with decode_world() as world:
        world.store.down = True
        await serve_one(world, "a")
        world.store.down = False
        await asyncio.sleep(5.0)
        assert await world.kept() == set()
        assert await world.store.get(keys.worker_lease(WORKER)) is not None


@virtual
async def test_stopping_finishes_what_is_here_and_takes_nothing_new() -> None:
    async with decode_world() as world:
        spec = spec_of("a", max_tokens=20)
        await world.expect(spec)
        await world.hand_over(spec)
        world.worker.stop()
        await asyncio.sleep(0.001)
        await world.expect(spec_of("b"))
        await world.until(lambda: world.said and isinstance(world.said[-1], WorkerLeft))
        assert world.heard(DecodeBusy, "b")
        assert world.tokens("a") == wanted_tokens(spec)
        assert world.heard(DecodeFinished, "a")


@virtual
async def test_stopping_is_bounded() -> None:
    async with decode_world(drain_s=0.5) as world:
        await world.expect(spec_of("a"))
        await world.until(lambda: world.engine.kv_used_tokens)
        begun_s = asyncio.get_running_loop().time()
        world.worker.stop()
        await world.until(lambda: world.said)
        assert isinstance(world.said[-1], WorkerLeft)
        assert asyncio.get_running_loop().time() - begun_s < 1.0


@virtual
async def test_unreadable_orders_disturb_nobody() -> None:
    async with decode_world() as world:
        for garbage in (b"", b"\xff\xff", b"\x81\xa4type\xa8ExpectKv", b"GET / HTTP/1.1"):
            await world.bus.publish(subjects.worker(WORKER), garbage)
        await serve_one(world, "a")


async def test_a_taken_data_port_is_one_clear_error() -> None:
    taken = open_data_plane()(None)
    try:
        port = int(taken.address.rpartition(":")[2])
        settings = DecodeWorkerSettings(worker_id=WORKER, engine="timed", data_port=port)
        worker = DecodeWorker(
            settings, MemoryBus(MemoryBroker()), MemoryStore(), TimedDecodeEngine(SHAPE), open_data_plane(port=port)
        )
        with pytest.raises(StartupError, match=r"in use.*--data-port"):
            await worker.run()
    finally:
        await taken.close()


async def test_the_process_serves_over_tcp_until_it_is_told_to_stop(tmp_path) -> None:
    broker, store, stop = MemoryBroker(), MemoryStore(), asyncio.Event()
    settings = DecodeWorkerSettings(worker_id=WORKER, engine="timed", journal=str(tmp_path / "journal"))
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def listen(delivery) -> None:
        heard.put_nowait(delivery.data)

    await MemoryBus(broker).subscribe(subjects.SCHEDULER, listen)
    means = WorkerMeans(MemoryBus(broker, WORKER), store, Metrics("decode-worker"), stop)
    serving = asyncio.ensure_future(serve(settings, means))
    assert b"WorkerHeartbeat" in await asyncio.wait_for(heard.get(), 10)
    stop.set()
    await asyncio.wait_for(serving, 10)
    async with asyncio.timeout(10):
        while b"WorkerLeft" not in (said := await heard.get()):
            assert b"WorkerHeartbeat" in said
    assert (tmp_path / "journal").stat().st_size > 0
    with pytest.raises(StartupError, match="journal"):
        await serve(settings, replace(means, bus=MemoryBus(broker)))


def test_the_engine_is_the_one_that_the_settings_name() -> None:
    settings = DecodeWorkerSettings(engine="timed", rows_max=3, kv_capacity_tokens=77)
    profile = load_engine(settings).profile
    assert (profile.rows_max, profile.kv_capacity_tokens) == (3, 77)
