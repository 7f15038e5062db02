"""Two workers and what lies between them, for the contract of the data plane: over TCP through a relay that
can be told to do harm, and in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

from services.engine.data_plane import DataPlane, KvArrival, KvHeader
from services.engine.interface import LayerKv
from services.engine.transport import open_data_plane
from services.engine.transport_memory import MemoryHub

LAYERS, HEADS, HEAD_BYTES = 4, 3, 32
MODEL = "model-a"
PATTERN = b"\xab" * 64
"""Occurs in payload alone; the relay spoils it when told to."""


def header(request_id: str = "r1", *, tokens: int = 5, attempt: int = 0, model: str = MODEL) -> KvHeader:
    return KvHeader(
        request_id=request_id,  # type: ignore[arg-type]
        attempt=attempt,
        sender="p0",  # type: ignore[arg-type]
        model_fingerprint=model,
        layers=LAYERS,
        tokens=tokens,
    )


def piece(layer: int, start: int, tokens: int, *, seed: int = 0, marked: bool = False) -> LayerKv:
    size = tokens * HEAD_BYTES
    dice = random.Random(f"{seed}/{layer}/{start}")
    buffers = [dice.randbytes(size) for _ in range(2 * HEADS)]
    if marked:
        buffers[0] = PATTERN + buffers[0][len(PATTERN) :]
    return LayerKv(layer=layer, start=start, tokens=tokens, buffers=tuple(memoryview(buffer) for buffer in buffers))


class Inbox:
    """A receiver that keeps what it gets and says what it heard."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, int], list[bytearray]] = {}
        self.ended: asyncio.Queue[KvArrival | tuple[KvHeader, str]] = asyncio.Queue()
        self.pieces: asyncio.Queue[tuple[str, int, int]] = asyncio.Queue()
        self.offered: asyncio.Queue[KvHeader] = asyncio.Queue()
        self.permission = asyncio.Event()
        self.permission.set()
        self.wanted: Callable[[KvHeader, int], bool] = lambda header, layer: True
        self.accepts_cancelled = 0

    async def accept(self, header: KvHeader) -> str | None:
        self.offered.put_nowait(header)
        try:
            await self.permission.wait()
        except asyncio.CancelledError:
            self.accepts_cancelled += 1
            raise
        return None if header.model_fingerprint == MODEL else "another model's KV"

    def buffers(self, header: KvHeader, layer: int, start: int, tokens: int) -> tuple[memoryview, ...] | None:
        if not self.wanted(header, layer):
            return None
        self.pieces.put_nowait((header.request_id, layer, start))
        size = header.tokens * HEAD_BYTES
        cache = self.memory.setdefault((header.request_id, layer), [bytearray(size) for _ in range(2 * HEADS)])
        return tuple(memoryview(buffer)[start * HEAD_BYTES : (start + tokens) * HEAD_BYTES] for buffer in cache)

    def arrived(self, arrival: KvArrival) -> None:
        self.ended.put_nowait(arrival)

    def broken(self, header: KvHeader, reason: str) -> None:
        self.ended.put_nowait((header, reason))

    async def arrival(self) -> KvArrival:
        end = await asyncio.wait_for(self.ended.get(), 10)
        assert isinstance(end, KvArrival), end
        return end

    async def breakage(self) -> str:
        end = await asyncio.wait_for(self.ended.get(), 10)
        assert isinstance(end, tuple), end
        return end[1]

    async def next_piece(self) -> tuple[str, int, int]:
        return await asyncio.wait_for(self.pieces.get(), 10)

    def received(self, request_id: str, layer: int) -> list[bytes]:
        return [bytes(buffer) for buffer in self.memory[request_id, layer]]


class Relay:
    """Sits between a sender and a listener on TCP."""

    def __init__(self, target: str) -> None:
        self.connections = 0
        self.spoil = False
        self.through = asyncio.Event()
        self.through.set()
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, _, port = self._target.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        self._writers += [writer, back]
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.get_running_loop().create_task(self._pump(source, sink))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(1 << 16):
                await self.through.wait()
                if self.spoil and PATTERN in data:
                    data = data.replace(PATTERN, b"\xac" + PATTERN[1:], 1)
                sink.write(data)
                await sink.drain()
        sink.close()

    def sever(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.sever()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class TcpWorld:
    def __init__(self) -> None:
        self._open: list[DataPlane | Relay] = []
        self.relay: Relay | None = None

    async def start(
        self, inbox: Inbox | None, *, silence_s: float = 5.0, secrets: tuple[str, str] = ("s", "s")
    ) -> tuple[DataPlane, DataPlane, str]:
        """Sender, receiver, and the address at which the sender reaches the receiver."""
        sender = open_data_plane(secret=secrets[0], transfer_s=silence_s)(None)
        receiver = open_data_plane(secret=secrets[1], transfer_s=silence_s)(inbox)
        self.relay = Relay(receiver.address)
        address = await self.relay.start()
        self._open = [sender, receiver, self.relay]
        return sender, receiver, address

    def corrupt(self) -> None:
        assert self.relay is not None
        self.relay.spoil = True

    def freeze(self) -> None:
        assert self.relay is not None
        self.relay.through.clear()

    def sever(self) -> None:
        assert self.relay is not None
        self.relay.sever()

    async def close(self) -> None:
        for item in self._open:
            await item.close()


class MemoryWorld:
    def __init__(self) -> None:
        self.hub = MemoryHub(seed=1)
        self._planes: list[DataPlane] = []

    async def start(
        self, inbox: Inbox | None, *, silence_s: float = 5.0, secrets: tuple[str, str] = ("s", "s")
    ) -> tuple[DataPlane, DataPlane, str]:
        sender = self.hub.plane(secret=secrets[0], transfer_s=silence_s)(None)
        receiver = self.hub.plane(secret=secrets[1], transfer_s=silence_s)(inbox)
        self._planes = [sender, receiver]
        return sender, receiver, receiver.address

    def corrupt(self) -> None:
        self.hub.faults.corrupt_pieces = 1

    def freeze(self) -> None:
        self.hub.faults.frozen = True

    def sever(self) -> None:
        self.hub.sever(self._planes[1].address)

    async def close(self) -> None:
        for plane in self._planes:
            await plane.close()
