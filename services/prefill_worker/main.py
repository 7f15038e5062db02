"""One prefill worker as a process: real bus and store, the engine that the settings name, TCP data plane."""

from __future__ import annotations

import asyncio

from common.runtime.shell import JournalSink
from common.settings import PrefillWorkerSettings
from services.engine.collectives_door import open_group_links
from services.engine.data_plane import DataPlaneFactory
from services.engine.interface import PrefillEngine
from services.prefill_worker.service import PrefillWorker
from services.worker.process import WorkerMeans, run_worker, serve_worker


def main(settings: PrefillWorkerSettings) -> int:
    """Runs until a signal; returns the exit status."""
    return run_worker("prefill", settings, serve)


async def serve(settings: PrefillWorkerSettings, means: WorkerMeans) -> None:
    """Load the engine in a thread, then serve until stopped. Raises: StartupError."""
    engine = await asyncio.to_thread(load_engine, settings)
    groups = open_group_links(
        host=settings.data_host, secret=settings.data_secret, silence_s=settings.silence_s, join_s=settings.join_s
    )

    def make(data_plane: DataPlaneFactory, journal: JournalSink | None) -> PrefillWorker:
        return PrefillWorker(
            settings,
            means.bus,
            means.store,
            engine,
            data_plane,
            groups=groups,
            journal=journal,
            metrics=means.metrics,
        )

    await serve_worker(settings, means.stop, make)


def load_engine(settings: PrefillWorkerSettings) -> PrefillEngine:
    """Blocking, seconds. Raises: StartupError."""
    if settings.engine == "timed":
        from services.engine.timed_engines import make_timed_prefill_engine

        return make_timed_prefill_engine(settings)
    # Here and not above: a timed worker runs where torch is not installed.
    from services.engine.torch_prefill import make_prefill_engine

    return make_prefill_engine(settings)
