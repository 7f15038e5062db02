"""The prefill worker's service on memory ports, in virtual time, with an engine that costs nothing."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from common.messages.cluster import WorkerLeft
from common.messages.locations import KvLocation, WorkerLease
from common.messages.prefill import DropRequest, KvReleased, PrefillFailed, PrefillFinished
from common.messages.sp import (
    DropSegment,
    LoadSegment,
    PauseSegment,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentPart,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.runtime import keys, subjects
from common.runtime.store import Put
from common.runtime.virtual_time import virtual
from common.runtime.wire import decode_record
from common.runtime.write_behind import GATHER_S
from services.engine.timed_language import expected_tokens
from tests.services.prefill_world import DRAIN_S, SHAPE, WORKER, prefill_world, prompt_bytes, prompt_of


def wanted(request_id: str, tokens: int, count: int) -> list[int]:
    return expected_tokens(prompt_of(request_id, tokens), count, SHAPE.vocab)


def run(request_id: str) -> RunSegment:
    return RunSegment(worker_id=WORKER, request_id=request_id, attempt=0, epoch=1)


def pause(request_id: str) -> PauseSegment:
    return PauseSegment(worker_id=WORKER, request_id=request_id, attempt=0, epoch=1)


@virtual
async def test_the_kv_of_a_short_is_whole_at_the_decode_worker_and_freed_here():
    async with prefill_world() as world:
        await world.short(world.spec("a", 100))
        await world.until(lambda: bool(world.of(KvReleased)))
        assert [type(m) for m in world.said] == [PrefillFinished, KvReleased]
        assert world.tokens["a"] == wanted("a", 100, 1)
        assert world.decode.arrivals["a"].trailer.first_token == world.tokens["a"][0]
        following = [(await world.decode.engine.step(["a"]))[0].token_id for _ in range(3)]
        assert world.tokens["a"] + following == wanted("a", 100, 4), "so its KV is right, byte for byte"
        world.require_empty()


@virtual
async def test_the_first_layer_is_received_before_the_last_one_is_computed():
    async with prefill_world() as world:
        await world.short(world.spec("a", 100))
        await world.until(lambda: bool(world.of(KvReleased)))
        finished = world.of(PrefillFinished)[0]
        assert world.decode.arrivals["a"].first_layer_received_s < finished.last_layer_computed_s


@virtual
async def test_many_shorts_at_once_each_whole():
    async with prefill_world() as world:
        names = [f"s{number}" for number in range(10)]
        for number, name in enumerate(names):
            await world.short(world.spec(name, 40 + 60 * number))
        await world.until(lambda: len(world.of(KvReleased)) == len(names))
        assert {name: world.tokens[name] for name in names} == {
            name: wanted(name, 40 + 60 * number, 1) for number, name in enumerate(names)
        }
        assert set(world.decode.arrivals) == set(names)
        assert set(world.engine.computed_tokens.values()) == {1}
        world.require_empty()


@virtual
async def test_a_prompt_by_reference_is_fetched():
    async with prefill_world() as world:
        await world.store.commit([Put(keys.prompt("a", 0), prompt_bytes("a", 700))])
        await world.short(world.spec("a", 700, key=keys.prompt("a", 0)))
        await world.until(lambda: bool(world.of(KvReleased)))
        assert world.tokens["a"] == wanted("a", 700, 1)


@pytest.mark.parametrize(
    ("stored", "down", "retryable"), [(None, False, True), (b"short", False, False), (b"", True, True)]
)
def test_a_prompt_that_cannot_be_read_fails_its_request(stored: bytes | None, down: bool, retryable: bool):
    @virtual
    async def scenario():
        async with prefill_world() as world:
            if stored is not None:
                await world.store.commit([Put("some:key", stored)])
            world.store.down = down
            await world.short(world.spec("a", 700, key="some:key"))
            await world.until(lambda: bool(world.of(KvReleased)))
            assert [m.retryable for m in world.of(PrefillFailed)] == [retryable]
            world.store.down = False
            world.require_empty()

    scenario()


@virtual
async def test_a_request_that_does_not_fit_or_is_invalid_fails_alone():
    async with prefill_world() as world:
        await world.short(world.spec("big", SHAPE.kv_capacity_tokens + 1), expected=False)
        bad = world.spec("bad", 2)
        bad = type(bad)(
            request_id="bad",
            router_id="r0",
            prompt=type(bad.prompt)(tokens=1, inline=(SHAPE.vocab).to_bytes(4, "little")),
            max_tokens=4,
        )
        await world.short(bad)
        await world.short(world.spec("good", 10))
        await world.until(lambda: len(world.of(KvReleased)) == 3)
        assert {m.request_id: m.retryable for m in world.of(PrefillFailed)} == {"big": True, "bad": False}
        assert world.tokens["good"] == wanted("good", 10, 1)


@virtual
async def test_a_long_is_paused_for_a_short_resumed_and_decoded_here():
    async with prefill_world() as world:
        await world.long(world.spec("long", 2_000, max_tokens=5))
        await world.until(lambda: bool(world.of(SegmentLoaded)))
        await world.order(run("long"))
        await world.until(lambda: bool(world.of(SegmentRunning)))
        await asyncio.sleep(0.03)
        await world.short(world.spec("a", 50))
        await world.order(pause("long"))
        await world.until(lambda: bool(world.of(SegmentPaused)))
        step_s = 0.08 / SHAPE.layers  # an upper bound: 512 tokens in 4 layers
        assert 0 < world.of(SegmentPaused)[0].pause_latency_s <= step_s
        await world.until(lambda: bool(world.of(PrefillFinished)))
        assert not world.of(SegmentPrefilled)
        await world.order(run("long"))
        await world.until(lambda: bool(world.of(SegmentFinished)))
        assert world.tokens["long"] == wanted("long", 2_000, 5)
        assert world.tokens["a"] == wanted("a", 50, 1)
        assert world.engine.stops == 1
        assert set(world.engine.computed_tokens.values()) == {1}
        await world.until(lambda: bool(world.of(KvReleased)))
        world.require_empty()


@virtual
async def test_fifty_pauses_at_any_step_change_no_token():
    async with prefill_world() as world:
        await world.long(world.spec("long", 3_000, max_tokens=3))
        await world.until(lambda: bool(world.of(SegmentLoaded)))
        await world.order(run("long"))
        for number in range(50):
            await asyncio.sleep(0.0037 + 0.0001 * (number % 7))
            await world.order(pause("long"))
            await world.until(lambda n=number: len(world.of(SegmentPaused)) > n or bool(world.of(SegmentPrefilled)))
            if world.of(SegmentPrefilled):
                break
            await world.order(run("long"))
        await world.until(lambda: bool(world.of(SegmentFinished)))
        assert len(world.of(SegmentPaused)) > 20
        assert world.tokens["long"] == wanted("long", 3_000, 3)
        assert set(world.engine.computed_tokens.values()) == {1}


@virtual
async def test_shorts_share_the_passes_of_a_decoding_long():
    async with prefill_world() as world:
        await world.long(world.spec("long", 300, max_tokens=40))
        await world.until(lambda: bool(world.of(SegmentLoaded)))
        await world.order(run("long"))
        await world.until(lambda: bool(world.of(SegmentPrefilled)))
        for name in ("a", "b"):
            await world.short(world.spec(name, 250))
        await world.until(lambda: len(world.of(KvReleased)) == 2)
        assert not world.of(SegmentFinished), "they did not wait for its end"
        await world.until(lambda: bool(world.of(SegmentFinished)))
        assert world.tokens["long"] == wanted("long", 300, 40)
        assert world.tokens["a"] == wanted("a", 250, 1)


@virtual
async def test_a_refused_handoff_is_told_and_its_kv_freed():
    async with prefill_world() as world:
        world.decode.refuses = True
        await world.short(world.spec("a", 100), expected=False)
        await world.until(lambda: bool(world.of(KvReleased)))
        assert "full" in world.of(PrefillFailed)[0].reason
        world.require_empty()


@virtual
async def test_a_decode_worker_that_is_gone_ends_in_a_failure_within_the_bound():
    async with prefill_world() as world:
        world.hub.sever(world.decode_plane.address)
        await world.short(world.spec("a", 100))
        await world.until(lambda: bool(world.of(KvReleased)), within_s=3.0)
        assert len(world.of(PrefillFailed)) == 1
        world.require_empty()


@virtual
async def test_a_drop_during_the_handoff_ends_the_stream_at_both_ends():
    async with prefill_world() as world:
        world.hub.faults.delay_s = (0.01, 0.01)
        await world.short(world.spec("a", 100))
        await world.until(lambda: bool(world.of(PrefillFinished)))
        await world.order(DropRequest(worker_id=WORKER, request_id="a", attempt=0, epoch=1))
        await world.until(lambda: bool(world.of(KvReleased)))
        assert not world.of(PrefillFailed)
        assert world.decode.broken_streams == ["a"]
        world.require_empty()


@virtual
async def test_a_failed_pass_fails_its_requests_and_the_worker_goes_on():
    async with prefill_world(dataclasses.replace(SHAPE, fail_at_pass=0)) as world:
        await world.short(world.spec("a", 100))
        await world.until(lambda: bool(world.of(KvReleased)))
        await world.short(world.spec("b", 100))
        await world.until(lambda: len(world.of(KvReleased)) == 2)
        assert [m.request_id for m in world.of(PrefillFailed)] == ["a"]
        assert world.tokens["b"] == wanted("b", 100, 1)
        world.require_empty()


@virtual
async def test_a_failed_pass_of_a_long():
    async with prefill_world(dataclasses.replace(SHAPE, fail_at_pass=1)) as world:
        await world.long(world.spec("long", 1_000))
        await world.until(lambda: bool(world.of(SegmentLoaded)))
        await world.order(run("long"))
        await world.until(lambda: bool(world.of(SegmentFailed)))
        world.require_empty()


@virtual
async def test_heartbeats_tell_all_that_is_held_and_come_at_once_after_an_outage():
    async with prefill_world() as world:
        await world.until(lambda: bool(world.beats))
        assert world.beats[0].profile.kv_capacity_tokens == SHAPE.kv_capacity_tokens
        assert world.beats[0].profile.data_address
        await world.long(world.spec("long", 500))
        await world.until(lambda: bool(world.beats[-1].holdings))
        assert [(h.request_id, h.phase, h.kv_tokens) for h in world.beats[-1].holdings] == [("long", "prefill", 508)]
        before = len(world.beats)
        world.broker.cut(WORKER)
        await asyncio.sleep(0.2)
        world.broker.heal(WORKER)
        await asyncio.sleep(0.05)
        assert len(world.beats) == before + 1, "not only at the next full second"


@virtual
async def test_the_store_knows_where_kv_lies_while_it_does_and_whose_lease_runs():
    async with prefill_world() as world:
        await world.long(world.spec("long", 500))
        await world.until(lambda: bool(world.of(SegmentLoaded)))
        await asyncio.sleep(10 * world.settings.lease_s)  # renewed meanwhile
        location = decode_record(await world.store.get(keys.kv("long", WORKER)) or b"", KvLocation)
        assert (location.state, location.reserved_tokens) == ("filling", 508)
        lease = decode_record(await world.store.get(keys.worker_lease(WORKER)) or b"", WorkerLease)
        assert lease.profile.incarnation == world.worker.incarnation
        await world.order(run("long"))
        await world.until(lambda: bool(world.of(SegmentFinished)))
        await asyncio.sleep(2 * GATHER_S)
        assert await world.store.scan(keys.kv_all()) == {}


@virtual
async def test_an_outage_of_the_store_holds_up_nobody_and_is_made_good():
    async with prefill_world() as world:
        world.store.down = True
        await world.long(world.spec("long", 500, max_tokens=1_000))
        await world.short(world.spec("a", 50))
        await world.until(lambda: bool(world.of(KvReleased)) and bool(world.of(SegmentLoaded)))
        world.store.down = False
        await asyncio.sleep(2 * world.settings.lease_s)
        assert set(await world.store.scan(keys.kv_all())) == {keys.kv("long", WORKER)}


@virtual
async def test_unreadable_orders_disturb_nothing():
    async with prefill_world() as world:
        for data in (b"", b"garbage", b"\x81\xa4type\xa7Nothing"):
            await world.bus.publish(subjects.worker(WORKER), data)
        await world.short(world.spec("a", 50))
        await world.until(lambda: bool(world.of(KvReleased)))


@virtual
async def test_told_to_stop_it_finishes_what_is_in_hand_and_says_farewell():
    async with prefill_world() as world:
        await world.short(world.spec("a", 400))
        await world.until_it_computes()
        assert not any(beat.leaving for beat in world.beats)
        world.worker.stop()
        await world.until(lambda: bool(world.of(WorkerLeft)))
        assert world.beats[-1].leaving, "so that nothing new is sent here"
        assert [m.request_id for m in world.of(KvReleased)] == ["a"]
        assert not world.of(PrefillFailed)
        assert await world.store.scan("") == {}
        world.require_empty()


@virtual
async def test_draining_is_bounded():
    async with prefill_world() as world:
        await world.long(world.spec("long", 3_000, max_tokens=500))
        await world.until(lambda: bool(world.of(SegmentLoaded)))
        await world.order(run("long"))
        begun_s = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
        world.worker.stop()
        await world.until(lambda: bool(world.of(WorkerLeft)))
        assert asyncio.get_running_loop().time() - begun_s < DRAIN_S + 1.0


@virtual
async def test_cancelled_it_is_gone_without_a_word():
    async with prefill_world(stop=False) as world:
        await world.short(world.spec("a", 400))
        await world.until_it_computes()
    assert not world.of(WorkerLeft)


@pytest.mark.parametrize("after_s", [None, 0.0, 0.01, 1.0])
@virtual
async def test_a_share_that_is_dropped_while_its_ranks_meet_is_gone_at_once(after_s):
    """Also if the drop comes before anything was done about the order to load."""
    async with prefill_world() as world:
        spec = world.spec("a", 100)
        load = LoadSegment(
            worker_id=WORKER,
            spec=spec,
            rank=0,
            members=(WORKER, "p1"),
            parts=(SegmentPart(start=0, tokens=100),),
            addresses=("here:1", "nobody:1"),
            epoch=1,
        )
        world.worker._shell.tell(load)
        if after_s is not None:
            await asyncio.sleep(after_s)
        world.worker._shell.tell(DropSegment(worker_id=WORKER, request_id="a", attempt=0, epoch=1))
        await world.until(lambda: bool(world.of(SegmentDropped)), within_s=0.5)
        world.require_empty()
