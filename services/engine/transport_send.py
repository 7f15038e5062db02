"""The sending side of the TCP data plane: one connection to a peer, any number of streams on it.

Streams take turns piece by piece, so that a long sequence does not hold up a short one. A stream's
pieces leave only after the peer accepted it; what is pushed before waits here, untouched.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from services.engine.data_plane import KvHeader, KvTrailer, PeerLost, TransferFailed
from services.engine.interface import LayerKv
from services.engine.kv_stream import PIECES_MAX, STREAMS_MAX, checksum
from services.engine.transport_frames import (
    AbortStream,
    Alive,
    Channel,
    ConnectionBroken,
    EndStream,
    OpenStream,
    Piece,
    ReceiverFrame,
    StreamAccepted,
    StreamRefused,
    StreamVerified,
    dial,
    greet,
)


class OutgoingStream:
    """A `KvOutgoing`. `ended` tells the link that the stream's number is free."""

    def __init__(self, header: KvHeader, number: int, silence_s: float, wake: Callable[[OutgoingStream], None]) -> None:
        self.header = header
        self.number = number
        self._loop = asyncio.get_running_loop()
        self._silence_s = silence_s
        self._wake = wake
        self._pieces: deque[LayerKv] = deque()
        self._trailer: KvTrailer | None = None
        self._opened = self._accepted = self._sent_end = self._abort = False
        self._crc = self._bytes = 0
        self._progress_s = self._loop.time()
        self._verdict: asyncio.Future[None] = self._loop.create_future()
        # A failure that nobody waits for yet is not an unhandled one: `finish` will see it.
        self._verdict.add_done_callback(lambda verdict: verdict.exception())
        self._untouched = asyncio.Event()
        self._untouched.set()

    def __repr__(self) -> str:
        return f"OutgoingStream({self.header.request_id!r}, attempt={self.header.attempt}, waiting={len(self._pieces)})"

    @property
    def ended(self) -> bool:
        return self._verdict.done() and not self._abort

    def push(self, kv: LayerKv) -> None:
        if self._verdict.done():
            return
        if len(self._pieces) >= PIECES_MAX:
            self._give_up(f"more than {PIECES_MAX} pieces wait to be sent")
            return
        self._pieces.append(kv)
        self._wake(self)

    async def finish(self, trailer: KvTrailer) -> None:
        self._trailer = trailer
        self._progress_s = self._loop.time()
        self._wake(self)
        while not self._verdict.done():
            remaining_s = self._progress_s + self._silence_s - self._loop.time()
            if remaining_s <= 0:
                self._give_up(f"no progress and no answer for {self._silence_s} s")
                break
            await asyncio.wait([self._verdict], timeout=remaining_s)
        await self._untouched.wait()
        self._verdict.result()

    async def abort(self) -> None:
        self._give_up("aborted")
        await self._untouched.wait()

    def _give_up(self, reason: str) -> None:
        if not self._verdict.done():
            self._abort = self._opened
            self.fail(reason)
            self._wake(self)

    # --- told by the link ---

    def fail(self, reason: str, *, peer_lost: bool = False) -> None:
        self._pieces.clear()
        if not self._verdict.done():
            failure = PeerLost if peer_lost else TransferFailed
            self._verdict.set_exception(failure(f"{self.header.request_id}: {reason}"))

    def heard(self, frame: ReceiverFrame) -> None:
        self._progress_s = self._loop.time()
        match frame:
            case StreamAccepted():
                self._accepted = True
                self._wake(self)
            case StreamRefused(reason=reason):
                self._abort = False
                self.fail(f"refused by the receiver: {reason}")
            case StreamVerified():
                if not self._verdict.done():
                    self._verdict.set_result(None)

    @property
    def has_work(self) -> bool:
        if self._abort:
            return True
        if self._verdict.done():
            return False
        if not self._accepted:
            return not self._opened
        return bool(self._pieces) or (self._trailer is not None and not self._sent_end)

    async def send_next(self, channel: Channel) -> None:
        """One frame of this stream. Raises: ConnectionBroken."""
        if self._abort:
            self._abort = False
            await channel.send(AbortStream(stream=self.number))
        elif not self._opened:
            self._opened = True
            await channel.send(OpenStream(stream=self.number, header=self.header))
        elif self._pieces:
            await self._send_piece(channel, self._pieces.popleft())
        elif self._trailer is not None:
            self._sent_end = True
            await channel.send(
                EndStream(stream=self.number, trailer=self._trailer, payload_bytes=self._bytes, crc32=self._crc)
            )
        self._progress_s = self._loop.time()

    async def _send_piece(self, channel: Channel, kv: LayerKv) -> None:
        nbytes = sum(buffer.nbytes for buffer in kv.buffers)
        frame = Piece(stream=self.number, layer=kv.layer, start=kv.start, tokens=kv.tokens, nbytes=nbytes)
        self._untouched.clear()
        try:
            self._crc = checksum(kv.buffers, self._crc)
            self._bytes += await channel.send(frame, kv.buffers)
        finally:
            self._untouched.set()


