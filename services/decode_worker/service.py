"""The decode worker's shell: performs what its core decides with the engine, the data plane, bus and store.

Steps run in a task of their own; the end of each is an event. Nothing here waits inside the mailbox except for the
bus to take a message, and the next step is under way before the tokens of the last one are sent.
"""

from __future__ import annotations

import asyncio
from typing import assert_never

from common.logs import get_logger
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished
from common.messages.prefill import KvReleased
from common.messages.requests import RequestSpec, TokensGenerated
from common.metrics import Metrics
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
from common.runtime import subjects
from common.runtime.bus import Bus
from common.runtime.shell import JournalSink
from common.runtime.store import Store
from common.settings import DecodeWorkerSettings
from common.units import RequestId, WorkerId
from services.decode_worker.outbox import TokenOutbox
from services.decode_worker.receiver import KvDoor
from services.engine.data_plane import DataPlaneFactory
from services.engine.interface import DecodeEngine, EngineError
from services.worker.shell import WorkerPorts, WorkerShell, worker_id_of

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
        metrics: Metrics | None = None,
    ) -> None:
        measured = Metrics("decode-worker") if metrics is None else metrics
        self.settings = settings
        self.worker_id = worker_id_of("decode", settings)
        self.core = DecodeWorkerCore(config_of(settings, self.worker_id, engine))
        self._engine = engine
        self._shell: WorkerShell[DecodeOrder | DecodeLocalEvent, DecodeCommand] = WorkerShell(
            "decode",
            self.worker_id,
            settings,
            WorkerPorts(bus, store, engine, data_plane),
            self.core,
            self._perform,
            orders=DecodeOrder,
            at_stop=StopRequested(),
            journal=journal,
            metrics=measured,
        )
        self.incarnation = self._shell.incarnation
        self._door = KvDoor(self.core, engine, self._shell.tell)
        self._outbox = TokenOutbox(settings.token_gather_ms / 1e3)
        self._holding = False
        """A task sends what the outbox holds."""
        self._step_of: tuple[RequestId, ...] = ()
        """Rows of the step that is ordered, or runs."""
        self._step_ordered = asyncio.Event()
        self._stepping = False
        """The task that performs steps is there."""

    def __repr__(self) -> str:
        return f"DecodeWorker({self.worker_id!r}, {self.core!r})"

    async def run(self) -> None:
        """Raises: StartupError, if the data plane's address cannot be bound; whatever ends the core."""
        await self._shell.run(self._door)

    def stop(self) -> None:
        """Drain and leave; `run` returns when that is done."""
        self._shell.stop()

    async def started(self) -> None:
        """Wait until it hears orders."""
        await self._shell.started()

    # --- performing ---

    async def _perform(self, commands: list[DecodeCommand]) -> None:
        for command in commands:
            match command:
                case TokensGenerated():
                    await self._send(command)
                case DecodeFinished() | DecodeBusy() | DecodeFailed() | KvReleased():
                    await self._shell.publish(subjects.SCHEDULER, command)
                case PlaceDecodeKv(location=location):
                    self._shell.keep_location(location)
                case ForgetDecodeKv(request_id=request_id):
                    self._shell.forget_location(request_id)
                case _:
                    self._begin(command)

    def _begin(
        self, command: ReserveKv | AcceptOffer | RefuseOffer | StopReceiving | ActivateRow | RunStep | ReleaseKv
    ) -> None:
        match command:
            case RunStep(request_ids=request_ids):
                self._step_of = request_ids
                self._step_ordered.set()
                if not self._stepping:
                    self._stepping = True
                    self._shell.spawn(self._steps(), name="steps")
            case ReserveKv(spec=spec):
                self._reserve(spec)
            case AcceptOffer(request_id=request_id, attempt=attempt):
                self._door.answer(request_id, attempt, None)
            case RefuseOffer(request_id=request_id, attempt=attempt, reason=reason):
                self._door.answer(request_id, attempt, reason)
            case StopReceiving(request_id=request_id, attempt=attempt):
                self._shell.data_plane.refuse(request_id, attempt)
            case ActivateRow():
                self._activate(command)
            case ReleaseKv(request_id=request_id):
                self._engine.release(request_id)
            case _:
                assert_never(command)

    async def _send(self, tokens: TokensGenerated) -> None:
        ready = self._outbox.put(tokens, asyncio.get_running_loop().time(), rows=len(self._step_of))
        if ready is not None:
            await self._shell.publish(subjects.router(ready.router_id), ready)
        elif not self._holding:
            self._holding = True
            self._shell.spawn(self._send_held(), name="held tokens")

    async def _send_held(self) -> None:
        loop = asyncio.get_running_loop()
        while (due_s := self._outbox.next_deadline_s()) is not None:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            for tokens in self._outbox.take_due(loop.time(), rows=len(self._step_of)):
                await self._shell.publish(subjects.router(tokens.router_id), tokens)
        self._holding = False

    def _reserve(self, spec: RequestSpec) -> None:
        try:
            self._engine.reserve(spec)
        except EngineError as error:
            log.warning("no room", request_id=spec.request_id, attempt=spec.attempt, reason=str(error))
            self._shell.tell(ReserveFailed(request_id=spec.request_id, attempt=spec.attempt, reason=str(error)))
        else:
            self._shell.tell(KvReserved(request_id=spec.request_id, attempt=spec.attempt))

    def _activate(self, command: ActivateRow) -> None:
        self._outbox.sent_elsewhere(command.router_id, asyncio.get_running_loop().time())
        try:
            self._engine.activate(command.request_id, command.first_token)
        except EngineError as error:
            # The step that begins next contains it, and fails for the same reason: that is where the core hears of it.
            log.error("not activated", request_id=command.request_id, reason=str(error))

    async def _steps(self) -> None:
        """One after the other, as the core orders them. One task for all: to make one costs as much as to decide."""
        while True:
            await self._step_ordered.wait()
            self._step_ordered.clear()
            await self._step(self._step_of)

    async def _step(self, request_ids: tuple[RequestId, ...]) -> None:
        try:
            sampled = await self._engine.step(request_ids)
        except EngineError as error:
            log.error("a step failed", request_ids=request_ids, reason=str(error))
            self._shell.tell(StepFailed(reason=str(error)))
            return
        tokens = (DecodedToken(request_id=s.request_id, token_id=s.token_id, logprob=s.logprob) for s in sampled)
        self._shell.tell(StepFinished(sampled=tuple(tokens), core_wait_s=self._engine.core_wait_s))


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
        crowded_itl_s=settings.crowded_itl_ms / 1e3,
    )
