"""What travels on a data plane connection: length-prefixed MessagePack frames, raw payload after a `Piece`.

    connecting side                         listening side
                          ◀── Challenge ──  nonce
    nonce, proof          ─── Hello ──────▶
                          ◀── Welcome ────  proof            (or `Farewell` with the reason)
    then any number of streams at once, their frames interleaved:
                          ─── OpenStream ─▶
                          ◀── StreamAccepted, or StreamRefused at any time
                          ─── Piece + payload ─▶ …
                          ─── EndStream ──▶ ◀── StreamVerified      (or AbortStream)
    and `Alive` from the connecting side while a stream is open and nothing else is sent.

Both proofs are HMAC-SHA256 of both nonces under the shared secret, so that neither side talks to a
stranger; with an empty secret they still show that both speak this protocol.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from types import UnionType
from typing import Any

from common.logs import get_logger
from common.messages.base import Message
from common.runtime.wire import WireError, decode, encode
from common.units import Bytes, Tokens
from services.engine.data_plane import KvHeader, KvTrailer

FRAME_BYTES_MAX = 64 * 1024
HELLO_BYTES_MAX = 1024
"""Of a frame before the peer is known."""
SLICE_BYTES = 1 << 20
"""Payload per send or receive call: each makes progress within the bound on silence, or the peer is lost."""
VIEWS_MAX = 256
"""Buffers per call; systems take at most 1024."""
ACCEPT_AGAIN_S = 0.1
"""After a connection that could not be taken."""
PROTOCOL = "pecsched-kv-1"

log = get_logger(__name__)


class Challenge(Message, frozen=True, kw_only=True):
    protocol: str
    nonce: bytes


class Hello(Message, frozen=True, kw_only=True):
    protocol: str
    nonce: bytes
    proof: bytes


class Welcome(Message, frozen=True, kw_only=True):
    proof: bytes


class Farewell(Message, frozen=True, kw_only=True):
    """The connection is closed after this."""

    reason: str


class OpenStream(Message, frozen=True, kw_only=True):
    stream: int
    header: KvHeader


class Piece(Message, frozen=True, kw_only=True):
    """`nbytes` of payload follow: one layer's keys and values of tokens [start, start + tokens)."""

    stream: int
    layer: int
    start: Tokens
    tokens: Tokens
    nbytes: Bytes


class EndStream(Message, frozen=True, kw_only=True):
    stream: int
    trailer: KvTrailer
    payload_bytes: Bytes
    crc32: int


class AbortStream(Message, frozen=True, kw_only=True):
    stream: int
    reason: str = "aborted by the sender"


class Alive(Message, frozen=True, kw_only=True):
    pass


class StreamAccepted(Message, frozen=True, kw_only=True):
    stream: int


class StreamRefused(Message, frozen=True, kw_only=True):
    stream: int
    reason: str


class StreamVerified(Message, frozen=True, kw_only=True):
    stream: int


SenderFrame = OpenStream | Piece | EndStream | AbortStream | Alive
ReceiverFrame = StreamAccepted | StreamRefused | StreamVerified


class ConnectionBroken(Exception):
    """The peer is gone, silent, or does not speak the protocol."""


class Channel:
    """One connected socket. One task reads, any number write; a frame and its payload are never torn apart."""

    def __init__(self, sock: socket.socket, *, silence_s: float) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.silence_s = silence_s
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._broken = False

    def close(self) -> None:
        self._sock.close()

    def release(self) -> socket.socket:
        """The socket, which is the caller's now; the channel is as good as closed."""
        return socket.socket(fileno=self._sock.detach())

    async def send(self, frame: Message, payload: Sequence[memoryview] = ()) -> int:
        """Returns the number of payload bytes. Raises: ConnectionBroken."""
        data = encode(frame)
        buffers = [memoryview(len(data).to_bytes(4, "big") + data), *(buffer.cast("B") for buffer in payload)]
        async with self._turn:
            if self._broken:
                raise ConnectionBroken("broken off in the middle of a frame")
            self._broken = True
            await self._send_all(buffers)
            self._broken = False
        return sum(map(len, buffers[1:]))

    async def receive(
        self, types: type[Message] | UnionType, *, patience_s: float | None, bytes_max: int = FRAME_BYTES_MAX
    ) -> Any:
        """The next frame, of one of these classes (a class or a union). Raises: ConnectionBroken."""
        prefix = bytearray(4)
        await self.fill(memoryview(prefix), patience_s=patience_s)
        size = int.from_bytes(prefix, "big")
        if size > bytes_max:
            raise ConnectionBroken(f"a frame of {size} bytes, at most {bytes_max} are read")
        body = bytearray(size)
        await self.fill(memoryview(body), patience_s=self.silence_s)
        try:
            return decode(bytes(body), types)
        except WireError as error:
            raise ConnectionBroken(f"not a frame of this protocol: {error}") from error

    async def fill(self, *views: memoryview, patience_s: float | None) -> None:
        """Receive exactly this many bytes, into place; None: no bound on silence. Raises: ConnectionBroken."""
        rest = [view.cast("B") for view in views if view.nbytes]
        while rest:
            try:
                # All there is in one call; only an empty socket costs a turn of the loop and a timer.
                count = self._sock.recvmsg_into(rest[:VIEWS_MAX])[0]
            except (BlockingIOError, InterruptedError):
                count = await self._receive_some(rest[0][:SLICE_BYTES], patience_s)
            except OSError as error:
                raise ConnectionBroken(f"connection lost: {error}") from error
            if count == 0:
                raise ConnectionBroken("connection closed by the peer")
            advance(rest, count)

    async def _receive_some(self, view: memoryview, patience_s: float | None) -> int:
        try:
            async with asyncio.timeout(patience_s):
                return await self._loop.sock_recv_into(self._sock, view)
        except TimeoutError:
            raise ConnectionBroken(f"silent for {patience_s} s") from None
        except OSError as error:
            raise ConnectionBroken(f"connection lost: {error}") from error

    async def drain(self, nbytes: int) -> None:
        """Receive and forget."""
        scratch = memoryview(bytearray(min(nbytes, SLICE_BYTES)))
        while nbytes > 0:
            part = scratch[: min(nbytes, len(scratch))]
            await self.fill(part, patience_s=self.silence_s)
            nbytes -= len(part)

    async def _send_all(self, buffers: list[memoryview]) -> None:
        rest = [buffer for buffer in buffers if len(buffer)]
        while rest:
            try:
                count = self._sock.sendmsg(rest[:VIEWS_MAX])
            except (BlockingIOError, InterruptedError):
                part = rest[0][:SLICE_BYTES]
                await self._send_part(part)
                count = len(part)
            except OSError as error:
                raise ConnectionBroken(f"connection lost: {error}") from error
            advance(rest, count)

    async def _send_part(self, data: memoryview) -> None:
        try:
            async with asyncio.timeout(self.silence_s):
                await self._loop.sock_sendall(self._sock, data)
        except TimeoutError:
            raise ConnectionBroken(f"the peer takes nothing for {self.silence_s} s") from None
        except OSError as error:
            raise ConnectionBroken(f"connection lost: {error}") from error


