"""A worker as a process: its name, its data plane over TCP, its journal. The engine is the role's own."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from common.errors import StartupError
from common.messages.cluster import WorkerRole
from common.metrics import Metrics
from common.runtime.bus import Bus
from common.runtime.exporter import ScrapeAddress
from common.runtime.process import Service, open_journal, run_role, serve_until
from common.runtime.shell import JournalSink
from common.runtime.store import Store
from common.settings import WorkerSettings
from services.engine.data_plane import DataPlaneFactory
from services.engine.transport import open_data_plane

AUTO = "auto"
NATS_PORT = 4222


@dataclass(frozen=True, slots=True)
class WorkerMeans:
    """What the process has for its worker."""

    bus: Bus
    store: Store
    metrics: Metrics
    stop: asyncio.Event


SettingsT = TypeVar("SettingsT", bound=WorkerSettings)


def run_worker(
    role: WorkerRole, settings: SettingsT, serve: Callable[[SettingsT, WorkerMeans], Awaitable[None]]
) -> int:
    """Runs until a signal; returns the exit status. A worker without a name is named after host and process, and by
    chance: of containers on one network both may be the same."""
    if not settings.worker_id:
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())
        settings = msgspec.structs.replace(settings, worker_id=f"{role}-{host}-{os.getpid()}-{secrets.token_hex(2)}")

    name = f"{role}-worker"
    metrics = Metrics(name, settings.worker_id)

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        host = await asyncio.to_thread(data_host_of, settings)
        await serve(msgspec.structs.replace(settings, data_host=host), WorkerMeans(bus, store, metrics, stop))

    scrape = ScrapeAddress(settings.metrics_host, settings.metrics_port)
    return run_role(name, settings, start, metrics=metrics, scrape=scrape)


def data_host_of(settings: WorkerSettings) -> str:
    """Where peers reach this worker: as set, or this machine's address on the way to NATS, which all of them reach too.
    Blocking (names are looked up). Raises: StartupError."""
    if settings.data_host != AUTO:
        return settings.data_host
    server = urlsplit(settings.nats_url.split(",")[0])
    try:
        infos = socket.getaddrinfo(server.hostname, server.port or NATS_PORT, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = infos[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of datagrams: chooses the way, sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise StartupError(
            f"--data-host {AUTO}: no way from here to NATS: {error}; pass this worker's address"
        ) from error


async def serve_worker(
    settings: WorkerSettings, stop: asyncio.Event, make: Callable[[DataPlaneFactory, JournalSink | None], Service]
) -> None:
    """Run the worker that `make` makes of a data plane and a journal, until `stop`. Raises: StartupError."""
    plane = open_data_plane(
        host=settings.data_host, port=settings.data_port, secret=settings.data_secret, transfer_s=settings.transfer_s
    )
    with open_journal(settings.journal) as journal:
        await serve_until(stop, make(plane, journal))
