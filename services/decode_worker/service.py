"""The decode worker's shell: performs what its core decides with the engine, the data plane, bus and store.

A step is one task; its end is an event. Nothing here waits inside the mailbox except for the bus to take
a message, and the next step is under way before the tokens of the last one are sent.
"""

from __future__ import annotations

import asyncio
from typing import assert_never
from uuid import uuid4

from common.errors import StartupError
from common.logs import get_logger
from common.messages.base import Message
from common.messages.cluster import WorkerHeartbeat, WorkerLeft, WorkerProfile
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, DecodeStarted
from common.messages.locations import WorkerLease
from common.messages.prefill import KvReleased
from common.messages.requests import RequestSpec, TokensGenerated
from common.policy.decode_events import (
    AcceptOffer,
    ActivateRow,
    DecodeCommand,
    DecodedToken,
    DecodeLocalEvent,
    DecodeOrder,
    DecodeWorkerConfig,
    ForgetDecodeKv,
    KvReserved,
    PlaceDecodeKv,
    RefuseOffer,
    ReleaseKv,
    ReserveFailed,
    ReserveKv,
    RunStep,
    StepFailed,
    StepFinished,
    StopReceiving,
    StopRequested,
)
from common.policy.decode_worker import DecodeWorkerCore
from common.runtime import keys, subjects, wire
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.shell import CoreShell, JournalSink, MailboxFull
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.runtime.wire import WireError
from common.runtime.write_behind import WriteBehind
from common.settings import DecodeWorkerSettings
from common.units import RequestId, WorkerId
from services.decode_worker.receiver import KvDoor
from services.engine.data_plane import DataPlane, DataPlaneFactory
from services.engine.interface import DecodeEngine, EngineError

log = get_logger(__name__)

EARLY_SHARE_OF_TRANSFER = 0.4
"""KV that comes before its order waits at most so long, as a share of the sender's patience."""