def advance(rest: list[memoryview], count: int) -> None:
    """Take the first `count` bytes off."""
    done = 0
    while done < len(rest) and count >= len(rest[done]):
        count -= len(rest[done])
        done += 1
    del rest[:done]
    if count:
        rest[0] = rest[0][count:]


def _proof(secret: str, side: bytes, challenge: bytes, answer: bytes) -> bytes:
    return hmac.digest(secret.encode(), side + b"\0" + challenge + answer, hashlib.sha256)


async def greet(channel: Channel, secret: str) -> None:
    """The connecting side's handshake. Raises: ConnectionBroken."""
    offer: Challenge = await channel.receive(Challenge, patience_s=channel.silence_s, bytes_max=HELLO_BYTES_MAX)
    if offer.protocol != PROTOCOL:
        raise ConnectionBroken(f"the peer speaks {offer.protocol[:40]!r}, this worker {PROTOCOL!r}")
    nonce = secrets.token_bytes(16)
    await channel.send(Hello(protocol=PROTOCOL, nonce=nonce, proof=_proof(secret, b"connect", offer.nonce, nonce)))
    answer: Welcome | Farewell = await channel.receive(
        Welcome | Farewell, patience_s=channel.silence_s, bytes_max=HELLO_BYTES_MAX
    )
    if isinstance(answer, Farewell):
        raise ConnectionBroken(answer.reason)
    if not hmac.compare_digest(answer.proof, _proof(secret, b"listen", offer.nonce, nonce)):
        raise ConnectionBroken("the peer does not know the data_secret")


async def admit(channel: Channel, secret: str) -> None:
    """The listening side's handshake. Raises: ConnectionBroken."""
    challenge = secrets.token_bytes(16)
    await channel.send(Challenge(protocol=PROTOCOL, nonce=challenge))
    hello: Hello = await channel.receive(Hello, patience_s=channel.silence_s, bytes_max=HELLO_BYTES_MAX)
    expected = _proof(secret, b"connect", challenge, hello.nonce)
    reason = None
    if hello.protocol != PROTOCOL:
        reason = f"this worker speaks {PROTOCOL!r}"
    elif not hmac.compare_digest(hello.proof, expected):
        reason = "wrong data_secret: it must be the same on every worker"
    if reason is not None:
        await channel.send(Farewell(reason=reason))
        raise ConnectionBroken(reason)
    await channel.send(Welcome(proof=_proof(secret, b"listen", challenge, hello.nonce)))


async def dial(address: str, silence_s: float) -> Channel:
    """Connect to host:port. Raises: ConnectionBroken."""
    loop = asyncio.get_running_loop()
    host, _, port = address.rpartition(":")
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(silence_s):
            infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            family, kind, protocol, _, target = infos[0]
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            await loop.sock_connect(sock, target)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        if sock is not None:
            sock.close()
        raise ConnectionBroken(f"cannot connect: {str(error) or type(error).__name__}") from error
    except asyncio.CancelledError:
        if sock is not None:
            sock.close()
        raise
    return Channel(sock, silence_s=silence_s)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there (port 0: any free one). Raises: OSError."""
    family, kind, protocol, _, target = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


async def connections(
    listener: socket.socket, kind: str, room: Callable[[], int]
) -> AsyncIterator[tuple[socket.socket, str]]:
    """Until cancelled: each connection that is made to the listener, and who made it. One that comes while there is no
    room is closed at once."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, peer = await loop.sock_accept(listener)
        except OSError as error:  # out of file descriptors, or a peer that hung up at once
            log.warning("could not take a connection", kind=kind, error=str(error))
            await asyncio.sleep(ACCEPT_AGAIN_S)
            continue
        if room() <= 0:
            log.warning("too many connections; refused one", kind=kind, peer=str(peer))
            sock.close()
            continue
        yield sock, str(peer)
