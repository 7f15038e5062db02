"""A role's process: one clear line when it cannot start, a clean end on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.errors import StartupError
from common.metrics import NATS_CONNECTED, NATS_ERRORS, REDIS_ERRORS, ROLE_INFO, Metrics
from common.runtime.bus import Bus, BusError
from common.runtime.exporter import ScrapeAddress
from common.runtime.process import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_STARTED,
    EXIT_OK,
    open_journal,
    run_role,
    serve_until,
)
from common.runtime.store import Store
from common.settings import CommonSettings
from services.embedded import EmbeddedServer, free_port
from tests.exposition import Scrape

WAIT_S = 10.0


@pytest.fixture
def servers() -> Iterator[CommonSettings]:
    """NATS and Redis that run while the test has no loop of its own."""
    with asyncio.Runner() as runner:
        nats, redis = EmbeddedServer.nats(), EmbeddedServer.redis()
        try:
            runner.run(nats.start())
            runner.run(redis.start())
            yield CommonSettings(nats_url=nats.url, redis_url=redis.url)
        finally:
            runner.run(nats.close())
            runner.run(redis.close())


async def nothing(bus: Bus, store: Store, stop: asyncio.Event) -> None:
    return


def test_a_role_has_a_bus_and_a_store(servers: CommonSettings) -> None:
    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        await store.ping()
        await bus.flush()
        assert not stop.is_set()

    assert run_role("test", servers, start) == EXIT_OK


def test_a_role_is_scraped_while_it_runs_and_says_how_it_is_connected(servers: CommonSettings) -> None:
    at = ScrapeAddress("127.0.0.1", free_port())
    found: list[Scrape] = []

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        with pytest.raises(BusError):
            await bus.publish("subject", b"x" * (bus.max_payload + 1))
        await store.ping()
        async with httpx.AsyncClient(trust_env=False) as http:
            found.append(Scrape((await http.get(f"http://{at.host}:{at.port}/metrics")).text))

    metrics = Metrics("scheduler", "s-1")
    assert run_role("scheduler", servers, start, metrics=metrics, scrape=at) == EXIT_OK
    (scrape,) = found
    assert scrape.value(NATS_CONNECTED) == 1
    assert scrape.value(REDIS_ERRORS) == scrape.value(NATS_ERRORS) == 0, "what is never sent is no error of NATS"
    assert scrape.value(ROLE_INFO, role="scheduler", name="s-1") == 1


def test_a_metrics_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        at = ScrapeAddress("127.0.0.1", other.getsockname()[1])
        assert run_role("scheduler", CommonSettings(), nothing, scrape=at) == EXIT_NOT_STARTED
    expected = f"pecsched scheduler: cannot listen on {at.host}:{at.port} for metrics: Address already in use; "
    assert capsys.readouterr().err == expected + "pass another --metrics-host or --metrics-port (0: none)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_role_drain(servers: CommonSettings, number: signal.Signals) -> None:
    drained = False

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        nonlocal drained
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), WAIT_S)
        await store.ping()
        drained = True

    assert run_role("test", servers, start) == EXIT_OK
    assert drained


def test_a_second_signal_ends_it_at_once(servers: CommonSettings) -> None:
    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.wait(), WAIT_S)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(WAIT_S)

    assert run_role("test", servers, start) == EXIT_INTERRUPTED


def test_an_error_ends_the_role_and_is_logged(servers: CommonSettings, capsys: pytest.CaptureFixture[str]) -> None:
    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        raise ValueError("broken")

    assert run_role("test", servers, start) == EXIT_FAILED
    assert "ValueError: broken" in capsys.readouterr().err


def test_without_redis_there_is_one_line_and_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    settings = CommonSettings(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    assert run_role("scheduler", settings, nothing, patience_s=0.1) == EXIT_NOT_STARTED
    expected = f"pecsched scheduler: cannot reach Redis at {settings.redis_url}: connection refused; "
    assert capsys.readouterr().err == expected + "start it or pass --redis-url\n"


def test_without_nats_there_is_one_line_and_the_flag(
    servers: CommonSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CommonSettings(nats_url=f"nats://127.0.0.1:{free_port()}", redis_url=servers.redis_url)
    assert run_role("router", settings, nothing, patience_s=0.3) == EXIT_NOT_STARTED
    expected = f"pecsched router: cannot reach NATS at {settings.nats_url}: connection refused; "
    assert capsys.readouterr().err == expected + "start it or pass --nats-url\n"


class Draining:
    """A service that says when it was stopped, and fails there if it shall."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.drained = False
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        await asyncio.wait_for(self._stopping.wait(), WAIT_S)
        if self.fails:
            raise ValueError("broken")
        self.drained = True


async def test_a_service_drains_when_told_to_stop() -> None:
    stop, service = asyncio.Event(), Draining(fails=False)
    stop.set()
    await serve_until(stop, service)
    assert service.drained


async def test_what_ends_a_service_is_raised() -> None:
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(ValueError, match="broken"):
        await serve_until(stop, Draining(fails=True))


def test_a_journal_is_new_or_the_start_fails_with_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with open_journal("") as journal:
        assert journal is None
    with open_journal(str(path)) as journal:
        assert journal is not None
    with pytest.raises(StartupError, match=r"journal: File exists; pass another --journal"):
        open_journal(str(path))
