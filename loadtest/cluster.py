"""The cluster that is measured: one that `pecsched serve` starts for the benchmark, or one that runs already.

A started one is a child with a run file of its own (it does not take the place of another `serve` of this
user), on free ports; what it prints after its start, such as a role that crashed, is passed on to the
console, because figures of such a run mean nothing.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.errors import StartupError
from common.messages.base import Message
from common.messages.views import ClusterView
from common.runtime.bus import BusError, Delivery
from common.runtime.bus_nats import connect_nats
from common.runtime.cores import usable_cores
from common.runtime.supervisor import Supervisor
from common.runtime.wire import decode
from loadtest.nats_client import Door
from services.children import LAUNCHER
from services.run_file import read_run_file, run_file_path

READY_MARK = "PecSched is ready"
TAIL_LINES = 20
START_S = 420.0
STOP_S = 60.0
KILL_S = 5.0
STRAY_LINES = re.compile(r"ended:|runs again|\|")
"""What `serve` prints while it serves and a reader of the figures must see."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster is."""

    url: str
    nats_url: str = ""
    """Empty: unknown; what only the bus tells is then not measured."""
    here: bool = True
    """On this machine, so that its load can be read."""


@asynccontextmanager
async def served(flags: Sequence[str], say: Say) -> AsyncIterator[Place]:
    """A cluster for the length of the block. Raises: StartupError, with the last lines of what it said."""
    with tempfile.TemporaryDirectory(prefix="pecsched-loadtest-") as folder:
        env = {**os.environ, "XDG_RUNTIME_DIR": folder}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid())),
            *(sys.executable, "-P", "-m", "services.cli", "serve", "--port", "0", *flags),
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        ready = asyncio.Event()
        lines: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            async with Supervisor() as tasks:
                reading = tasks.spawn(_read(process, lines, ready, say), name="output of serve")
                started = tasks.spawn(ready.wait(), name="serve is ready")
                await asyncio.wait((reading, started), timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
                if not ready.is_set():
                    raise StartupError("\n  ".join([f"pecsched serve {shlex.join(flags)} did not start:", *lines]))
                yield _place(run_file_path(env))
                await _stop(process)
                await asyncio.wait((reading,), timeout=KILL_S)
        finally:
            await _stop(process)


def _place(path: Path) -> Place:
    run = read_run_file(path)
    if run is None:
        raise StartupError(f"pecsched serve left no run file at {path}")
    return Place(run.url, run.nats_url)


async def _read(process: asyncio.subprocess.Process, lines: deque[str], ready: asyncio.Event, say: Say) -> None:
    assert process.stdout is not None
    async for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        lines.append(line)
        if line.startswith(READY_MARK):
            ready.set()
        elif ready.is_set() and STRAY_LINES.search(line):
            say(line)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Let it drain; if that takes too long, or we are in a hurry ourselves, kill it (its children die with it)."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            async with asyncio.timeout(KILL_S):
                await process.wait()


async def view_of(client: Door) -> ClusterView:
    """The scheduler's view, by way of the router. Raises: ClientError."""
    return msgspec.convert(await client.get("/cluster"), ClusterView, strict=False)


def busy_slots(view: ClusterView, place: Place) -> int:
    """How many longs the machine can prefill at once at full speed: one per prefill worker, no more than cores."""
    workers = sum(worker.profile.role == "prefill" for worker in view.workers)
    return max(1, min(workers, usable_cores()) if place.here else workers)


class Observer:
    """A silent second subscriber: hears messages of some kinds between the roles, and when. It keeps them in `heard`,
    or tells each on."""

    def __init__(self, *kinds: type[Message], tell: Callable[[float, Message], None] | None = None) -> None:
        self.heard: list[tuple[float, Message]] = []
        self._tell = tell or self._keep
        self._news = asyncio.Event()
        # A message's class name as MessagePack writes it: its length, then its letters.
        self._marks = {kind: bytes([0xA0 | len(kind.__name__)]) + kind.__name__.encode() for kind in kinds}

    async def hear(self, delivery: Delivery) -> None:
        now_s = asyncio.get_running_loop().time()
        for kind, mark in self._marks.items():
            if mark in delivery.data:  # most messages are others; they are not decoded
                self._tell(now_s, decode(delivery.data, kind))

    def _keep(self, now_s: float, message: Message) -> None:
        self.heard.append((now_s, message))
        self._news.set()

    async def until(self, kind: type[Message], within_s: float) -> bool:
        """Wait for one of this kind. False: none was heard in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not any(isinstance(message, kind) for _, message in self.heard):
                    self._news.clear()
                    await self._news.wait()
                return True
        return False


@asynccontextmanager
async def observing(
    place: Place,
    subjects: Sequence[str],
    *kinds: type[Message],
    tell: Callable[[float, Message], None] | None = None,
) -> AsyncIterator[Observer | None]:
    """None: the place of the bus is not known. Raises: StartupError."""
    if not place.nats_url:
        yield None
        return
    try:
        bus = await connect_nats(place.nats_url, "pecsched-loadtest")
    except BusError as error:
        raise StartupError(f"{error} (--nats-url)") from error
    try:
        observer = Observer(*kinds, tell=tell)
        for subject in subjects:
            await bus.subscribe(subject, observer.hear)
        await bus.flush()
        yield observer
    finally:
        await bus.close()
