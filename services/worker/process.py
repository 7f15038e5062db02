"""A worker as a process: its name, its data plane over TCP, its journal. The engine is the role's own."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from common.messages.cluster import WorkerRole
from common.runtime.bus import Bus
from common.runtime.process import Service, open_journal, run_role, serve_until
from common.runtime.shell import JournalSink
from common.runtime.store import Store
from common.settings import WorkerSettings
from services.engine.data_plane import DataPlaneFactory
from services.engine.transport import open_data_plane

SettingsT = TypeVar("SettingsT", bound=WorkerSettings)


def run_worker(
    role: WorkerRole, settings: SettingsT, serve: Callable[[SettingsT, Bus, Store, asyncio.Event], Awaitable[None]]
) -> int:
    """Runs until a signal; returns the exit status. A worker without a name is named after host and process."""
    if not settings.worker_id:
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())
        settings = msgspec.structs.replace(settings, worker_id=f"{role}-{host}-{os.getpid()}")

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        await serve(settings, bus, store, stop)

    return run_role(f"{role}-worker", settings, start)


async def serve_worker(
    settings: WorkerSettings, stop: asyncio.Event, make: Callable[[DataPlaneFactory, JournalSink | None], Service]
) -> None:
    """Run the worker that `make` makes of a data plane and a journal, until `stop`. Raises: StartupError."""
    plane = open_data_plane(
        host=settings.data_host, port=settings.data_port, secret=settings.data_secret, transfer_s=settings.transfer_s
    )
    with open_journal(settings.journal) as journal:
        await serve_until(stop, make(plane, journal))
