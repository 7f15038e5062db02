"""`pecsched sp-coordinator`: the coordinator on a real NATS and Redis."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import ExitStack
from pathlib import Path

from common.errors import StartupError
from common.runtime.bus import Bus
from common.runtime.journal import JournalWriter
from common.runtime.process import run_role
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.settings import CoordinatorSettings
from services.sp_coordinator.service import SpCoordinator

ROLE = "sp-coordinator"


def main(settings: CoordinatorSettings) -> int:
    """Serve until a signal comes. Returns the exit status."""

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        incarnation = secrets.token_hex(8)
        with ExitStack() as open_files:
            journal = None
            if settings.journal:
                # A journal belongs to one run of one core.
                journal = open_files.enter_context(_journal(f"{settings.journal}.{incarnation}"))
            coordinator = SpCoordinator(settings, bus, store, incarnation=incarnation, journal=journal)
            async with Supervisor() as tasks:
                tasks.spawn(_stop_when(stop, coordinator), name="stop signal")
                await coordinator.run()

    return run_role(ROLE, settings, start)


def _journal(path: str) -> JournalWriter:
    try:
        return JournalWriter(Path(path))
    except OSError as error:
        raise StartupError(f"cannot write the journal {path}: {error.strerror}; pass another --journal") from error


async def _stop_when(stop: asyncio.Event, coordinator: SpCoordinator) -> None:
    await stop.wait()
    coordinator.stop()
