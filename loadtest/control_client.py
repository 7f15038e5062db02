"""Clients of `loadtest control`: they cost little, and they check every token of every stream.

The timed engine's words follow from the prompt alone, so that the whole answer is known before it is asked for. What
comes is compared with it: over HTTP the text, over NATS the token ids.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from common.runtime import subjects
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.bus_nats import connect_nats
from loadtest.client import CONNECT_S, ERROR_CHARS_MAX, ClientError
from services.engine.timed_language import TimedShape, expected_tokens
from services.router.model_text import ModelText

PROMPTS = 256
PROMPT_WORDS = 24
WORDS = ("the", "short", "ones", "wait", "behind", "a", "long", "until", "it", "pauses", "and", "lets", "them", "pass")


@dataclass(frozen=True, slots=True)
class Question:
    """A request, encoded ahead of time as both doors take it, and its whole answer."""

    body: bytes
    text: str
    token_ids: tuple[int, ...]


def make_questions(text: ModelText, tokens: int, *, seed: int = 0, count: int = PROMPTS) -> list[Question]:
    """Random prompts and what the timed engines must answer."""
    rng, vocab, stops = random.Random(seed), TimedShape().vocab, text.facts.stop_token_ids
    questions = []
    for _ in range(count):
        prompt = " ".join(rng.choices(WORDS, k=PROMPT_WORDS))
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        expected = expected_tokens(text.encode(prompt), tokens, vocab, stops)
        questions.append(Question(msgspec.json.encode(body), text.decode(expected), tuple(expected)))
    return questions


@dataclass(slots=True)
class Stream:
    """What came back for one question. Times are of the running loop's clock."""

    question: Question
    sent_s: float
    ended: asyncio.Future[None]
    first_s: float = 0.0
    last_s: float = 0.0
    failure: str | None = None
    finish_reason: str | None = None
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def end(self, failure: str | None = None) -> None:
        self.failure = self.failure or failure
        if not self.ended.done():
            self.ended.set_result(None)

    def check(self, whole: bool) -> None:
        """`whole`: what has come is what was to come."""
        if self.failure is None and not (whole and self.finish_reason == "length"):
            got = f"{len(self.token_ids)} token ids, {len(''.join(self.texts))} characters"
            self.failure = f"another answer than expected: {got}, finish reason {self.finish_reason}"


class Door(Protocol):
    """A way to a router. One question per call, any number of calls at once."""

    async def ask(self, question: Question) -> Stream:
        """Never raises for what the server does: see `Stream.failure`."""
        ...

    async def close(self) -> None: ...


