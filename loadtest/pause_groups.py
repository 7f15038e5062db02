"""`python -m loadtest pause --ranks N`: how long a short waits for a long prefill that several workers share.

As `pause`, for a group: N prefill workers as they run in service (processes with one engine each, links over TCP, a
NATS server of their own), the real SP coordinator in this process, and this file in the scheduler's and the
router's place. At each pause a short goes to one of the workers, and with it the order to pause the group; it stands
when all ranks have said that they do, at the same step.

- *at the worker*: `GroupPaused.pause_latency_s`, the longest that a rank measured of itself;
- *from outside*: short sent → word heard that all ranks stand.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from common.messages.base import Message
from common.messages.cluster import CoordinatorHeartbeat, WorkerHeartbeat
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.requests import RequestSpec, TokensGenerated
from common.messages.sp import (
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    PauseGroup,
    ResumeGroup,
    SegmentPrefilled,
)
from common.runtime import subjects
from common.runtime.bus import Bus, Delivery
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.bus_nats import connect_nats
from common.runtime.store_memory import MemoryStore
from common.runtime.supervisor import Supervisor
from common.runtime.wire import WireError, decode, encode
from common.settings import CoordinatorSettings, PrefillWorkerSettings
from common.settings_loader import environment
from common.units import WorkerId
from loadtest import report
from loadtest.pause import (
    ROUTER,
    RUN_S_MEAN,
    SHORT_TOKENS,
    Ears,
    LongRun,
    OnPause,
    PauseOptions,
    measure_on,
    random_prompt,
    spec_of,
)
from loadtest.runner import MeasurementFailed
from services.children import Children, ChildSpec
from services.embedded import EmbeddedServer
from services.engine.collectives_memory import MemoryGroupHub
from services.engine.transport_memory import MemoryHub
from services.prefill_worker.main import load_engine
from services.prefill_worker.service import PrefillWorker
from services.sp_coordinator.service import SpCoordinator

START_S = 180.0
GRACE_S = 5.0
STANDING = "standing"
"""Cause of what the coordinator says again with its heartbeats."""

GroupWord = GroupFormed | GroupPaused | GroupResumed | GroupPrefillFinished | GroupFinished | GroupFailed
Served = SegmentPrefilled | PrefillFinished | PrefillFailed | KvReleased | TokensGenerated
Heard = GroupWord | Served | WorkerHeartbeat | CoordinatorHeartbeat


def run(options: PauseOptions) -> dict[str, Any]:
    """Raises: PecSchedError."""
    return asyncio.run(measure(options))


async def measure(options: PauseOptions) -> dict[str, Any]:
    """The same on a loop that runs already."""
    serving = _here if options.engine == "timed" else _in_processes
    with report.progress() as bars:
        async with Supervisor() as tasks, serving(options, bars, tasks) as buses:
            rig = GroupRig(buses[0], options)
            await rig.listen()
            coordinator = SpCoordinator(CoordinatorSettings(), buses[1], MemoryStore(), incarnation="measured")
            coordinating = tasks.spawn(coordinator.run(), name="coordinator")
            with bars.waiting(f"starting {options.ranks} workers"):
                await rig.complete()
            figures = await measure_on(rig, options, bars)
            coordinator.stop()
            await coordinating
    return figures


class GroupRig:
    """Scheduler and router of a group, as far as this needs them."""

    def __init__(self, bus: Bus, options: PauseOptions) -> None:
        self._bus = bus
        self._rng = random.Random(options.seed)
        self._prompt = random_prompt(self._rng, options.tokens)
        self._ranks = options.ranks
        self._ears = Ears()
        self._addresses: dict[WorkerId, str] = {}
        self._coordinated = False
        self._all_here = asyncio.Event()

    async def listen(self) -> None:
        for subject in (subjects.SCHEDULER, subjects.COORDINATOR, subjects.router(ROUTER)):
            await self._bus.subscribe(subject, self._hear)

    async def complete(self) -> None:
        """Until all workers and the coordinator have shown themselves. Raises: MeasurementFailed."""
        try:
            async with asyncio.timeout(START_S):
                await self._all_here.wait()
        except TimeoutError:
            here = f"{len(self._addresses)} of {self._ranks} workers"
            raise MeasurementFailed(f"only {here} had started after {START_S:g} s") from None

    async def prefill(self, name: str, *, pauses: int, on_pause: OnPause = lambda: None) -> LongRun:
        """Prefill the prompt once, with at most so many pauses. Raises: MeasurementFailed."""
        spec, measured = spec_of(name, self._prompt), LongRun()
        members = tuple(sorted(self._addresses))
        addresses = tuple(self._addresses[member] for member in members)
        await self._to_coordinator(FormGroup(spec=spec, members=members, addresses=addresses))
        await self._ears.hears(name, GroupFormed)
        while len(measured.at_worker_s) < pauses:
            await asyncio.sleep(self._rng.expovariate(1.0 / RUN_S_MEAN))
            if not await self._pause(spec, members, measured):
                break
            on_pause()
            await self._to_coordinator(ResumeGroup(request_id=spec.request_id, attempt=spec.attempt))
            await self._ears.hears(name, GroupResumed)
        _, ended = await self._ears.hears(name, GroupPrefillFinished)
        _, led = await self._ears.hears(name, SegmentPrefilled)
        _, token = await self._ears.hears(name, TokensGenerated)
        await self._ears.hears(name, GroupFinished)
        assert isinstance(ended, GroupPrefillFinished)
        assert isinstance(led, SegmentPrefilled)
        assert isinstance(token, TokensGenerated)
        measured.compute_s, measured.steps = ended.compute_s, led.steps
        measured.first_token = token.chunks[0].token_ids[0]
        return measured

    async def _pause(self, long: RequestSpec, members: tuple[WorkerId, ...], measured: LongRun) -> bool:
        """A short arrives, the group stands, the short is served. False: the prefill had ended before."""
        tokens = self._rng.randint(*SHORT_TOKENS)
        short = spec_of(f"{long.request_id}-short-{len(measured.at_worker_s)}", random_prompt(self._rng, tokens))
        worker, nobody = self._rng.choice(members), WorkerId("nobody")
        order = RunPrefill(worker_id=worker, spec=short, decode_worker_id=nobody, decode_address="nowhere:1")
        sent_s = asyncio.get_running_loop().time()
        await self._bus.publish(subjects.worker(worker), encode(order))
        await self._to_coordinator(PauseGroup(request_id=long.request_id, attempt=long.attempt))
        stood_s, stood = await self._ears.hears(long.request_id, GroupPaused, GroupPrefillFinished)
        _, prefilled = await self._ears.hears(short.request_id, PrefillFinished)
        await self._ears.hears(short.request_id, KvReleased)
        assert isinstance(prefilled, PrefillFinished)
        if not isinstance(stood, GroupPaused):
            self._ears.keep(long.request_id, stood)
            return False
        measured.at_worker_s.append(stood.pause_latency_s)
        measured.outside_s.append(stood_s - sent_s)
        measured.waited_s.append(prefilled.waited_s)
        return True

    async def _to_coordinator(self, order: FormGroup | PauseGroup | ResumeGroup) -> None:
        await self._bus.publish(subjects.COORDINATOR, encode(order))

    async def _hear(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.data, Heard)
        except WireError:
            return  # of no interest here
        match message:
            case WorkerHeartbeat(profile=profile):
                self._addresses[profile.worker_id] = profile.group_address
                self._look_round()
            case CoordinatorHeartbeat():
                self._coordinated = True
                self._look_round()
            case TokensGenerated(chunks=chunks):
                self._ears.keep(chunks[0].request_id, message)
            case SegmentPrefilled(worker_id=worker_id) if worker_id != min(self._addresses):
                pass  # rank 0 speaks for all
            case GroupFailed() | PrefillFailed():
                self._ears.fail(f"{message.request_id}: {message.reason}")
            case _ if _is_said_again(message):
                pass
            case _:
                self._ears.keep(message.request_id, message)

    def _look_round(self) -> None:
        if self._coordinated and len(self._addresses) == self._ranks:
            self._all_here.set()


def _is_said_again(message: Message) -> bool:
    return message.cause == STANDING


@asynccontextmanager
async def _here(options: PauseOptions, bars: report.Bars, tasks: Supervisor) -> AsyncIterator[tuple[Bus, Bus]]:
    """Timed workers in this process. Gives buses for the rig and for the coordinator."""
    broker, planes, groups = MemoryBroker(), MemoryHub(), MemoryGroupHub()
    workers = []
    for settings in _settings_of(options):
        bus, store = MemoryBus(broker, settings.worker_id), MemoryStore()
        engine = load_engine(settings)
        workers.append(PrefillWorker(settings, bus, store, engine, planes.plane(), groups=groups.links()))
    serving = [tasks.spawn(worker.run(), name=str(worker.worker_id)) for worker in workers]
    yield MemoryBus(broker, "measuring"), MemoryBus(broker, "coordinator")
    for worker, task in zip(workers, serving, strict=True):
        worker.stop()
        await task


@asynccontextmanager
async def _in_processes(options: PauseOptions, bars: report.Bars, tasks: Supervisor) -> AsyncIterator[tuple[Bus, Bus]]:
    """Workers as in service, with servers of their own. Gives buses for the rig and for the coordinator."""
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(EmbeddedServer.nats())
        redis = await stack.enter_async_context(EmbeddedServer.redis())
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pecsched-pause-")))
        children = await stack.enter_async_context(Children(bars.say, restarts_max=0))
        for settings in _settings_of(options, nats.url, redis.url):
            own = {name: value for name, value in os.environ.items() if not name.startswith("PECSCHED_")}
            command = (sys.executable, "-m", "services.cli", "prefill-worker")
            env = own | environment(settings, PrefillWorkerSettings)
            await children.start(ChildSpec(settings.worker_id, command, logs / f"{settings.worker_id}.log", env))
        buses = [await connect_nats(nats.url, name) for name in ("measuring", "coordinator")]
        for bus in buses:
            stack.push_async_callback(bus.close)
        yield buses[0], buses[1]
        await children.stop(children.pids, GRACE_S)


def _settings_of(options: PauseOptions, nats_url: str = "", redis_url: str = "") -> list[PrefillWorkerSettings]:
    return [
        PrefillWorkerSettings(
            worker_id=f"measured-{rank}",
            model=options.model,
            cache_dir=options.cache_dir,
            engine=options.engine,
            dtype=options.dtype,
            threads=options.threads,
            nats_url=nats_url,
            redis_url=redis_url,
        )
        for rank in range(options.ranks)
    ]
