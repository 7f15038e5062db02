"""`pecsched scheduler`: the scheduler on a real NATS and Redis."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AbstractContextManager
from pathlib import Path

from common.errors import StartupError
from common.runtime.bus import Bus
from common.runtime.journal import JournalWriter
from common.runtime.process import run_role
from common.runtime.shell import JournalSink
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.settings import SchedulerSettings
from services.scheduler.service import SchedulerService, no_journal

ROLE = "scheduler"


def main(settings: SchedulerSettings) -> int:
    """Serve until a signal comes. Returns the exit status."""

    def journal_of(epoch: int) -> AbstractContextManager[JournalSink | None]:
        # One file per epoch: a journal belongs to one run of one core, and a replay needs its epoch.
        return _journal(f"{settings.journal}.{epoch}") if settings.journal else no_journal(epoch)

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        owner = f"{settings.node}:{secrets.token_hex(8)}"
        scheduler = SchedulerService(settings, bus, store, owner=owner, journal_of=journal_of)
        async with Supervisor() as tasks:
            tasks.spawn(_stop_when(stop, scheduler), name="stop signal")
            await scheduler.run()

    return run_role(ROLE, settings, start)


def _journal(path: str) -> JournalWriter:
    try:
        return JournalWriter(Path(path))
    except OSError as error:
        raise StartupError(f"cannot write the journal {path}: {error.strerror}; pass another --journal") from error


async def _stop_when(stop: asyncio.Event, scheduler: SchedulerService) -> None:
    await stop.wait()
    scheduler.stop()
