"""`GET /metrics` of a role that has no HTTP door of its own.

Enough of HTTP for a scrape and no more: one request per connection, read within a bound of time and size, answered and
closed. A scraper that hangs holds one of a few connections for a few seconds, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from common.errors import StartupError
from common.logs import get_logger
from common.metrics import CONTENT_TYPE, Metrics
from common.runtime.supervisor import Supervisor

PATH = "/metrics"
CONNECTIONS_MAX = 16
REQUEST_BYTES_MAX = 16_384
REQUEST_S = 5.0
"""How long a scrape may take in all."""
BACKLOG = 16

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ScrapeAddress:
    """Where to listen; port 0: nowhere."""

    host: str
    port: int


def listen(at: ScrapeAddress) -> socket.socket:
    """A listening socket. Raises: StartupError, if the address is taken or unknown."""
    try:
        family = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((at.host, at.port), family=family, backlog=BACKLOG)
    except OSError as error:
        where, reason = f"{at.host}:{at.port}", (error.strerror or str(error)).partition(" (")[0]
        raise StartupError(
            f"cannot listen on {where} for metrics: {reason}; pass another --metrics-host or --metrics-port (0: none)"
        ) from error


@contextlib.asynccontextmanager
async def exporting(metrics: Metrics, at: ScrapeAddress) -> AsyncIterator[None]:
    """Answer scrapes for the length of the block. Raises: StartupError."""
    if not at.port:
        yield
        return
    with listen(at) as listener:
        async with Supervisor() as tasks:
            server = await _serve(metrics, tasks, listener)
            try:
                yield
            finally:
                server.close()
                await tasks.stop()


async def _serve(metrics: Metrics, tasks: Supervisor, listener: socket.socket) -> asyncio.Server:
    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(tasks.running) >= CONNECTIONS_MAX:
            writer.close()
        else:
            tasks.spawn(_answer(metrics, reader, writer), name="scrape")

    return await asyncio.start_server(connected, sock=listener, limit=REQUEST_BYTES_MAX)


async def _answer(metrics: Metrics, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(REQUEST_S):
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(_response(metrics, head))
            await writer.drain()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        log.debug("a scrape was broken off", reason=str(error) or type(error).__name__)
    finally:
        writer.close()


def _response(metrics: Metrics, head: bytes) -> bytes:
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _text("400 Bad Request", "not an HTTP request")
    if words[0] not in ("GET", "HEAD"):
        return _text("405 Method Not Allowed", f"GET {PATH}")
    if words[1].partition("?")[0] != PATH:
        return _text("404 Not Found", f"metrics are at {PATH}")
    try:
        body = metrics.exposition()
    except Exception:
        log.exception("metrics could not be read")
        return _text("500 Internal Server Error", "the log of this process says why")
    return _head("200 OK", CONTENT_TYPE, len(body)) + (body if words[0] == "GET" else b"")


def _text(status: str, line: str) -> bytes:
    body = f"{line}\n".encode()
    return _head(status, "text/plain; charset=utf-8", len(body)) + body


def _head(status: str, content_type: str, length: int) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1")
