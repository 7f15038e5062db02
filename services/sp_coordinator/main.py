"""`pecsched sp-coordinator`: the coordinator on a real NATS and Redis."""

from __future__ import annotations

import asyncio
import secrets

from common.metrics import Metrics
from common.runtime.bus import Bus
from common.runtime.exporter import ScrapeAddress
from common.runtime.process import open_journal, run_role, serve_until
from common.runtime.store import Store
from common.settings import CoordinatorSettings
from services.sp_coordinator.service import SpCoordinator

ROLE = "sp-coordinator"


def main(settings: CoordinatorSettings) -> int:
    """Serve until a signal comes. Returns the exit status."""
    metrics = Metrics(ROLE)

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        incarnation = secrets.token_hex(8)
        # A journal belongs to one run of one core.
        with open_journal(settings.journal and f"{settings.journal}.{incarnation}") as journal:
            service = SpCoordinator(settings, bus, store, incarnation=incarnation, journal=journal, metrics=metrics)
            await serve_until(stop, service)

    scrape = ScrapeAddress(settings.metrics_host, settings.metrics_port)
    return run_role(ROLE, settings, start, metrics=metrics, scrape=scrape)
