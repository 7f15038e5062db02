"""The data plane inside one process: a hub of addresses, with delay and faults on demand.

It keeps the promises of the TCP data plane and fails in the same ways; under virtual time, with a
seed, the same way every time. A piece is copied at the end of its delay, so that memory given away too
early is written to, and a test sees it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from dataclasses import dataclass, field

from common.units import Attempt, RequestId
from services.engine.data_plane import DataPlaneFactory, KvHeader, KvReceiver, KvTrailer, PeerLost, TransferFailed
from services.engine.interface import LayerKv
from services.engine.kv_stream import PIECES_MAX, IncomingStream, StreamRefused, checksum
from services.engine.owned_tasks import OwnedTasks


@dataclass(slots=True)
class TransferFaults:
    """What goes wrong on the way. Changed at any time."""

    delay_s: tuple[float, float] = (0.0, 0.0)
    """Every piece takes a time drawn evenly from here."""
    corrupt_pieces: int = 0
    """A byte of each of the next so many pieces changes on its way."""
    frozen: bool = False
    """Nothing arrives any more, and nobody hears why."""


@dataclass(slots=True, eq=False)
class MemoryHub:
    """The network that the planes of one process share."""

    seed: int = 0
    faults: TransferFaults = field(default_factory=TransferFaults)
    _planes: dict[str, MemoryDataPlane] = field(default_factory=dict)
    _random: random.Random = field(init=False)
    _ports: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def plane(self, *, secret: str = "", transfer_s: float = 5.0) -> DataPlaneFactory:
        """A factory of planes of this hub."""

        def make(receiver: KvReceiver | None) -> MemoryDataPlane:
            plane = MemoryDataPlane(self, f"memory:{next(self._ports)}", receiver, secret, transfer_s)
            self._planes[plane.address] = plane
            return plane

        return make

    def sever(self, address: str) -> None:
        """The worker at this address is gone: its streams end, nobody reaches it any more."""
        plane = self._planes.pop(address, None)
        if plane is not None:
            plane._sever("connection lost")

    async def _travel(self, silence_s: float) -> None:
        """The time a piece takes. Raises: TransferFailed, after `silence_s` if nothing arrives."""
        low_s, high_s = self.faults.delay_s
        if high_s > 0:
            await asyncio.sleep(self._random.uniform(low_s, high_s))
        if self.faults.frozen:
            await asyncio.sleep(silence_s)
            raise TransferFailed(f"silent for {silence_s} s")

    def _corrupted(self) -> bool:
        if self.faults.corrupt_pieces == 0:
            return False
        self.faults.corrupt_pieces -= 1
        return True


class _MemoryStream:
    """Both ends of one stream."""

    def __init__(self, sender: MemoryDataPlane, receiver: MemoryDataPlane | None, header: KvHeader) -> None:
        self.header = header
        self.incoming: IncomingStream | None = None
        self._sender = sender
        self._peer = receiver
        self._pieces: deque[LayerKv] = deque()
        self._trailer: KvTrailer | None = None
        self._crc = self._bytes = 0
        self._failure: TransferFailed | None = None
        self._work = asyncio.Event()
        self._task = sender._tasks.spawn(self._run(), f"stream {header.request_id}")

    def push(self, kv: LayerKv) -> None:
        if self._task.done() or self._failure is not None:
            return
        if len(self._pieces) >= PIECES_MAX:
            self.fail(f"more than {PIECES_MAX} pieces wait to be sent")
            return
        self._pieces.append(kv)
        self._work.set()

    async def finish(self, trailer: KvTrailer) -> None:
        self._trailer = trailer
        self._work.set()
        await asyncio.wait([self._task])
        if self._failure is not None:
            raise self._failure

    async def abort(self) -> None:
        self.fail("aborted by the sender")
        await asyncio.wait([self._task])

    def fail(self, reason: str) -> None:
        if not self._task.done():
            self._failure = self._failure or TransferFailed(f"{self.header.request_id}: {reason}")
            self._task.cancel()
            self._sender._outgoing.discard(self)

    async def _run(self) -> None:
        peer = self._peer
        try:
            if peer is None:
                raise PeerLost("cannot connect: nobody is there")
            peer._incoming.add(self)
            await self._deliver(peer)
        except TransferFailed as error:
            refused = "refused by the receiver: " if isinstance(error, StreamRefused) else ""
            failure = PeerLost if isinstance(error, PeerLost) else TransferFailed
            self._failure = failure(f"{self.header.request_id}: {refused}{error}")
        except asyncio.CancelledError:
            self._failure = self._failure or TransferFailed(f"{self.header.request_id}: the data plane was closed")
            raise
        finally:
            self._pieces.clear()
            self._sender._outgoing.discard(self)
            if peer is not None:
                peer._incoming.discard(self)
            if self.incoming is not None:
                self.incoming.end(str(self._failure))

    async def _deliver(self, peer: MemoryDataPlane) -> None:
        hub, silence_s = self._sender._hub, self._sender._silence_s
        if peer._secret != self._sender._secret:
            raise TransferFailed("wrong data_secret: it must be the same on every worker")
        if peer._receiver is None:
            raise StreamRefused("this worker receives no KV")
        self.incoming = IncomingStream(self.header, peer._receiver)
        await hub._travel(silence_s)
        try:
            async with asyncio.timeout(peer._silence_s):
                reason = await self.incoming.open()
        except TimeoutError:
            reason = "the worker gave no answer"
        if reason is not None:
            raise StreamRefused(reason)
        while self._pieces or self._trailer is None:
            if self._pieces:
                await self._deliver_piece(self._pieces.popleft(), self.incoming)
            else:
                self._work.clear()
                await self._work.wait()
        await hub._travel(silence_s)
        self.incoming.finish(self._trailer, self._bytes, self._crc)

    async def _deliver_piece(self, kv: LayerKv, incoming: IncomingStream) -> None:
        nbytes = sum(buffer.nbytes for buffer in kv.buffers)
        views = incoming.begin_piece(kv.layer, kv.start, kv.tokens, nbytes)
        hub = self._sender._hub
        await hub._travel(self._sender._silence_s)
        payload = b"".join(buffer.cast("B") for buffer in kv.buffers)
        self._crc = checksum([memoryview(payload)], self._crc)
        self._bytes += nbytes
        if hub._corrupted():
            payload = bytes([payload[0] ^ 0xFF]) + payload[1:]
        position = 0
        for view in views:
            view.cast("B")[:] = payload[position : position + view.nbytes]
            position += view.nbytes
        incoming.end_piece(kv.layer, kv.tokens, views, asyncio.get_running_loop().time())

    def unwanted(self) -> None:
        incoming = self.incoming
        if incoming is None:
            return
        if incoming.receiving and not incoming.in_piece:
            incoming.end("no longer wanted")
            self.fail("refused by the receiver: no longer wanted")
        else:
            incoming.unwanted = "no longer wanted"


class MemoryDataPlane:
    """A `DataPlane` of a `MemoryHub`."""

    def __init__(
        self, hub: MemoryHub, address: str, receiver: KvReceiver | None, secret: str, silence_s: float
    ) -> None:
        self._hub = hub
        self._address = address
        self._receiver = receiver
        self._secret = secret
        self._silence_s = silence_s
        self._outgoing: set[_MemoryStream] = set()
        self._incoming: set[_MemoryStream] = set()
        self._tasks = OwnedTasks()

    def __repr__(self) -> str:
        return f"MemoryDataPlane({self._address}, out={len(self._outgoing)}, in={len(self._incoming)})"

    @property
    def address(self) -> str:
        return self._address

    def send(self, address: str, header: KvHeader) -> _MemoryStream:
        reachable = self._hub._planes.get(address) if self._address in self._hub._planes else None
        stream = _MemoryStream(self, reachable, header)
        self._outgoing.add(stream)
        return stream

    def refuse(self, request_id: RequestId, attempt: Attempt) -> None:
        for stream in list(self._incoming):
            if (stream.header.request_id, stream.header.attempt) == (request_id, attempt):
                stream.unwanted()

    async def close(self) -> None:
        self._hub._planes.pop(self._address, None)
        self._sever("connection closed by the peer")
        await self._tasks.cancel()

    def _sever(self, reason: str) -> None:
        for stream in [*self._outgoing, *self._incoming]:
            stream.fail(reason)
            if stream.incoming is not None and not stream.incoming.in_piece:
                stream.incoming.end(reason)