class Link:
    """The connection to one peer. `run` lives as long as the connection and fails all its streams when it ends."""

    def __init__(self, address: str, secret: str, silence_s: float) -> None:
        self.address = address
        self.alive = True
        self._secret = secret
        self._silence_s = silence_s
        self._streams: dict[int, OutgoingStream] = {}
        self._turns: deque[OutgoingStream] = deque()
        self._work = asyncio.Event()
        self._last_number = 0

    def open(self, header: KvHeader) -> OutgoingStream:
        """A new stream on this connection; refused streams show it in `finish`."""
        self._last_number += 1
        stream = OutgoingStream(header, self._last_number, self._silence_s, self._ready)
        if len(self._streams) >= STREAMS_MAX:
            stream.fail(f"{STREAMS_MAX} streams are in flight to {self.address} already")
            return stream
        self._streams[stream.number] = stream
        self._ready(stream)
        return stream

    def _ready(self, stream: OutgoingStream) -> None:
        if not self.alive:
            stream.fail(f"the connection to {self.address} has ended", peer_lost=True)
            return
        if stream.number not in self._streams:
            return
        if stream.ended:
            del self._streams[stream.number]
        elif stream not in self._turns:
            self._turns.append(stream)
        self._work.set()

    async def run(self) -> None:
        reason, peer_lost = "the data plane was closed", False
        channel: Channel | None = None
        try:
            channel = await dial(self.address, self._silence_s)
            await greet(channel, self._secret)
            await self._until_broken(channel)
        except ConnectionBroken as error:
            reason, peer_lost = f"{self.address}: {error}", True
        finally:
            self.alive = False
            if channel is not None:
                channel.close()
            for stream in self._streams.values():
                stream.fail(reason, peer_lost=peer_lost)
            self._streams.clear()
            self._turns.clear()

    async def _until_broken(self, channel: Channel) -> None:
        """Raises: ConnectionBroken."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._read(channel)), loop.create_task(self._write(channel))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            task.result()

    async def _read(self, channel: Channel) -> None:
        while True:
            frame: ReceiverFrame = await channel.receive(
                StreamAccepted | StreamRefused | StreamVerified, patience_s=None
            )
            stream = self._streams.get(frame.stream)
            if stream is not None:
                stream.heard(frame)
                if stream.ended:
                    self._streams.pop(frame.stream, None)

    async def _write(self, channel: Channel) -> None:
        while True:
            while self._turns:
                stream = self._turns.popleft()
                if stream.has_work:
                    await stream.send_next(channel)
                    await asyncio.sleep(0)  # a fast peer must not keep the loop from its other tasks
                if stream.ended:
                    self._streams.pop(stream.number, None)
                elif stream.has_work and stream not in self._turns:
                    self._turns.append(stream)
            self._work.clear()
            try:
                async with asyncio.timeout(self._silence_s / 3 if self._streams else None):
                    await self._work.wait()
            except TimeoutError:
                await channel.send(Alive())
