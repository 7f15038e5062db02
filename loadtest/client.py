"""A client that costs little: it shares the machine with what it measures.

One process, one thread; HTTP/1.1 over kept-open connections, parsed by httptools. The time of an event
is taken when its bytes arrive, before they are parsed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from common.errors import PecSchedError
from loadtest.workload import Ask

CONNECT_S = 5.0
ERROR_CHARS_MAX = 300


class ClientError(PecSchedError):
    """The server could not be reached, or did not answer as one of ours does."""


@dataclass(slots=True)
class Answer:
    """What came back for one request. Times are of the running loop's clock."""

    sent_s: float
    status: int = 0
    first_s: float | None = None
    """When the first token's event arrived."""
    last_s: float | None = None
    """When the last token's event arrived."""
    tokens: int = 0
    finish_reason: str | None = None
    done: bool = False
    error: str | None = None

    def failure(self, ask: Ask) -> str | None:
        """Why this is not the whole answer; None: it is."""
        if self.error is not None:
            return self.error
        if not self.done:
            return "the stream ended before its end mark"
        if self.tokens != ask.output_tokens or self.finish_reason != "length":
            return f"{self.tokens} tokens of {ask.output_tokens}, finish reason {self.finish_reason}"
        return None


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


def take_event(answer: Answer, event: bytes, now_s: float) -> None:
    """One server-sent event of a completion, without the empty line behind it. Raises: msgspec.MsgspecError."""
    data = event.removeprefix(b"data: ")
    if data == b"[DONE]":
        answer.done = True
        return
    parsed = _decode_event(data)
    if parsed.error is not None:
        answer.error = str(parsed.error)[:ERROR_CHARS_MAX]
    for choice in parsed.choices:
        new = len(choice.logprobs.tokens) if choice.logprobs is not None else 0
        if new:
            answer.first_s = now_s if answer.first_s is None else answer.first_s
            answer.last_s = now_s
            answer.tokens += new
        answer.finish_reason = choice.finish_reason or answer.finish_reason


@dataclass(slots=True)
class _Exchange:
    """One request on a connection, and what of its answer has arrived."""

    answer: Answer
    ended: asyncio.Future[None]
    stream: bool
    """Server-sent events; otherwise the body is kept as it is."""
    body: bytearray = field(default_factory=bytearray)

    def on_body(self, data: bytes, now_s: float) -> None:
        self.body += data
        if self.stream and self.answer.status == 200:
            *events, rest = bytes(self.body).split(b"\n\n")
            self.body = bytearray(rest)
            for event in events:
                take_event(self.answer, event, now_s)


class _Connection(asyncio.Protocol):
    """One kept-open connection: one exchange at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._exchange: _Exchange | None = None
        self._now_s = 0.0
        self.open = False

    def begin(self, head: bytes, body: bytes, *, stream: bool) -> _Exchange:
        assert self._transport is not None
        self._exchange = _Exchange(Answer(self._loop.time()), self._loop.create_future(), stream)
        self._parser = httptools.HttpResponseParser(self)
        self._transport.writelines([head, body])
        return self._exchange

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is an asyncio.Transport in all but its class.
        self._transport, self.open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        self._now_s = self._loop.time()
        if self._exchange is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.MsgspecError) as error:
            self._end(ClientError(f"unreadable answer: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._end(ClientError(f"connection lost: {exc or 'closed by the server'}"))

    # --- httptools ---

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.on_body(body, self._now_s)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.open = False
        self._end(None)

    def _end(self, error: ClientError | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.ended.done():
            if error is None:
                exchange.ended.set_result(None)
            else:
                exchange.ended.set_exception(error)


class Client:
    """Talks to one router. `timeout_s` bounds a whole answer."""

    def __init__(self, url: str, *, timeout_s: float, api_key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ClientError(f"{url}: an address like http://127.0.0.1:8000 is needed")
        self.url = url
        self._host, self._port = parts.hostname, parts.port or 80
        self._timeout_s = timeout_s
        self._common = f"Host: {parts.netloc}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def complete(self, ask: Ask, request_id: str) -> Answer:
        """Send one request and take in its stream. Never raises for what the server does: see `Answer.error`."""
        begun_s = asyncio.get_running_loop().time()
        head = (
            f"POST /v1/completions HTTP/1.1\r\n{self._common}Content-Type: application/json\r\n"
            f"X-Request-Id: {request_id}\r\nContent-Length: {len(ask.body)}\r\n\r\n"
        )
        try:
            exchange = await self._exchange(head.encode(), ask.body, stream=True)
        except ClientError as error:
            return Answer(begun_s, error=str(error))
        if exchange.answer.status != 200:
            text = exchange.body.decode(errors="replace")[:ERROR_CHARS_MAX]
            exchange.answer.error = f"status {exchange.answer.status}: {text}"
        return exchange.answer

    async def get(self, path: str) -> Any:
        """The JSON at a path. Raises: ClientError."""
        head = f"GET {path} HTTP/1.1\r\n{self._common}\r\n".encode()
        exchange = await self._exchange(head, b"", stream=False)
        if exchange.answer.status != 200:
            raise ClientError(f"{self.url}{path}: status {exchange.answer.status}")
        return msgspec.json.decode(bytes(exchange.body))

    async def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()

    async def _exchange(self, head: bytes, body: bytes, *, stream: bool) -> _Exchange:
        """Raises: ClientError."""
        connection = await self._connection()
        exchange = connection.begin(head, body, stream=stream)
        try:
            async with asyncio.timeout(self._timeout_s):
                await exchange.ended
        except TimeoutError:
            connection.close()
            raise ClientError(f"no whole answer within {self._timeout_s:g} s") from None
        except BaseException:
            connection.close()
            raise
        if connection.open:
            self._idle.append(connection)
        return exchange

    async def _connection(self) -> _Connection:
        self._all = {connection for connection in self._all if connection.open}
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(_Connection, self._host, self._port)
        except (OSError, TimeoutError) as error:
            raise ClientError(f"{self.url} cannot be reached: {str(error) or 'no answer'}") from error
        self._all.add(connection)
        return connection
