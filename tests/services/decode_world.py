"""A decode worker on in-memory ports, with a prefill engine that feeds it and ears for what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from common.messages.cluster import StepCost, WorkerHeartbeat, WorkerLeft
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.prefill import DropRequest, KvReleased
from common.messages.requests import Prompt, RequestSpec, TokensGenerated
from common.runtime import subjects
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.wire import decode, encode
from common.settings import DecodeWorkerSettings
from services.decode_worker.service import DecodeWorker
from services.engine.data_plane import KvHeader, KvTrailer, TransferFailed
from services.engine.interface import LayerKv, Segment
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine
from services.engine.transport_memory import MemoryHub

SHAPE = TimedShape(
    layers=4, vocab=1_000, rows_max=4, kv_capacity_tokens=400, step_cost=StepCost(pass_s=0.01, token_s=1e-4, pair_s=0)
)
WORKER = "d0"

FromWorker = WorkerHeartbeat | WorkerLeft | DecodeFinished | DecodeBusy | DecodeFailed | KvReleased


def prompt_of(request_id: str, tokens: int) -> list[int]:
    return [(sum(request_id.encode()) * 31 + 7 * number) % SHAPE.vocab for number in range(tokens)]


class DecodeWorld:
    def __init__(self, shape: TimedShape, settings: DecodeWorkerSettings) -> None:
        self.broker = MemoryBroker()
        self.store = MemoryStore()
        self.hub = MemoryHub(seed=3)
        self.bus = MemoryBus(self.broker, "world")
        self.engine = TimedDecodeEngine(shape)
        self.worker = DecodeWorker(
            settings,
            MemoryBus(self.broker, WORKER),
            self.store,
            self.engine,
            self.hub.plane(transfer_s=settings.transfer_s),
        )
        self.prefill = TimedPrefillEngine(SHAPE)
        self.plane = self.hub.plane(transfer_s=settings.transfer_s)(None)
        self.said: list[FromWorker] = []
        """To the scheduler, without heartbeats."""
        self.beats: list[WorkerHeartbeat] = []
        self.messages: list[TokensGenerated] = []
        """To the routers."""
        self.failed_transfers: dict[str, str] = {}

    async def listen(self) -> None:
        async def scheduler(delivery):
            message = decode(delivery.data, FromWorker)
            (self.beats if isinstance(message, WorkerHeartbeat) else self.said).append(message)

        async def router(delivery):
            self.messages.append(decode(delivery.data, TokensGenerated))

        await self.bus.subscribe(subjects.SCHEDULER, scheduler)
        await self.bus.subscribe(subjects.router("*"), router)

    @property
    def address(self) -> str:
        return self.beats[-1].profile.data_address

    async def order(self, message: ExpectKv | DropRequest) -> None:
        await self.bus.publish(subjects.worker(WORKER), encode(message))

    async def expect(self, spec: RequestSpec) -> None:
        await self.order(ExpectKv(worker_id=WORKER, spec=spec, prefill_worker_id="p0", epoch=1))

    async def drop(self, request_id: str, attempt: int = 0) -> None:
        await self.order(DropRequest(worker_id=WORKER, request_id=request_id, attempt=attempt, epoch=1))

    async def hand_over(self, spec: RequestSpec, *, fingerprint: str | None = None) -> None:
        """Prefill one request and send its KV, as a prefill worker does; failures are kept."""
        header = KvHeader(
            request_id=spec.request_id,
            attempt=spec.attempt,
            sender="p0",
            model_fingerprint=fingerprint or self.prefill.profile.model_fingerprint,
            layers=SHAPE.layers,
            tokens=spec.prompt.tokens,
        )
        layers: list[LayerKv] = []
        self.prefill.open(spec, prompt_of(spec.request_id, spec.prompt.tokens), layers.append)
        outgoing = self.plane.send(self.address, header)
        segment = Segment(request_id=spec.request_id, start=0, tokens=spec.prompt.tokens, sample=True)
        try:
            result = await self.prefill.run([segment])
            for kv in layers:
                outgoing.push(kv)
            await outgoing.finish(KvTrailer(first_token=result.sampled[0].token_id))
        except TransferFailed as error:
            self.failed_transfers[spec.request_id] = str(error)
        finally:
            await outgoing.abort()
            self.prefill.close(spec.request_id)

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(20_000):
            if condition():
                return
            await asyncio.sleep(0.005)  # virtual
        raise AssertionError(f"never; said {self.said}")

    def tokens(self, request_id: str) -> list[int]:
        """All received of a request, with the first one, which the prefill worker sends; indexes checked."""
        chunks = [chunk for message in self.messages for chunk in message.chunks if chunk.request_id == request_id]
        found: list[int] = []
        for chunk in chunks:
            assert chunk.index == 1 + len(found)
            found += chunk.token_ids
        return found

    def heard(self, kind: type, request_id: str) -> list:
        return [m for m in self.said if isinstance(m, kind) and m.request_id == request_id]

    def released(self, request_id: str, attempt: int = 0) -> bool:
        """Or finished, which says as much."""
        ends = (*self.heard(KvReleased, request_id), *self.heard(DecodeFinished, request_id))
        return any(message.attempt == attempt for message in ends)

    async def kept(self) -> set[str]:
        """Request ids of the KV locations in the store."""
        return {key.split(":")[3] for key in await self.store.scan("pecsched:v1:kv:")}


def spec_of(request_id: str, tokens: int = 20, *, max_tokens: int = 5, attempt: int = 0, router: str = "r1", **more):
    return RequestSpec(
        request_id=request_id,
        attempt=attempt,
        router_id=router,
        prompt=Prompt(tokens=tokens, key="k"),
        max_tokens=max_tokens,
        **more,
    )


def wanted_tokens(spec: RequestSpec) -> list[int]:
    """What the decode worker must send: all but the first."""
    return expected_tokens(prompt_of(spec.request_id, spec.prompt.tokens), spec.max_tokens, SHAPE.vocab)[1:]


@asynccontextmanager
async def decode_world(shape: TimedShape = SHAPE, **settings: object) -> AsyncIterator[DecodeWorld]:
    """Leaving it stops the worker and checks that nothing is left anywhere."""
    world = DecodeWorld(shape, DecodeWorkerSettings(worker_id=WORKER, engine="timed", **settings))
    await world.listen()
    running = asyncio.get_running_loop().create_task(world.worker.run())
    await world.until(lambda: world.beats)
    try:
        yield world
    finally:
        world.worker.stop()
        await running
        await world.plane.close()
    world.worker.core.check()
    assert isinstance(world.said[-1], WorkerLeft)
    assert not await world.store.scan("pecsched:v1:")
