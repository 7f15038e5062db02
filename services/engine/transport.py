"""The data plane over TCP: one connection per pair of workers and direction, opened on demand and kept.

Tensors are sent from their own memory and received into their own memory; the protocol is in
`transport_frames.py`, the sending side in `transport_send.py`, the check of what arrives in
`kv_stream.py`. A connection on which nothing is heard for `silence_s` while a stream is open has ended,
and so have all its streams; an idle one may be silent for ever.
"""

from __future__ import annotations

import asyncio
import socket
import time

from common.logs import get_logger
from common.units import Attempt, RequestId
from services.engine.data_plane import DataPlaneFactory, KvHeader, KvReceiver
from services.engine.kv_stream import PIECE_BYTES_MAX, STREAMS_MAX, IncomingStream, StreamRefused
from services.engine.owned_tasks import OwnedTasks
from services.engine.transport_frames import (
    AbortStream,
    Alive,
    Channel,
    ConnectionBroken,
    EndStream,
    OpenStream,
    Piece,
    SenderFrame,
    StreamAccepted,
    StreamVerified,
    admit,
    connections,
    listen,
)
from services.engine.transport_frames import StreamRefused as StreamRefusedFrame
from services.engine.transport_send import Link, OutgoingStream

CONNECTIONS_MAX = 1024
LAYERS_MAX = 4096
REASON_CHARS_MAX = 400

log = get_logger(__name__)


class _Connection:
    """The receiving side of one connection."""

    def __init__(self, channel: Channel, receiver: KvReceiver | None) -> None:
        self._channel = channel
        self._receiver = receiver
        self._streams: dict[int, IncomingStream] = {}
        self._last_number = 0
        self._tasks = OwnedTasks()

    async def run(self, secret: str) -> None:
        reason = "the data plane was closed"
        try:
            await admit(self._channel, secret)
            while True:
                patience_s = self._channel.silence_s if self._streams else None
                await self._heard(
                    await self._channel.receive(
                        OpenStream | Piece | EndStream | AbortStream | Alive, patience_s=patience_s
                    )
                )
        except ConnectionBroken as error:
            reason = f"connection to the sender: {error}"
            if self._streams:
                log.warning("lost a sender", streams=len(self._streams), reason=reason)
        finally:
            # First no task may touch a receiver's memory, then the receiver may hear so.
            await self._tasks.cancel()
            self._channel.close()
            for stream in self._streams.values():
                stream.end(reason)
            self._streams.clear()

    def refuse(self, request_id: RequestId, attempt: Attempt) -> None:
        for number, stream in list(self._streams.items()):
            if (stream.header.request_id, stream.header.attempt) != (request_id, attempt):
                continue
            if stream.receiving and not stream.in_piece:
                self._refuse(number, "no longer wanted")
            else:
                stream.unwanted = "no longer wanted"

    async def _heard(self, frame: SenderFrame) -> None:
        match frame:
            case OpenStream():
                self._open(frame)
            case Piece():
                await self._piece(frame)
            case EndStream():
                self._end(frame)
            case AbortStream(stream=number, reason=reason):
                self._drop(number, reason[:REASON_CHARS_MAX])
            case Alive():
                pass

    def _open(self, frame: OpenStream) -> None:
        if frame.stream <= self._last_number:
            raise ConnectionBroken(f"stream {frame.stream} was opened before")
        self._last_number = frame.stream
        reason = None
        if self._receiver is None:
            reason = "this worker receives no KV"
        elif len(self._streams) >= STREAMS_MAX:
            reason = f"{STREAMS_MAX} streams are in flight already"
        elif not 1 <= frame.header.layers <= LAYERS_MAX:
            reason = f"{frame.header.layers} layers"
        if reason is not None or self._receiver is None:
            self._reply(StreamRefusedFrame(stream=frame.stream, reason=str(reason)))
            return
        stream = self._streams[frame.stream] = IncomingStream(frame.header, self._receiver)
        self._tasks.spawn(self._accept(frame.stream, stream), f"accept {frame.header.request_id}")

    async def _accept(self, number: int, stream: IncomingStream) -> None:
        try:
            async with asyncio.timeout(self._channel.silence_s):
                reason = await stream.open()
        except TimeoutError:
            reason = "the worker gave no answer"
        if number not in self._streams:  # aborted meanwhile
            stream.end("aborted by the sender")
        elif reason is None:
            await self._send(StreamAccepted(stream=number))
        else:
            del self._streams[number]
            await self._send(StreamRefusedFrame(stream=number, reason=reason[:REASON_CHARS_MAX]))

    async def _piece(self, frame: Piece) -> None:
        if frame.nbytes > PIECE_BYTES_MAX:
            raise ConnectionBroken(f"a piece of {frame.nbytes} bytes, at most {PIECE_BYTES_MAX} are read")
        stream = self._streams.get(frame.stream)
        if stream is None or not stream.receiving:
            if frame.stream > self._last_number:
                raise ConnectionBroken(f"a piece of stream {frame.stream}, which was never opened")
            await self._channel.drain(frame.nbytes)  # refused meanwhile
            return
        try:
            views = stream.begin_piece(frame.layer, frame.start, frame.tokens, frame.nbytes)
        except StreamRefused as refusal:
            self._refuse(frame.stream, str(refusal))
            await self._channel.drain(frame.nbytes)
            return
        await self._channel.fill(*views, patience_s=self._channel.silence_s)
        try:
            stream.end_piece(frame.layer, frame.tokens, views, time.monotonic())
        except StreamRefused as refusal:
            self._refuse(frame.stream, str(refusal))
        await asyncio.sleep(0)  # a fast sender must not keep the loop from its other tasks

    def _end(self, frame: EndStream) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None or not stream.receiving:
            return
        try:
            stream.finish(frame.trailer, frame.payload_bytes, frame.crc32)
        except StreamRefused as refusal:
            self._refuse(frame.stream, str(refusal))
        else:
            del self._streams[frame.stream]
            self._reply(StreamVerified(stream=frame.stream))

    def _refuse(self, number: int, reason: str) -> None:
        self._drop(number, reason)
        self._reply(StreamRefusedFrame(stream=number, reason=reason[:REASON_CHARS_MAX]))

    def _drop(self, number: int, reason: str) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.end(reason)

    def _reply(self, frame: StreamRefusedFrame | StreamVerified) -> None:
        self._tasks.spawn(self._send(frame), "reply")

    async def _send(self, frame: StreamAccepted | StreamRefusedFrame | StreamVerified) -> None:
        try:
            await self._channel.send(frame)
        except ConnectionBroken as error:
            log.info("an answer did not reach the sender", reason=str(error))


