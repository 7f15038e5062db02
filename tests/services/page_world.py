"""A router on a socket over the in-memory bus, and a make-believe cluster whose messages the page hears."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from common.messages.base import Message
from common.messages.views import ClusterView
from common.runtime import subjects, wire
from common.runtime.supervisor import Supervisor
from services.router.main import Server, listening
from services.router.openai_http import create_app
from tests.services.activity_scenario import MAKERS, request_view, view
from tests.services.router_world import World, world


class Stage:
    """Workers `p0`… and `d0`…, and what they are said to do."""

    def __init__(self, w: World, url: str) -> None:
        self.world = w
        self.url = url
        self.prefillers: list[str] = []
        self.decoders: list[str] = []
        self.held: dict[str, set[str]] = {}
        w.router.activity._ask = self._view

    def enter(self, prefillers: int, decoders: int) -> None:
        self.prefillers = [f"p{i}" for i in range(prefillers)]
        self.decoders = [f"d{i}" for i in range(decoders)]
        self.held = {name: set() for name in (*self.prefillers, *self.decoders)}

    async def say(self, *lines: str) -> None:
        """Lines of `activity_scenario` without the time: they are said now."""
        for line in lines:
            verb, name, *rest = line.split()
            message: Message = MAKERS[verb](name, dict(part.split("=", 1) for part in rest))
            await self.world.cluster.bus.publish(subjects.COORDINATOR, wire.encode(message))

    async def short(self, name: str, worker: str, decoder: str, prefill_s: float, decode_s: float) -> None:
        """One whole life of a short."""
        self.held[worker].add(name)
        await self.say(f"submitted {name}", f"run {name} on={worker} to={decoder}")
        await asyncio.sleep(prefill_s)
        await self.say(f"prefilled {name} on={worker} in_worker={prefill_s} compute={prefill_s}")
        await asyncio.sleep(0.003)
        self.held[worker].discard(name)
        self.held[decoder].add(name)
        await self.say(f"released {name} on={worker}")
        await asyncio.sleep(decode_s)
        self.held[decoder].discard(name)
        await self.say(f"decoded {name} on={decoder}")

    async def longs(self, name: str, worker: str, rng: random.Random) -> None:
        """A long after another, each paused now and then for a short."""
        for number in range(1_000):
            long = f"{name}-{number}"
            self.held[worker].add(long)
            await self.say(f"submitted {long} tokens=7000", f"form {long} on={worker} tokens=7000")
            await asyncio.sleep(0.05)
            await self.say(f"running {long} on={worker}")
            for part in range(4):
                await asyncio.sleep(rng.uniform(0.4, 1.2))
                await self.say(f"paused {long} on={worker} done={part * 1500}")
                await self.short(f"{long}-{part}", worker, self.decoders[0], rng.uniform(0.1, 0.4), 0.2)
                await self.say(f"running {long} on={worker}")
            await self.say(f"segment-prefilled {long} on={worker}", f"group-prefilled {long}")
            await asyncio.sleep(0.5)
            await self.say(f"segment-finished {long} on={worker}", f"group-finished {long}")
            self.held[worker].discard(long)

    async def shorts(self, rate: float, rng: random.Random, tasks: Supervisor) -> None:
        for number in range(100_000):
            await asyncio.sleep(rng.expovariate(rate))
            where = rng.choice(self.prefillers), rng.choice(self.decoders)
            tasks.spawn(self.short(f"s{number}", *where, rng.uniform(0.02, 0.2), rng.uniform(0.3, 3.0)), name="short")

    async def play(self, tasks: Supervisor, *, longs: int, rate: float, seed: int = 0) -> None:
        """Go on for as long as the tasks live."""
        rng = random.Random(seed)
        for i in range(longs):
            tasks.spawn(self.longs(f"L{i}", self.prefillers[i], rng), name=f"long {i}")
        tasks.spawn(self.shorts(rate, rng, tasks), name="shorts")

    async def _view(self) -> ClusterView:
        held = {worker: ",".join(sorted(names)) for worker, names in self.held.items()}
        return view(held, [request_view("waits", "short", "queued", "p0", age_s=0.1)])


@asynccontextmanager
async def stage(**settings: Any) -> AsyncIterator[Stage]:
    async with world(**settings) as w, Supervisor() as tasks:
        with listening("127.0.0.1", 0) as listener:
            config = uvicorn.Config(
                create_app(w.router), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
            server = Server(config)
            serving = tasks.spawn(server.serve(sockets=[listener]), name="http")
            try:
                yield Stage(w, "http://{}:{}/".format(*listener.getsockname()))
            finally:
                w.router.activity.close()
                server.should_exit = True
                await serving