async def until_ended(stream: Stream, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await stream.ended
            return
    stream.failure = f"no whole answer within {timeout_s:g} s"


# --- HTTP ----------------------------------------------------------------------------------------


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Connection(asyncio.Protocol):
    """One kept-open connection: one stream at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._stream: Stream | None = None
        self._rest = b""
        self._done = False
        self._now_s = 0.0
        self.open = False

    def begin(self, head: bytes, question: Question) -> Stream:
        assert self._transport is not None
        self._stream = Stream(question, self._loop.time(), self._loop.create_future())
        self._parser = httptools.HttpResponseParser(self)
        self._rest, self._done = b"", False
        self._transport.write(head + question.body)
        return self._stream

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is an asyncio.Transport in all but its class.
        self._transport, self.open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        self._now_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.MsgspecError) as error:
            self._end(f"unreadable answer: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._end(f"connection lost: {exc or 'closed by the server'}")

    def on_body(self, body: bytes) -> None:
        stream = self._stream
        if stream is None:
            return
        if self._parser.get_status_code() != 200:
            stream.failure = f"status {self._parser.get_status_code()}: {body.decode(errors='replace')}"
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                self._done = True
            else:
                self._on_event(stream, _decode_event(event[6:]))

    def _on_event(self, stream: Stream, event: _Event) -> None:
        stream.last_s = self._now_s
        stream.first_s = stream.first_s or self._now_s
        if event.error is not None:
            stream.failure = str(event.error)[:ERROR_CHARS_MAX]
        for choice in event.choices:
            stream.texts.append(choice.text)
            stream.finish_reason = choice.finish_reason or stream.finish_reason

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.open = False
        if self._stream is not None:
            self._stream.check(self._done and "".join(self._stream.texts) == self._stream.question.text)
        self._end(None)

    def _end(self, failure: str | None) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.end(failure)


class HttpDoor:
    """Asks the routers at these addresses in turn, over connections that are kept open."""

    def __init__(self, urls: Sequence[str], *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._heads = [
            f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
            for url in urls
        ]
        self._places = [(urlsplit(url).hostname or "", urlsplit(url).port or 80) for url in urls]
        self._idle: list[list[_Connection]] = [[] for _ in urls]
        self._turn = 0

    async def ask(self, question: Question) -> Stream:
        which = self._turn = (self._turn + 1) % len(self._places)
        try:
            connection = await self._connection(which)
        except ClientError as error:
            return _unsent(question, str(error))
        stream = connection.begin(
            f"{self._heads[which]}Content-Length: {len(question.body)}\r\n\r\n".encode(), question
        )
        await until_ended(stream, self._timeout_s)
        if connection.open and stream.failure is None:
            self._idle[which].append(connection)
        else:
            connection.close()
        return stream

    async def close(self) -> None:
        for connection in (connection for idle in self._idle for connection in idle):
            connection.close()

    async def _connection(self, which: int) -> _Connection:
        while self._idle[which]:
            connection = self._idle[which].pop()
            if connection.open:
                return connection
        host, port = self._places[which]
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
        except (OSError, TimeoutError) as error:
            raise ClientError(f"{host}:{port} cannot be reached: {str(error) or 'no answer'}") from error
        return connection


def _unsent(question: Question, failure: str) -> Stream:
    loop = asyncio.get_running_loop()
    stream = Stream(question, loop.time(), loop.create_future())
    stream.end(failure)
    return stream


# --- NATS ----------------------------------------------------------------------------------------


class _Part(msgspec.Struct):
    token_ids: list[int] = []
    finish_reason: str | None = None
    done: bool = False
    error: Any = None


_decode_part = msgspec.json.Decoder(_Part).decode


class NatsDoor:
    """All answers come to one subscription, each under a last word of its own. `listen` first."""

    def __init__(self, bus: Bus, *, timeout_s: float) -> None:
        self._bus = bus
        self._timeout_s = timeout_s
        self._inbox = bus.new_inbox()
        self._streams: dict[str, Stream] = {}
        self._asked = 0

    @classmethod
    async def open(cls, url: str, *, timeout_s: float) -> NatsDoor:
        """On a connection of its own. Raises: ClientError."""
        try:
            door = cls(await connect_nats(url, "pecsched-loadtest"), timeout_s=timeout_s)
            await door.listen()
        except BusError as error:
            raise ClientError(str(error)) from error
        return door

    async def listen(self) -> None:
        """Raises: BusError."""
        await self._bus.subscribe(f"{self._inbox}.*", self._hear)

    async def ask(self, question: Question) -> Stream:
        loop = asyncio.get_running_loop()
        self._asked += 1
        name = f"{self._inbox}.{self._asked}"
        stream = self._streams[name] = Stream(question, loop.time(), loop.create_future())
        try:
            await self._bus.publish(subjects.GENERATE, question.body, reply=name)
            await until_ended(stream, self._timeout_s)
        except BusError as error:
            stream.end(str(error))
        finally:
            del self._streams[name]
        return stream

    async def close(self) -> None:
        await self._bus.close()

    async def _hear(self, delivery: Delivery) -> None:
        stream = self._streams.get(delivery.subject)
        if stream is None:
            return
        try:
            part = _decode_part(delivery.data)
        except msgspec.MsgspecError as error:
            stream.end(f"unreadable answer: {error}")
            return
        if part.token_ids:
            stream.last_s = asyncio.get_running_loop().time()
            stream.first_s = stream.first_s or stream.last_s
            stream.token_ids += part.token_ids
        stream.finish_reason = part.finish_reason or stream.finish_reason
        if part.error is not None:
            stream.failure = str(part.error)[:ERROR_CHARS_MAX]
        if part.done:
            stream.check(tuple(stream.token_ids) == stream.question.token_ids)
            stream.end()
