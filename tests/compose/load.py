"""Traffic at a cluster while its parts are scaled, killed and restarted, and what came of each request.

A request fails if it got an error, or less than all its tokens. It is sent over a connection on which a router has
just said that it lives; where nobody does, or one that leaves, a client goes to the next router, as every proxy does.
(To be let in means nothing: Docker's own proxy takes connections for a container that is gone, and drops them.)
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import nats
from nats.aio.client import Client

from loadtest.nats_example import generate

SILENCE_S = 150.0
"""Longest wait for the next piece of an answer."""
WORDS = ("the", "sea", "a", "ship", "one", "night", "of", "wind", "and", "rain", "came", "down", "to", "where")
SHORT_TOKENS, LONG_TOKENS = 12, 6
LONG_WORDS = 2_400


@dataclass
class Tally:
    """By kind of client: answers that were whole, and what went wrong."""

    whole: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in sorted(self.whole.items())) or "nothing"
        return f"{done}; {len(self.failed)} failed"


class Incomplete(Exception):
    """The answer ended before its last token."""


class Load:
    """Clients that ask one question after another until the block ends. `urls`: of the routers."""

    def __init__(self, urls: Sequence[str], nats_url: str) -> None:
        self.tally = Tally()
        self._urls = list(urls)
        self._nats_url = nats_url
        self._random = random.Random(7)
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self, *, over_nats: bool = True) -> AsyncIterator[Tally]:
        """Two clients of shorts and one of longs over HTTP, one of shorts over NATS. At the end each finishes what it
        has begun."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {"short": self._shorts, "long": self._longs}
        clients = [kinds["short"], kinds["short"], kinds["long"], *([self._over_nats] if over_nats else [])]
        self.tally = Tally()
        self._stop.clear()
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client())
            try:
                yield self.tally
            finally:
                self._stop.set()

    async def _shorts(self) -> None:
        async with self._http() as http:
            await self._again_and_again("short", lambda: self._post(http, self._words(12), SHORT_TOKENS))

    async def _longs(self) -> None:
        async with self._http() as http:
            await self._again_and_again("long", lambda: self._post(http, self._words(LONG_WORDS), LONG_TOKENS))

    async def _over_nats(self) -> None:
        client = await nats.connect(self._nats_url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
        try:
            await self._again_and_again("nats", lambda: ask_nats(client, self._words(12), SHORT_TOKENS))
        finally:
            await client.close()

    async def _again_and_again(self, kind: str, ask: Callable[[], Awaitable[None]]) -> None:
        while not self._stop.is_set():
            try:
                await ask()
            except (httpx.HTTPError, Incomplete, nats.errors.Error, TimeoutError, OSError) as error:
                self.tally.failed.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)
            else:
                self.tally.whole[kind] += 1

    async def _post(self, http: httpx.AsyncClient, prompt: str, tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        for url in self._random.sample(self._urls, len(self._urls)):
            if await _lives(http, url):
                await _read_stream(http, f"{url}/v1/completions", body)
                return
        raise Incomplete("no router takes requests")

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=httpx.Timeout(SILENCE_S, connect=10.0), trust_env=False)


async def _lives(http: httpx.AsyncClient, url: str) -> bool:
    try:
        answer = await http.get(f"{url}/live")
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.headers.get("connection") != "close"


async def _read_stream(http: httpx.AsyncClient, url: str, body: dict[str, object]) -> None:
    """Raises: httpx.HTTPError, Incomplete."""
    finish = None
    async with http.stream("POST", url, json=body) as answer:
        if answer.status_code != 200:
            raise Incomplete(f"HTTP {answer.status_code}: {(await answer.aread()).decode()[:300]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Incomplete(event["error"]["message"])
            finish = next((choice["finish_reason"] for choice in event["choices"]), None) or finish
    if finish != "length":
        raise Incomplete(f"the stream ended with {finish}")


async def ask_nats(client: Client, prompt: str, tokens: int) -> None:
    """Raises: nats.errors.Error, Incomplete."""
    request = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    last: dict[str, object] = {}
    async for message in generate(client, request):
        last = message
    if "error" in last:
        raise Incomplete(str(last["error"]))
