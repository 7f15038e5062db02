"""One decode worker as a process: real bus and store, the engine that the settings name, TCP data plane."""

from __future__ import annotations

import asyncio

from common.errors import StartupError
from common.runtime.shell import JournalSink
from common.settings import DecodeWorkerSettings
from services.decode_worker.service import DecodeWorker
from services.engine.data_plane import DataPlaneFactory
from services.engine.interface import DecodeEngine, EngineError
from services.worker.process import WorkerMeans, run_worker, serve_worker


def main(settings: DecodeWorkerSettings) -> int:
    """Runs until a signal; returns the exit status."""
    return run_worker("decode", settings, serve)


async def serve(settings: DecodeWorkerSettings, means: WorkerMeans) -> None:
    """Load the engine in a thread, then serve until stopped. Raises: StartupError."""
    engine = await asyncio.to_thread(load_engine, settings)

    def make(data_plane: DataPlaneFactory, journal: JournalSink | None) -> DecodeWorker:
        return DecodeWorker(
            settings, means.bus, means.store, engine, data_plane, journal=journal, metrics=means.metrics
        )

    await serve_worker(settings, means.stop, make)


def load_engine(settings: DecodeWorkerSettings) -> DecodeEngine:
    """Blocking, seconds. Raises: StartupError."""
    if settings.engine == "timed":
        from services.engine.timed_engines import make_timed_decode_engine

        return make_timed_decode_engine(settings)
    # Here and not above: a timed worker runs where torch is not installed.
    from services.engine.torch_decode import make_decode_engine

    try:
        return make_decode_engine(settings)
    except EngineError as error:
        raise StartupError(f"the engine cannot start: {error}") from error
