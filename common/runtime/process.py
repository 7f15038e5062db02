"""What every role's process does around its service: logs, signals, connections, one exit status.

The first SIGINT or SIGTERM sets the stop event, and the service drains; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Protocol

import uvloop

from common import logs
from common.errors import StartupError
from common.metrics import NATS_CONNECTED, NATS_DISCONNECTS, NATS_ERRORS, REDIS_ERRORS, Metrics
from common.runtime.bus import Bus, BusError
from common.runtime.bus_nats import NatsBus, connect_nats
from common.runtime.exporter import ScrapeAddress, exporting
from common.runtime.journal import JournalWriter
from common.runtime.lease import LeaseLost
from common.runtime.store import Store, StoreError
from common.runtime.store_redis import RedisStore, connect_redis
from common.runtime.supervisor import Supervisor
from common.runtime.turns import long_turns
from common.settings import CommonSettings

Start = Callable[[Bus, Store, asyncio.Event], Awaitable[None]]

NOWHERE = ScrapeAddress("", 0)

EXIT_OK = 0
EXIT_FAILED = 1
"""It ran, and an error ended it."""
EXIT_NOT_STARTED = 2
"""It never ran; stderr has one line that says why."""
EXIT_INTERRUPTED = 130
"""A second signal ended it before it had drained."""

log = logs.get_logger(__name__)


class BusRefused(Exception):
    """NATS ended the connection for good."""


def run_role(
    name: str,
    settings: CommonSettings,
    start: Start,
    *,
    metrics: Metrics | None = None,
    scrape: ScrapeAddress = NOWHERE,
    patience_s: float = 5.0,
    cpu_slice_ms: int = 0,
) -> int:
    """Connect bus and store (trying for `patience_s`), run `start(bus, store, stop)` to its end, close both.

    `start` returns when `stop` was set and it has drained. `metrics`: of this process, answered to who scrapes at
    `scrape` from the first moment on. `cpu_slice_ms`: of its turns (`turns.py`). Returns the exit
    status; raises nothing.
    """
    logs.setup(name, level=settings.log_level, as_json=settings.log_json)
    measured = Metrics(name) if metrics is None else metrics
    try:
        with turns(cpu_slice_ms), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(name, settings, start, measured, scrape, patience_s))
    except StartupError as error:
        sys.stderr.write(f"pecsched {name}: {error}\n")
        return EXIT_NOT_STARTED
    except LeaseLost as error:
        log.error("ended", reason=str(error))
        return EXIT_FAILED
    except BusRefused:
        return EXIT_FAILED  # logged where it happened
    except (KeyboardInterrupt, asyncio.CancelledError):
        return EXIT_INTERRUPTED
    except Exception:
        log.exception("ended by an error")
        return EXIT_FAILED
    return EXIT_OK


@contextmanager
def turns(slice_ms: int) -> Iterator[None]:
    """`long_turns` at an operator's wish. Raises: StartupError, one line with the flag to leave."""
    with ExitStack() as stack:
        try:
            stack.enter_context(long_turns(slice_ms))
        except OSError as error:
            reason = error.strerror or error
            raise StartupError(f"cannot take turns of {slice_ms} ms: {reason}; leave --cpu-slice-ms at 0") from error
        yield


async def _serve(
    name: str, settings: CommonSettings, start: Start, metrics: Metrics, scrape: ScrapeAddress, patience_s: float
) -> None:
    stop = asyncio.Event()
    refused = asyncio.Event()

    def on_closed() -> None:
        refused.set()
        stop.set()

    with_signals(stop)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(exporting(metrics, scrape))
        connecting = connected(name, settings, patience_s=patience_s, on_closed=on_closed)
        bus, store = await stack.enter_async_context(connecting)
        _measure(metrics, bus, store)
        log.info("started")
        _calm_the_collector()
        await start(bus, store, stop)
        log.info("stopped")
    if refused.is_set():
        raise BusRefused


def _measure(metrics: Metrics, bus: NatsBus, store: RedisStore) -> None:
    metrics.read(NATS_CONNECTED, lambda: {(): bus.is_connected})
    metrics.read(NATS_DISCONNECTS, lambda: {(): bus.disconnects})
    metrics.read(NATS_ERRORS, lambda: {(): bus.errors})
    metrics.read(REDIS_ERRORS, lambda: {(): store.errors})


def _calm_the_collector() -> None:
    """Modules and the model are there to stay: the collector need not walk them again, and a request makes
    more objects than the default thresholds of CPython 3.11 expect. Each walk is a pause on somebody's way."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Service(Protocol):
    """What a role runs."""

    async def run(self) -> None:
        """Serve until stopped or cancelled."""
        ...

    def stop(self) -> None:
        """Let `run` drain and return."""
        ...


async def serve_until(stop: asyncio.Event, service: Service) -> None:
    """Run a service to its end; `stop` lets it drain. Raises whatever ends the service."""

    async def pass_on() -> None:
        await stop.wait()
        service.stop()

    async with Supervisor() as tasks:
        tasks.spawn(pass_on(), name="stop signal")
        await service.run()


def open_journal(path: str) -> AbstractContextManager[JournalWriter | None]:
    """A new journal for the length of the block; none for "". Raises: StartupError."""
    if not path:
        return nullcontext()
    try:
        return JournalWriter(Path(path))
    except OSError as error:
        raise StartupError(f"cannot write the journal {path}: {error.strerror}; pass another --journal") from error


def with_signals(stop: asyncio.Event) -> None:
    """Let the first SIGINT or SIGTERM set `stop`, and a second one cancel the current task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)


@asynccontextmanager
async def connected(
    name: str, settings: CommonSettings, *, patience_s: float = 5.0, on_closed: Callable[[], None] | None = None
) -> AsyncIterator[tuple[NatsBus, RedisStore]]:
    """Bus and store for the length of the block. Raises: StartupError, one line with the flag to set."""
    try:
        store = await connect_redis(settings.redis_url, patience_s=patience_s)
    except StoreError as error:
        raise StartupError(f"{error}; start it or pass --redis-url") from error
    try:
        try:
            bus = await connect_nats(settings.nats_url, name, patience_s=patience_s, on_closed=on_closed)
        except BusError as error:
            raise StartupError(f"{error}; start it or pass --nats-url") from error
        try:
            yield bus, store
        finally:
            await bus.close()
    finally:
        await store.close()
