"""One decode worker as a process: real bus and store, the engine that the settings name, TCP data plane."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path

import msgspec

from common.errors import StartupError
from common.runtime.bus import Bus
from common.runtime.journal import JournalWriter
from common.runtime.process import run_role
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.settings import DecodeWorkerSettings
from services.decode_worker.service import DecodeWorker
from services.engine.interface import DecodeEngine, EngineError
from services.engine.transport import open_data_plane


def main(settings: DecodeWorkerSettings) -> int:
    """Runs until a signal; returns the exit status."""
    if not settings.worker_id:
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())
        settings = msgspec.structs.replace(settings, worker_id=f"decode-{host}-{os.getpid()}")

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        await serve(settings, bus, store, stop)

    return run_role("decode-worker", settings, start)


async def serve(settings: DecodeWorkerSettings, bus: Bus, store: Store, stop: asyncio.Event) -> None:
    """Load the engine in a thread, then serve until `stop`. Raises: StartupError."""
    engine = await asyncio.to_thread(load_engine, settings)
    plane = open_data_plane(
        host=settings.data_host, port=settings.data_port, secret=settings.data_secret, transfer_s=settings.transfer_s
    )
    with ExitStack() as files:
        journal = files.enter_context(_journal(settings.journal)) if settings.journal else None
        worker = DecodeWorker(settings, bus, store, engine, plane, journal=journal)
        async with Supervisor() as tasks:
            serving = tasks.spawn(worker.run(), name="decode worker")
            stopped = tasks.spawn(stop.wait(), name="stop signal")
            await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
            worker.stop()
            await serving


def load_engine(settings: DecodeWorkerSettings) -> DecodeEngine:
    """Blocking, seconds. Raises: StartupError."""
    if settings.engine == "timed":
        from services.engine.timed import make_timed_decode_engine

        return make_timed_decode_engine(settings)
    # Here and not above: a timed worker runs where torch is not installed.
    from services.engine.torch_decode import make_decode_engine

    try:
        return make_decode_engine(settings)
    except EngineError as error:
        raise StartupError(f"the engine cannot start: {error}") from error


def _journal(path: str) -> JournalWriter:
    try:
        return JournalWriter(Path(path))
    except OSError as error:
        raise StartupError(f"cannot write the journal {path}: {error.strerror}; pass another --journal") from error
