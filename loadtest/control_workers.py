"""`python -m loadtest.control_workers`: the timed workers of `loadtest control`, all in one process.

Each is the worker that serves, core, shell and messages; only its engine takes no time. They share one
connection to NATS and one to Redis, and KV moves between them in memory: this benchmark asks what routers, scheduler
and bus can do, and sixty-four processes would take the two cores from them.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

from msgspec import Meta

from common.messages.cluster import StepCost
from common.runtime.bus import Bus
from common.runtime.process import run_role
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.settings import CommonSettings, Count, CpuSlice, DecodeWorkerSettings, PrefillWorkerSettings
from common.settings_loader import load
from services.decode_worker.service import DecodeWorker
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.timed_language import TimedShape
from services.engine.timed_prefill import TimedPrefillEngine
from services.engine.transport_memory import MemoryHub
from services.prefill_worker.service import PrefillWorker

NO_TIME = StepCost(pass_s=0.0, token_s=0.0, pair_s=0.0)
LAYERS = 1
WORKERS_PER_NODE = 8
KV_CAPACITY_TOKENS = 262_144


class ControlWorkersSettings(CommonSettings, frozen=True, kw_only=True):
    prefill: Annotated[Count, Meta(description="prefill workers")] = 56
    decode: Annotated[Count, Meta(description="decode workers")] = 8
    cpu_slice_ms: CpuSlice = 0
    rows: Annotated[Count, Meta(description="sequences in the batch of each decode worker")] = 128


def main(argv: list[str]) -> int:
    """Runs until a signal; returns the exit status."""
    settings = load(ControlWorkersSettings, argv, {}, prog="loadtest.control_workers")

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        await serve(settings, bus, store, stop)

    return run_role("timed-workers", settings, start, cpu_slice_ms=settings.cpu_slice_ms)


async def serve(settings: ControlWorkersSettings, bus: Bus, store: Store, stop: asyncio.Event) -> None:
    """All of them until `stop`. Raises whatever ends one of them."""
    workers = make_workers(settings, bus, store)
    async with Supervisor() as tasks:
        running = []
        for worker in workers:
            running.append(tasks.spawn(worker.run(), name=str(worker.worker_id)))
            # Heartbeats spread over their interval, as do those of processes that started each in its own time.
            await asyncio.sleep(settings.heartbeat_s / len(workers))
        await stop.wait()
        for worker in workers:
            worker.stop()
        await asyncio.gather(*running)


def make_workers(settings: ControlWorkersSettings, bus: Bus, store: Store) -> list[PrefillWorker | DecodeWorker]:
    """Of one made-up model, without limits that a benchmark of their control would meet."""
    shape = TimedShape(step_cost=NO_TIME, layers=LAYERS, kv_capacity_tokens=KV_CAPACITY_TOKENS, rows_max=settings.rows)
    hub, workers = MemoryHub(), list[PrefillWorker | DecodeWorker]()
    common: dict[str, Any] = {"kv_capacity_tokens": KV_CAPACITY_TOKENS, "engine": "timed"}
    for i in range(settings.prefill):
        prefill = PrefillWorkerSettings(**common, worker_id=f"prefill-{i}", node=f"node-{i // WORKERS_PER_NODE}")
        workers.append(PrefillWorker(prefill, bus, store, TimedPrefillEngine(shape, tally=False), hub.plane()))
    for i in range(settings.decode):
        decode = DecodeWorkerSettings(**common, worker_id=f"decode-{i}", node=f"node-{i}", rows_max=settings.rows)
        workers.append(DecodeWorker(decode, bus, store, TimedDecodeEngine(shape), hub.plane()))
    return workers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
