"""`pecsched scheduler`: the scheduler on a real NATS and Redis."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AbstractContextManager

from common.metrics import Metrics
from common.runtime.bus import Bus
from common.runtime.exporter import ScrapeAddress
from common.runtime.process import open_journal, run_role, serve_until
from common.runtime.shell import JournalSink
from common.runtime.store import Store
from common.runtime.tracing import traced
from common.settings import SchedulerSettings
from services.scheduler.service import SchedulerService

ROLE = "scheduler"


def main(settings: SchedulerSettings) -> int:
    """Serve until a signal comes. Returns the exit status."""
    metrics = Metrics(ROLE)

    def journal_of(epoch: int) -> AbstractContextManager[JournalSink | None]:
        # One file per epoch: a journal belongs to one run of one core, and a replay needs its epoch.
        return open_journal(settings.journal and f"{settings.journal}.{epoch}")

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        owner = f"{settings.node}:{secrets.token_hex(8)}"
        async with traced(ROLE, settings.otlp_endpoint, metrics) as tracer:
            service = SchedulerService(
                settings, bus, store, owner=owner, journal_of=journal_of, metrics=metrics, tracer=tracer
            )
            await serve_until(stop, service)

    scrape = ScrapeAddress(settings.metrics_host, settings.metrics_port)
    return run_role(ROLE, settings, start, metrics=metrics, scrape=scrape, cpu_slice_ms=settings.cpu_slice_ms)
