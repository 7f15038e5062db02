"""A prefill worker on in-memory ports, a decode engine that its KV goes to, and ears for what it says."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from common.messages.base import Message
from common.messages.cluster import StepCost, WorkerHeartbeat, WorkerLeft
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished, RunPrefill
from common.messages.requests import Prompt, RequestSpec, TokensGenerated
from common.messages.sp import (
    LoadSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentPart,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.runtime import subjects
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.wire import decode, encode
from common.settings import PrefillWorkerSettings
from services.engine.collectives_memory import MemoryGroupHub
from services.engine.data_plane import KvArrival, KvHeader
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.timed_language import TimedShape
from services.engine.timed_prefill import TimedPrefillEngine
from services.engine.transport_memory import MemoryHub
from services.prefill_worker.service import PrefillWorker

SHAPE = TimedShape(
    layers=4,
    vocab=1_000,
    kv_capacity_tokens=4_000,
    step_cost=StepCost(pass_s=0.010, token_s=1e-4, pair_s=1e-8),
)
WORKER = "p0"
DRAIN_S = 2.0

FromWorker = (
    WorkerHeartbeat
    | WorkerLeft
    | PrefillFinished
    | PrefillFailed
    | KvReleased
    | SegmentLoaded
    | SegmentRunning
    | SegmentPaused
    | SegmentPrefilled
    | SegmentFinished
    | SegmentFailed
    | SegmentDropped
)


def prompt_of(request_id: str, tokens: int) -> list[int]:
    return [(sum(request_id.encode()) * 31 + 7 * number) % SHAPE.vocab for number in range(tokens)]


def prompt_bytes(request_id: str, tokens: int) -> bytes:
    return array("i", prompt_of(request_id, tokens)).tobytes()


class DecodeSide:
    """Receives KV into a decode engine and activates what is verified."""

    def __init__(self, shape: TimedShape) -> None:
        self.engine = TimedDecodeEngine(shape)
        self.arrivals: dict[str, KvArrival] = {}
        self.broken_streams: list[str] = []
        self.refuses = False

    async def accept(self, header: KvHeader) -> str | None:
        return "full" if self.refuses else None

    def buffers(self, header: KvHeader, layer: int, start: int, tokens: int) -> tuple[memoryview, ...] | None:
        return self.engine.layer_buffers(header.request_id, layer, start, tokens)

    def arrived(self, arrival: KvArrival) -> None:
        self.arrivals[arrival.header.request_id] = arrival
        self.engine.activate(arrival.header.request_id, arrival.trailer.first_token)

    def broken(self, header: KvHeader, reason: str) -> None:
        self.broken_streams.append(header.request_id)


class PrefillWorld:
    def __init__(self, shape: TimedShape) -> None:
        self.broker = MemoryBroker()
        self.store = MemoryStore()
        self.hub = MemoryHub(seed=3)
        self.bus = MemoryBus(self.broker, "world")
        self.engine = TimedPrefillEngine(shape)
        self.settings = PrefillWorkerSettings(worker_id=WORKER, engine="timed", drain_s=DRAIN_S, lease_s=3.0)
        self.worker = PrefillWorker(
            self.settings,
            MemoryBus(self.broker, WORKER),
            self.store,
            self.engine,
            self.hub.plane(transfer_s=1.0),
            groups=MemoryGroupHub().links(join_s=50.0),
        )
        self.decode = DecodeSide(shape)
        self.decode_plane = self.hub.plane(transfer_s=1.0)(self.decode)
        self.said: list[Message] = []
        """To scheduler and coordinator, without heartbeats."""
        self.beats: list[WorkerHeartbeat] = []
        self.tokens: dict[str, list[int]] = {}
        self._changed = asyncio.Event()

    async def listen(self) -> None:
        async def hear(delivery):
            message = decode(delivery.data, FromWorker)
            if isinstance(message, WorkerHeartbeat):
                self.beats.append(message)
            else:
                self.said.append(message)
            self._changed.set()

        async def router(delivery):
            for chunk in decode(delivery.data, TokensGenerated).chunks:
                known = self.tokens.setdefault(chunk.request_id, [])
                assert chunk.index == len(known)
                known.extend(chunk.token_ids)
            self._changed.set()

        await self.bus.subscribe(subjects.SCHEDULER, hear)
        await self.bus.subscribe(subjects.COORDINATOR, hear)
        await self.bus.subscribe(subjects.router("r0"), router)

    async def order(self, message: Message) -> None:
        await self.bus.publish(subjects.worker(WORKER), encode(message))

    async def until(self, holds: Callable[[], bool], within_s: float = 60.0) -> None:
        """Wait for something that is announced by a message."""
        async with asyncio.timeout(within_s):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def until_it_computes(self, within_s: float = 60.0) -> None:
        async with asyncio.timeout(within_s):
            while self.worker.core.books.running is None:  # noqa: ASYNC110 - it says nothing of it to anybody
                await asyncio.sleep(0.001)

    def of(self, *kinds: type[Message]) -> list[Message]:
        return [message for message in self.said if isinstance(message, kinds)]

    def spec(
        self, request_id: str, tokens: int, *, max_tokens: int = 8, attempt: int = 0, key: str = ""
    ) -> RequestSpec:
        prompt = (
            Prompt(tokens=tokens, key=key) if key else Prompt(tokens=tokens, inline=prompt_bytes(request_id, tokens))
        )
        return RequestSpec(request_id=request_id, router_id="r0", prompt=prompt, max_tokens=max_tokens)

    async def short(self, spec: RequestSpec, *, expected: bool = True) -> None:
        if expected and spec.max_tokens > 1:
            self.decode.engine.reserve(spec)
        await self.order(
            RunPrefill(
                worker_id=WORKER, spec=spec, decode_worker_id="d0", decode_address=self.decode_plane.address, epoch=1
            )
        )

    async def long(self, spec: RequestSpec) -> None:
        parts = (SegmentPart(start=0, tokens=spec.prompt.tokens),)
        await self.order(LoadSegment(worker_id=WORKER, spec=spec, rank=0, members=(WORKER,), parts=parts, epoch=1))

    def require_empty(self) -> None:
        assert self.worker.core.idle
        self.worker.core.check()
        assert self.engine.kv_used_tokens == 0


@asynccontextmanager
async def prefill_world(shape: TimedShape = SHAPE, *, stop: bool = True) -> AsyncIterator[PrefillWorld]:
    """A worker that serves inside the block; afterwards it is stopped and must leave nothing behind."""
    world = PrefillWorld(shape)
    await world.listen()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(world.worker.run())
        await world.worker.started()
        try:
            yield world
        finally:
            if stop:
                world.worker.stop()
            else:
                serving.cancel()
    await world.decode_plane.close()
