"""One contract for every data plane: over TCP and in memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import uvloop

from services.engine.data_plane import KvTrailer, TransferFailed
from services.engine.kv_stream import STREAMS_MAX
from services.engine.transport import open_data_plane
from services.engine.transport_frames import Channel, OpenStream, Piece, greet
from tests.engine.data_plane_world import LAYERS, Inbox, MemoryWorld, TcpWorld, header, piece

TRAILER = KvTrailer(first_token=7)
World = TcpWorld | MemoryWorld


@pytest.fixture(params=[TcpWorld, MemoryWorld], ids=["tcp", "memory"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    world = request.param()
    yield world
    await world.close()


@pytest.fixture
async def tcp() -> AsyncIterator[TcpWorld]:
    world = TcpWorld()
    yield world
    await world.close()


async def test_a_layer_arrives_before_the_next_one_is_pushed(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    for layer in range(LAYERS):
        stream.push(piece(layer, 0, 5))
        assert await inbox.next_piece() == ("r1", layer, 0)
    await stream.finish(TRAILER)
    arrival = await inbox.arrival()
    assert arrival.trailer == TRAILER
    assert arrival.header == header()
    assert 0 < arrival.first_layer_received_s <= arrival.last_layer_received_s
    for layer in range(LAYERS):
        assert inbox.received("r1", layer) == [bytes(buffer) for buffer in piece(layer, 0, 5).buffers]


async def test_chunks_of_a_prompt_follow_each_other_in_every_layer(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header(tokens=5))
    for start, tokens in ((0, 3), (3, 2)):
        for layer in range(LAYERS):
            stream.push(piece(layer, start, tokens))
    await stream.finish(TRAILER)
    await inbox.arrival()
    first, second = piece(2, 0, 3), piece(2, 3, 2)
    assert inbox.received("r1", 2) == [bytes(a) + bytes(b) for a, b in zip(first.buffers, second.buffers, strict=True)]


async def test_streams_of_one_sender_share_the_way(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    streams = {name: sender.send(address, header(name)) for name in ("a", "b", "c")}
    for layer in range(LAYERS):
        for seed, stream in enumerate(streams.values()):
            stream.push(piece(layer, 0, 5, seed=seed))
    await asyncio.gather(*(stream.finish(TRAILER) for stream in streams.values()))
    assert {(await inbox.arrival()).header.request_id for _ in streams} == set(streams)
    for seed, name in enumerate(streams):
        assert inbox.received(name, 3) == [bytes(buffer) for buffer in piece(3, 0, 5, seed=seed).buffers]
    if isinstance(world, TcpWorld):
        assert world.relay is not None
        assert world.relay.connections == 1


async def test_megabytes_per_layer_arrive_whole(world: World) -> None:
    inbox = Inbox()
    tokens = 40_000
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header(tokens=tokens))
    for layer in range(LAYERS):
        stream.push(piece(layer, 0, tokens))
    await stream.finish(TRAILER)
    await inbox.arrival()
    assert inbox.received("r1", 1) == [bytes(buffer) for buffer in piece(1, 0, tokens).buffers]


async def test_another_models_kv_is_refused_before_a_byte_is_sent(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header(model="model-b"))
    stream.push(piece(0, 0, 5))
    with pytest.raises(TransferFailed, match="refused by the receiver: another model"):
        await stream.finish(TRAILER)
    assert not inbox.memory
    assert inbox.ended.empty()  # it was never accepted


async def test_the_receiver_may_answer_late(world: World) -> None:
    inbox = Inbox()
    inbox.permission.clear()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    for layer in range(LAYERS):
        stream.push(piece(layer, 0, 5))
    finishing = asyncio.ensure_future(stream.finish(TRAILER))
    await asyncio.wait_for(inbox.offered.get(), 10)
    assert inbox.pieces.empty()
    inbox.permission.set()
    await finishing
    await inbox.arrival()


async def test_a_receiver_that_gives_no_answer_is_refused_within_the_bound(world: World) -> None:
    inbox = Inbox()
    inbox.permission.clear()
    sender, _, address = await world.start(inbox, silence_s=0.1)
    stream = sender.send(address, header())
    with pytest.raises(TransferFailed, match="no answer"):
        await stream.finish(TRAILER)
    assert inbox.ended.empty()


async def test_corrupt_bytes_are_not_decoded_from(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    world.corrupt()
    stream = sender.send(address, header())
    for layer in range(LAYERS):
        stream.push(piece(layer, 0, 5, marked=layer == 2))
    with pytest.raises(TransferFailed, match="checksum"):
        await stream.finish(TRAILER)
    assert "checksum" in await inbox.breakage()


@pytest.mark.parametrize("missing", ["a layer", "a chunk"])
async def test_a_short_stream_is_refused(world: World, missing: str) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    for layer in range(LAYERS):
        if missing == "a chunk":
            stream.push(piece(layer, 0, 4 if layer == 1 else 5))
        elif layer != 1:
            stream.push(piece(layer, 0, 5))
    with pytest.raises(TransferFailed, match="layer 1 has"):
        await stream.finish(TRAILER)
    assert "layer 1 has" in await inbox.breakage()


@pytest.mark.parametrize(("layer", "start", "tokens"), [(0, 1, 2), (0, 0, 6), (LAYERS, 0, 5), (0, 3, 2)])
async def test_pieces_that_do_not_follow_are_refused(world: World, layer: int, start: int, tokens: int) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    stream.push(piece(layer, start, tokens))
    with pytest.raises(TransferFailed, match="refused"):
        await stream.finish(TRAILER)
    assert await inbox.breakage()
    assert not inbox.memory


async def test_a_refused_stream_leaves_the_others_alone(world: World) -> None:
    inbox = Inbox()
    inbox.wanted = lambda header, layer: header.request_id != "dropped" or layer < 2
    sender, _, address = await world.start(inbox)
    dropped, kept = sender.send(address, header("dropped")), sender.send(address, header("kept"))
    for layer in range(LAYERS):
        dropped.push(piece(layer, 0, 5))
        kept.push(piece(layer, 0, 5, seed=1))
    with pytest.raises(TransferFailed, match="no longer wanted"):
        await dropped.finish(TRAILER)
    assert "no longer wanted" in await inbox.breakage()
    await kept.finish(TRAILER)
    await inbox.arrival()
    assert inbox.received("kept", 3) == [bytes(buffer) for buffer in piece(3, 0, 5, seed=1).buffers]
    if isinstance(world, TcpWorld):
        assert world.relay is not None
        assert world.relay.connections == 1


async def test_the_receiver_can_drop_a_stream_between_two_pieces(world: World) -> None:
    inbox = Inbox()
    sender, receiver, address = await world.start(inbox)
    stream = sender.send(address, header())
    stream.push(piece(0, 0, 5))
    await inbox.next_piece()
    receiver.refuse("r1", 1)  # type: ignore[arg-type]  # another attempt: not this stream
    receiver.refuse("r1", 0)  # type: ignore[arg-type]
    assert await inbox.breakage() == "no longer wanted"
    with pytest.raises(TransferFailed, match="no longer wanted"):
        await stream.finish(TRAILER)
    assert inbox.ended.empty()


async def test_the_receiver_can_drop_a_stream_before_its_answer_is_heard(world: World) -> None:
    inbox = Inbox()
    inbox.permission.clear()
    sender, receiver, address = await world.start(inbox)
    stream = sender.send(address, header())
    await asyncio.wait_for(inbox.offered.get(), 10)
    inbox.permission.set()
    receiver.refuse("r1", 0)  # type: ignore[arg-type]
    with pytest.raises(TransferFailed, match="no longer wanted"):
        await stream.finish(TRAILER)
    assert await inbox.breakage() == "no longer wanted"


async def test_an_aborted_stream_is_broken_at_the_receiver(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    stream.push(piece(0, 0, 5))
    await inbox.next_piece()
    await stream.abort()
    await stream.abort()
    stream.push(piece(1, 0, 5))
    assert "aborted" in await inbox.breakage()
    with pytest.raises(TransferFailed, match="aborted"):
        await stream.finish(TRAILER)
    await _one_more_works(inbox, sender, address)


async def test_aborting_what_was_never_accepted_leaves_nothing_behind(world: World) -> None:
    inbox = Inbox()
    inbox.permission.clear()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    await asyncio.wait_for(inbox.offered.get(), 10)
    await stream.abort()
    inbox.permission.set()
    await _one_more_works(inbox, sender, address, before=("broken",))


async def test_a_lost_connection_ends_every_stream_on_both_sides(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    streams = [sender.send(address, header(name)) for name in ("a", "b")]
    for stream in streams:
        stream.push(piece(0, 0, 5))
        await inbox.next_piece()
    world.sever()
    for stream in streams:
        with pytest.raises(TransferFailed):
            await stream.finish(TRAILER)
        assert await inbox.breakage()
    assert inbox.ended.empty()


async def test_the_receiver_closes_in_the_middle(world: World) -> None:
    inbox = Inbox()
    sender, receiver, address = await world.start(inbox)
    stream = sender.send(address, header())
    stream.push(piece(0, 0, 5))
    await inbox.next_piece()
    await receiver.close()
    assert await inbox.breakage()
    with pytest.raises(TransferFailed):
        await stream.finish(TRAILER)


async def test_the_sender_closes_in_the_middle(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox)
    stream = sender.send(address, header())
    stream.push(piece(0, 0, 5))
    await inbox.next_piece()
    await sender.close()
    assert await inbox.breakage()
    with pytest.raises(TransferFailed):
        await stream.finish(TRAILER)


async def test_silence_ends_a_stream_on_both_sides(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox, silence_s=0.2)
    stream = sender.send(address, header())
    stream.push(piece(0, 0, 5))
    await inbox.next_piece()
    world.freeze()
    stream.push(piece(1, 0, 5))
    with pytest.raises(TransferFailed, match=r"0\.2 s"):
        await stream.finish(TRAILER)
    assert await inbox.breakage()


async def test_a_sender_that_computes_for_long_is_not_silent(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox, silence_s=0.15)
    stream = sender.send(address, header())
    stream.push(piece(0, 0, 5))
    await inbox.next_piece()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(inbox.ended.get(), 0.5)
    for layer in range(1, LAYERS):
        stream.push(piece(layer, 0, 5))
    await stream.finish(TRAILER)
    await inbox.arrival()


async def test_a_wrong_secret_is_named(world: World) -> None:
    inbox = Inbox()
    sender, _, address = await world.start(inbox, secrets=("s", "t"))
    stream = sender.send(address, header())
    with pytest.raises(TransferFailed, match="data_secret"):
        await stream.finish(TRAILER)
    assert inbox.offered.empty()


async def test_a_worker_that_receives_nothing_says_so(world: World) -> None:
    sender, _, address = await world.start(None)
    with pytest.raises(TransferFailed, match="receives no KV"):
        await sender.send(address, header()).finish(TRAILER)


async def test_nobody_at_the_address(world: World) -> None:
    sender, _, _ = await world.start(None)
    for nowhere in ("127.0.0.1:1", "not an address"):
        with pytest.raises(TransferFailed, match="cannot connect"):
            await sender.send(nowhere, header()).finish(TRAILER)


async def _one_more_works(inbox: Inbox, sender: object, address: str, before: tuple[str, ...] = ()) -> None:
    stream = sender.send(address, header("one-more"))  # type: ignore[attr-defined]
    for layer in range(LAYERS):
        stream.push(piece(layer, 0, 5))
    await stream.finish(TRAILER)
    end = await asyncio.wait_for(inbox.ended.get(), 10)
    if isinstance(end, tuple):
        # Accepted after it was aborted: then it must be said to be broken.
        assert "broken" in before
        end = await asyncio.wait_for(inbox.ended.get(), 10)
    assert not isinstance(end, tuple)


# --- what only a wire can do -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x02\xff\xff", b"\xff" * 64, b"\0\0\0\x01\xc0", b""]
)
async def test_garbage_on_the_port_disturbs_nobody(tcp: TcpWorld, garbage: bytes) -> None:
    inbox = Inbox()
    sender, receiver, address = await tcp.start(inbox)
    host, _, port = receiver.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(garbage)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(4096), 10):
            pass
    writer.close()
    await _one_more_works(inbox, sender, address)


async def test_a_stranger_who_says_nothing_is_hung_up_on(tcp: TcpWorld) -> None:
    _, receiver, _ = await tcp.start(Inbox(), silence_s=0.1)
    host, _, port = receiver.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while await asyncio.wait_for(reader.read(4096), 10):
        pass
    writer.close()


async def _peer(address: str, secret: str) -> Channel:
    """A peer that speaks the protocol and then does as it likes."""
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    channel = Channel(sock, silence_s=5.0)
    await greet(channel, secret)
    return channel


async def test_a_peer_that_claims_too_much_is_cut_off(tcp: TcpWorld) -> None:
    inbox = Inbox()
    _, receiver, _ = await tcp.start(inbox)
    channel = await _peer(receiver.address, "s")
    await channel.send(OpenStream(stream=1, header=header()))
    await asyncio.wait_for(inbox.offered.get(), 10)
    await channel.send(Piece(stream=1, layer=0, start=0, tokens=5, nbytes=1 << 40))
    assert "at most" in await inbox.breakage()
    channel.close()


async def test_a_piece_of_a_stream_never_opened_ends_the_connection(tcp: TcpWorld) -> None:
    inbox = Inbox()
    _, receiver, _ = await tcp.start(inbox)
    channel = await _peer(receiver.address, "s")
    await channel.send(OpenStream(stream=1, header=header()))
    await asyncio.wait_for(inbox.offered.get(), 10)
    await channel.send(Piece(stream=9, layer=0, start=0, tokens=5, nbytes=4))
    assert "never opened" in await inbox.breakage()
    channel.close()


async def test_streams_in_flight_are_bounded(tcp: TcpWorld) -> None:
    inbox = Inbox()
    inbox.permission.clear()
    sender, _, address = await tcp.start(inbox)
    streams = [sender.send(address, header(f"r{number}")) for number in range(STREAMS_MAX + 1)]
    with pytest.raises(TransferFailed, match="in flight"):
        await streams[-1].finish(TRAILER)
    for stream in streams:
        await stream.abort()


async def test_a_taken_port_is_told_at_once(tcp: TcpWorld) -> None:
    _, receiver, _ = await tcp.start(None)
    with pytest.raises(OSError, match="in use"):
        open_data_plane(port=int(receiver.address.rpartition(":")[2]))(None)


def test_it_runs_on_the_loop_that_processes_use() -> None:
    async def run() -> None:
        world, inbox = TcpWorld(), Inbox()
        sender, _, address = await world.start(inbox)
        stream = sender.send(address, header(tokens=20_000))
        for layer in range(LAYERS):
            stream.push(piece(layer, 0, 20_000))
        await stream.finish(TRAILER)
        await inbox.arrival()
        assert inbox.received("r1", 2) == [bytes(buffer) for buffer in piece(2, 0, 20_000).buffers]
        dropped = sender.send(address, header("r2"))
        dropped.push(piece(0, 0, 5))
        await inbox.next_piece()
        await dropped.abort()
        assert "aborted" in await inbox.breakage()
        await world.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