class DecodeWorker:
    """Continuous batching of short decodes. `run` serves until `stop` (drains, says farewell) or until
    cancelled (as if killed)."""

    def __init__(
        self,
        settings: DecodeWorkerSettings,
        bus: Bus,
        store: Store,
        engine: DecodeEngine,
        data_plane: DataPlaneFactory,
        *,
        journal: JournalSink | None = None,
    ) -> None:
        self.settings = settings
        self.worker_id = WorkerId(settings.worker_id or f"decode-{uuid4().hex[:8]}")
        self.incarnation = uuid4().hex
        self.core = DecodeWorkerCore(config_of(settings, self.worker_id, engine))
        self._bus = bus
        self._engine = engine
        self._open_plane = data_plane
        self._plane: DataPlane | None = None
        self._shell: CoreShell[DecodeOrder | DecodeLocalEvent, DecodeCommand] = CoreShell(
            f"decode worker {self.worker_id}", self.core, self._perform, journal=journal
        )
        self._door = KvDoor(self.core, engine, self._shell.tell)
        self._kept = WriteBehind(store, ttl_s=settings.lease_s)
        self._tasks = Supervisor()
        self._stopping = asyncio.Event()
        self._started = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._empty = asyncio.Event()

    def __repr__(self) -> str:
        return f"DecodeWorker({self.worker_id!r}, {self.core!r})"

    # --- life ---

    async def run(self) -> None:
        """Raises: StartupError, if the data plane's address cannot be bound; whatever ends the core."""
        try:
            self._plane = self._open_plane(self._door)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {self.settings.data_host}:{self.settings.data_port} for KV: {error.strerror};"
                " pass another --data-port"
            ) from error
        self._bus.on_reconnect(self._beat_now.set)
        try:
            async with self._tasks as tasks:
                tasks.spawn(self._shell.run(), name="core")
                tasks.spawn(self._kept.run(), name="store")
                inbox = await self._bus.subscribe(subjects.worker(self.worker_id), self._hear)
                tasks.spawn(self._beats(), name="heartbeats")
                self._started.set()
                await self._stopping.wait()
                await self._drain()
                await inbox.unsubscribe()
                await tasks.stop()
            await self._leave()
        finally:
            await self._plane.close()
            await self._engine.shutdown()

    def stop(self) -> None:
        """Drain and leave; `run` returns when that is done."""
        self._stopping.set()

    async def started(self) -> None:
        """Wait until it hears orders."""
        await self._started.wait()

    async def _drain(self) -> None:
        self._shell.tell(StopRequested())
        await self._shell.drained()
        self._empty.clear()
        if self.core.idle:
            return
        try:
            await asyncio.wait_for(self._empty.wait(), self.settings.drain_s)
        except TimeoutError:
            log.warning("stopping with requests in hand", requests=len(self.core.holdings()))

    async def _leave(self) -> None:
        await self._kept.close()
        await self._publish(subjects.SCHEDULER, WorkerLeft(worker_id=self.worker_id, incarnation=self.incarnation))
        try:
            await self._bus.flush()
        except BusError as error:
            log.warning("left without a word", error=str(error))

    # --- hearing and telling ---

    async def _hear(self, delivery: Delivery) -> None:
        try:
            order: DecodeOrder = wire.decode(delivery.data, DecodeOrder)
        except WireError as error:
            log.warning("unreadable order", error=str(error))
            return
        try:
            self._shell.tell(order)
        except MailboxFull as error:
            log.error("order dropped", error=str(error))

    async def _beats(self) -> None:
        profile = self._profile()
        self._kept.put(keys.worker_lease(self.worker_id), wire.encode_record(WorkerLease(profile=profile)))
        while True:
            self._beat_now.clear()
            await self._publish(subjects.SCHEDULER, WorkerHeartbeat(profile=profile, holdings=self.core.holdings()))
            try:
                await asyncio.wait_for(self._beat_now.wait(), self.settings.heartbeat_s)
            except TimeoutError:
                continue

    async def _publish(self, subject: str, message: Message) -> None:
        """What the bus cannot take is mended from the next heartbeats."""
        try:
            await self._bus.publish(subject, wire.encode(message))
        except BusError as error:
            log.warning("message lost", message=type(message).__name__, error=str(error))

    def _profile(self) -> WorkerProfile:
        profile = self._engine.profile
        return WorkerProfile(
            worker_id=self.worker_id,
            role="decode",
            incarnation=self.incarnation,
            node=self.settings.node,
            replica=self.settings.replica or self.worker_id,
            model_id=profile.model_id,
            model_fingerprint=profile.model_fingerprint,
            layers=profile.layers,
            kv_bytes_per_token=profile.kv_bytes_per_token,
            kv_capacity_tokens=profile.kv_capacity_tokens,
            context_tokens=profile.context_tokens,
            rows_max=profile.rows_max,
            data_address=self._data_plane.address,
            step_cost=profile.step_cost,
        )

    @property
    def _data_plane(self) -> DataPlane:
        assert self._plane is not None  # opened before anything that needs it
        return self._plane

    # --- performing ---

    async def _perform(self, commands: list[DecodeCommand]) -> None:
        for command in commands:
            match command:
                case TokensGenerated():
                    await self._publish(subjects.router(command.router_id), command)
                case DecodeStarted() | DecodeFinished() | DecodeBusy() | DecodeFailed() | KvReleased():
                    await self._publish(subjects.SCHEDULER, command)
                case PlaceDecodeKv(location=location):
                    self._kept.put(keys.kv(location.request_id, self.worker_id), wire.encode_record(location))
                case ForgetDecodeKv(request_id=request_id):
                    self._kept.delete(keys.kv(request_id, self.worker_id))
                case _:
                    self._begin(command)
        if self.core.idle:
            self._empty.set()

    def _begin(
        self, command: ReserveKv | AcceptOffer | RefuseOffer | StopReceiving | ActivateRow | RunStep | ReleaseKv
    ) -> None:
        match command:
            case RunStep(request_ids=request_ids):
                self._tasks.spawn(self._step(request_ids), name="step")
            case ReserveKv(spec=spec):
                self._reserve(spec)
            case AcceptOffer(request_id=request_id, attempt=attempt):
                self._door.answer(request_id, attempt, None)
            case RefuseOffer(request_id=request_id, attempt=attempt, reason=reason):
                self._door.answer(request_id, attempt, reason)
            case StopReceiving(request_id=request_id, attempt=attempt):
                self._data_plane.refuse(request_id, attempt)
            case ActivateRow(request_id=request_id, first_token=first_token):
                self._activate(request_id, first_token)
            case ReleaseKv(request_id=request_id):
                self._engine.release(request_id)
            case _:
                assert_never(command)

    def _reserve(self, spec: RequestSpec) -> None:
        try:
            self._engine.reserve(spec)
        except EngineError as error:
            log.warning("no room", request=spec.request_id, reason=str(error))
            self._shell.tell(ReserveFailed(request_id=spec.request_id, attempt=spec.attempt, reason=str(error)))
        else:
            self._shell.tell(KvReserved(request_id=spec.request_id, attempt=spec.attempt))

    def _activate(self, request_id: RequestId, first_token: int) -> None:
        try:
            self._engine.activate(request_id, first_token)
        except EngineError as error:
            # The step that begins next contains it, and fails for the same reason: that is where the core hears of it.
            log.error("not activated", request=request_id, reason=str(error))

    async def _step(self, request_ids: tuple[RequestId, ...]) -> None:
        try:
            sampled = await self._engine.step(request_ids)
        except EngineError as error:
            log.error("a step failed", rows=len(request_ids), reason=str(error))
            self._shell.tell(StepFailed(reason=str(error)))
            return
        tokens = (DecodedToken(request_id=s.request_id, token_id=s.token_id, logprob=s.logprob) for s in sampled)
        self._shell.tell(StepFinished(sampled=tuple(tokens)))


def config_of(settings: DecodeWorkerSettings, worker_id: WorkerId, engine: DecodeEngine) -> DecodeWorkerConfig:
    """What the core must know: the smaller of what is set and what the engine has."""
    profile = engine.profile
    return DecodeWorkerConfig(
        worker_id=worker_id,
        layers=profile.layers,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        rows_max=profile.rows_max,
        expect_s=settings.expect_s,
        early_s=EARLY_SHARE_OF_TRANSFER * settings.transfer_s,
    )
