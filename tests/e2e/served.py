"""A `pecsched serve` with timed engines, its clients, and what they may expect of it.

A timed engine continues every prompt in one way only (`expected_tokens`), whoever computes it and from where:
a client that got anything else was served wrongly.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil

from common.messages.views import ClusterView
from common.model_files import EMBEDDED, model_folder
from common.runtime import keys
from common.runtime.bus import Bus
from common.runtime.bus_nats import connect_nats
from common.runtime.store import Store
from common.runtime.store_redis import connect_redis
from services.engine.timed_language import expected_tokens
from services.router.model_text import ModelText, load
from services.status import describe_cluster
from tests.serve_process import LAST_LINE, ServeProcess, clean_environment, serve_process

VOCAB = 49_152
POLL_S = 0.05
SETTLED_S = 30.0


@cache
def words() -> ModelText:
    return load(model_folder(EMBEDDED, ""), name=EMBEDDED, default_max_tokens=16)


@dataclass(eq=False)
class Question:
    """What one client asked, and what came."""

    prompt_ids: list[int]
    max_tokens: int
    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    error: str = ""
    """What the client was told, or what it saw of the connection."""
    first_s: float | None = None
    ended_s: float | None = None
    began: asyncio.Event = field(default_factory=asyncio.Event)
    """The first text came, or the end."""
    task: asyncio.Task[None] | None = None

    @property
    def is_complete(self) -> bool:
        return self.finish_reason == "length" and self.completion_tokens == self.max_tokens

    def check(self) -> None:
        """All its tokens or an error; in either case no wrong one."""
        expected = words().decode(expected_tokens(self.prompt_ids, self.max_tokens, VOCAB))
        assert self.error or self.is_complete, f"neither complete nor an error: {self}"
        assert expected.startswith(self.text), f"wrong tokens: {self}"
        assert self.error or self.text == expected, f"wrong end: {self}"


class Served:
    """The running cluster as its clients and its operator see it."""

    def __init__(self, running: ServeProcess, http: httpx.AsyncClient, bus: Bus, store: Store) -> None:
        self.running = running
        self.asked: list[Question] = []
        self._http = http
        self._bus = bus
        self._store = store
        self._random = random.Random(5)

    def ask(self, prompt_tokens: int, max_tokens: int) -> Question:
        question = Question([self._random.randrange(VOCAB) for _ in range(prompt_tokens)], max_tokens)
        question.task = asyncio.get_running_loop().create_task(self._client(question))
        self.asked.append(question)
        return question

    def kill(self, role: str, how: signal.Signals = signal.SIGKILL) -> bool:
        """Whatever runs under this name now; or stop it, or let it go on. False: nothing does, it is just being
        restarted."""
        killed = False
        for child in psutil.Process(self.running.process.pid).children():
            with suppress(psutil.Error):
                if role in (child.environ().get("PECSCHED_WORKER_ID"), child.cmdline()[-1], child.name()[: len(role)]):
                    child.send_signal(how)
                    killed = True
        return killed

    async def leave(self, question: Question) -> None:
        """The client closes its connection."""
        assert question.task is not None
        question.task.cancel()
        await asyncio.wait([question.task])
        self.asked.remove(question)

    async def ended(self, questions: list[Question], within_s: float) -> None:
        """Wait for the end of all of these."""
        _, hanging = await asyncio.wait([q.task for q in questions if q.task], timeout=within_s)
        assert not hanging, f"{len(hanging)} clients hang: {await self.describe()}"

    async def view(self) -> ClusterView | None:
        return await describe_cluster(self._bus, timeout_s=1.0)

    async def until(self, holds: Callable[[ClusterView], object], within_s: float = SETTLED_S) -> ClusterView:
        """Ask the scheduler again and again until its view is so."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + within_s
        while True:
            view = await self.view()
            if view is not None and holds(view):
                return view
            assert loop.time() < end_s, f"not within {within_s} s: {await self.describe()}"
            await asyncio.sleep(POLL_S)

    async def settled(self, workers: int = 3, *, prompts: bool = True) -> None:
        """Everybody is there, nothing runs, and no KV is held, accounted for or on record anywhere; no prompts
        either, unless their router was killed: those expire."""
        await self.until(lambda v: len(v.workers) == workers and v.coordinator_present and not v.requests)
        await self.until(lambda v: not any(w.kv_reserved_tokens or w.requests for w in v.workers))
        loop = asyncio.get_running_loop()
        end_s = loop.time() + SETTLED_S
        while records := await self.records(prompts=prompts):
            assert loop.time() < end_s, f"left in Redis: {records}"
            await asyncio.sleep(POLL_S)

    async def records(self, *, prompts: bool = True) -> list[str]:
        """Keys in Redis that must go when the requests go."""
        prefixes = (keys.kv_all(), keys.requests(), *([f"{keys.ROOT}:prompt:"] if prompts else []))
        return [key for prefix in prefixes for key in await self._store.scan(prefix)]

    async def describe(self) -> str:
        view = await self.view()
        lines = [str(q) for q in self.asked if q.ended_s is None]
        if view is not None:
            lines += [f"{r.request_id}/{r.attempt} {r.length_class} {r.state} on {r.workers}" for r in view.requests]
            lines += [f"{w.profile.worker_id}: {w.requests} KV {w.kv_reserved_tokens}" for w in view.workers]
            lines.append(str(view.counters))
        return "\n".join([*lines, f"logs: {self.running.lines}"])

    async def _client(self, question: Question) -> None:
        body = {
            "prompt": question.prompt_ids,
            "max_tokens": question.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    question.error = f"{response.status_code}: {response.json()['error']['message']}"
                    return
                async for line in response.aiter_lines():
                    self._read(question, line)
            if not question.error and not question.is_complete:
                question.error = "the stream ended too early"
        except httpx.HTTPError as error:
            question.error = f"connection: {error!r}"
        finally:
            question.ended_s = asyncio.get_running_loop().time()
            question.began.set()

    @staticmethod
    def _read(question: Question, line: str) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in event:
            question.error = event["error"]["message"]
            return
        for choice in event["choices"]:
            question.text += choice["text"]
            question.finish_reason = choice["finish_reason"] or question.finish_reason
        if event.get("usage"):
            question.completion_tokens = event["usage"]["completion_tokens"]
        if question.text and not question.began.is_set():
            question.first_s = asyncio.get_running_loop().time()
            question.began.set()


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[ServeProcess]:
    """Two prefill workers, one decode worker."""
    env = clean_environment() | {"XDG_RUNTIME_DIR": str(folder)}
    command = (sys.executable, "-m", "services.cli", "serve", "--port", "0", "--engine", "timed")
    with serve_process((*command, "--log-dir", str(folder / "logs"), *arguments), env) as running:
        running.until(LAST_LINE)
        yield running


@asynccontextmanager
async def clients(running: ServeProcess) -> AsyncIterator[Served]:
    limits = httpx.Limits(max_connections=200)
    store = await connect_redis(running.address("redis"), patience_s=15.0)
    bus = await connect_nats(running.address("nats"), "test", patience_s=5.0)
    try:
        async with httpx.AsyncClient(
            base_url=running.address("router"), timeout=60.0, trust_env=False, limits=limits
        ) as http:
            served = Served(running, http, bus, store)
            try:
                yield served
            finally:
                tasks = [q.task for q in served.asked if q.task]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await bus.close()
        await store.close()