class TcpDataPlane:
    """A `DataPlane`. Made by `open_data_plane`."""

    def __init__(self, receiver: KvReceiver | None, listener: socket.socket, *, secret: str, silence_s: float) -> None:
        host, port = listener.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._receiver = receiver
        self._listener = listener
        self._secret = secret
        self._silence_s = silence_s
        self._links: dict[str, Link] = {}
        self._connections: set[_Connection] = set()
        self._tasks = OwnedTasks()
        self._closed = False
        self._tasks.spawn(self._listen(), "data plane listener")

    def __repr__(self) -> str:
        return f"TcpDataPlane({self._address}, links={len(self._links)}, connections={len(self._connections)})"

    @property
    def address(self) -> str:
        return self._address

    def send(self, address: str, header: KvHeader) -> OutgoingStream:
        link = self._links.get(address)
        if link is None or not link.alive:
            link = self._links[address] = Link(address, self._secret, self._silence_s)
            link.alive = not self._closed
            if link.alive:
                self._tasks.spawn(self._run(link), f"data plane link {address}")
        return link.open(header)

    def refuse(self, request_id: RequestId, attempt: Attempt) -> None:
        for connection in self._connections:
            connection.refuse(request_id, attempt)

    async def close(self) -> None:
        self._closed = True
        await self._tasks.cancel()
        self._listener.close()

    async def _run(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            if self._links.get(link.address) is link:
                del self._links[link.address]

    async def _listen(self) -> None:
        async for sock, peer in connections(
            self._listener, "data plane", lambda: CONNECTIONS_MAX - len(self._connections)
        ):
            connection = _Connection(Channel(sock, silence_s=self._silence_s), self._receiver)
            self._connections.add(connection)
            self._tasks.spawn(self._serve(connection), f"data plane from {peer}")

    async def _serve(self, connection: _Connection) -> None:
        try:
            await connection.run(self._secret)
        finally:
            self._connections.discard(connection)


def open_data_plane(
    *, host: str = "127.0.0.1", port: int = 0, secret: str = "", transfer_s: float = 5.0
) -> DataPlaneFactory:
    """A factory of TCP data planes that listen on this address (port 0: any free one). `transfer_s`: longest
    silence on a transfer. The factory raises: OSError, if the address cannot be bound."""

    def make(receiver: KvReceiver | None) -> TcpDataPlane:
        return TcpDataPlane(receiver, listen(host, port), secret=secret, silence_s=transfer_s)

    return make
