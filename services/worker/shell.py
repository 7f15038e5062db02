"""The shell around a worker's core: comes up, hears orders, says who it is and what it holds, drains, leaves.

What it hears goes to the core unread, and a command is performed by the role that owns the shell, with
`publish`, `tell`, `spawn` and `keep_location`. Nothing here knows one order or command from another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import UnionType
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

from common.errors import StartupError
from common.logs import about, get_logger
from common.messages.base import Message, Record
from common.messages.cluster import Holding, WorkerHeartbeat, WorkerLeft, WorkerProfile, WorkerRole
from common.messages.locations import KvLocation, WorkerLease
from common.metrics import Metrics
from common.policy.core import Core, TimePassed
from common.runtime import keys, subjects, wire
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.heartbeat import Heartbeat, show_life
from common.runtime.shell import CoreShell, JournalSink, MailboxFull
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.runtime.wire import WireError
from common.runtime.write_behind import WriteBehind
from common.settings import WorkerSettings
from common.units import RequestId, WorkerId
from services.engine.data_plane import DataPlane, DataPlaneFactory, KvReceiver
from services.engine.interface import DecodeEngine, PrefillEngine
from services.worker.telemetry import watch_worker

log = get_logger(__name__)

EventT = TypeVar("EventT")
CoreEventT = TypeVar("CoreEventT", contravariant=True)
CommandT = TypeVar("CommandT")


class WorkerCore(Core[CoreEventT, CommandT], Protocol[CoreEventT, CommandT]):
    """A core that holds requests."""

    @property
    def idle(self) -> bool:
        """Nothing is held."""
        ...

    def holdings(self) -> tuple[Holding, ...]: ...


@dataclass(frozen=True, slots=True)
class WorkerPorts:
    """All that a worker reaches of the world."""

    bus: Bus
    store: Store
    engine: PrefillEngine | DecodeEngine
    data_plane: DataPlaneFactory


def worker_id_of(role: WorkerRole, settings: WorkerSettings) -> WorkerId:
    """As set; else a new one."""
    return WorkerId(settings.worker_id or f"{role}-{uuid4().hex[:8]}")


class WorkerShell(Generic[EventT, CommandT]):
    """`orders`: the messages this worker takes, all of them events of its core. `at_stop`: what the core is
    told first when the worker is to stop. `group_address`: of its door for groups, once `run` runs."""

    def __init__(
        self,
        role: WorkerRole,
        worker_id: WorkerId,
        settings: WorkerSettings,
        ports: WorkerPorts,
        core: WorkerCore[EventT | TimePassed, CommandT],
        perform: Callable[[list[CommandT]], Awaitable[None]],
        *,
        orders: UnionType,
        at_stop: EventT | None = None,
        group_address: Callable[[], str] = lambda: "",
        journal: JournalSink | None = None,
        metrics: Metrics,
    ) -> None:
        self.incarnation = uuid4().hex
        self._role = role
        self._worker_id = worker_id
        self._settings = settings
        self._ports = ports
        self._core = core
        self._perform = perform
        self._orders = orders
        self._at_stop = at_stop
        self._group_address = group_address
        self._runner: CoreShell[EventT, CommandT] = CoreShell(
            f"{role} worker {worker_id}", core, self._perform_all, journal=journal
        )
        self._plane: DataPlane | None = None
        self._kept: WriteBehind[Record] = WriteBehind(ports.store, ttl_s=settings.lease_s, encode=wire.encode_record)
        watch_worker(metrics, worker_id, ports.engine, core.holdings)
        self._heartbeat = Heartbeat(settings.heartbeat_s, self._beat)
        self._tasks = Supervisor()
        self._stopping = asyncio.Event()
        self._started = asyncio.Event()
        self._empty = asyncio.Event()

    # --- life ---

    async def run(self, receiver: KvReceiver | None) -> None:
        """Serve until `stop`, then drain and say farewell; or until cancelled, as if killed.

        Raises: StartupError, if the data plane's address cannot be bound; whatever ends the core."""
        self._plane = self._open_plane(receiver)
        self._ports.bus.on_reconnect(self._heartbeat.now)
        try:
            async with self._tasks as tasks:
                tasks.spawn(self._runner.run(), name="core")
                tasks.spawn(self._kept.run(), name="store")
                inbox = await self._ports.bus.subscribe(subjects.worker(self._worker_id), self._hear)
                self._kept.put(keys.worker_lease(self._worker_id), WorkerLease(profile=self._profile()))
                tasks.spawn(self._heartbeat.run(), name="heartbeats")
                tasks.spawn(show_life(self._settings.alive_file, self._settings.heartbeat_s), name="sign of life")
                self._started.set()
                await self._stopping.wait()
                self._heartbeat.now()  # says that it leaves, so that nothing new is sent here
                await self._drain()
                await inbox.unsubscribe()
                await tasks.stop()
            await self._leave()
        finally:
            await self._plane.close()
            await self._ports.engine.shutdown()

    def stop(self) -> None:
        """Drain and leave; `run` returns when that is done."""
        self._stopping.set()

    async def started(self) -> None:
        """Wait until it hears orders."""
        await self._started.wait()

    def _open_plane(self, receiver: KvReceiver | None) -> DataPlane:
        try:
            return self._ports.data_plane(receiver)
        except OSError as error:
            where = f"{self._settings.data_host}:{self._settings.data_port}"
            raise StartupError(
                f"cannot listen on {where} for KV: {error.strerror}; pass another --data-port"
            ) from error

    async def _drain(self) -> None:
        if self._at_stop is not None:
            self._runner.tell(self._at_stop)
            await self._runner.drained()
        self._empty.clear()
        if self._core.idle:
            return
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._empty.wait()
        except TimeoutError:
            log.warning("stopping with requests in hand", requests=len(self._core.holdings()))

    async def _leave(self) -> None:
        await self._kept.close()
        await self.publish(subjects.SCHEDULER, WorkerLeft(worker_id=self._worker_id, incarnation=self.incarnation))
        try:
            await self._ports.bus.flush()
        except BusError as error:
            log.warning("left without a word", error=str(error))

    # --- for the role that owns it ---

    @property
    def data_plane(self) -> DataPlane:
        """Open as long as `run` runs."""
        assert self._plane is not None  # opened before anything that needs it
        return self._plane

    def tell(self, event: EventT) -> None:
        """To the core. Raises: MailboxFull."""
        self._runner.tell(event)

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """A task that ends with this worker, and whose exception ends it."""
        self._tasks.spawn(work, name=name)

    async def publish(self, subject: str, message: Message) -> None:
        """What the bus cannot take is mended from the next heartbeats."""
        try:
            await self._ports.bus.publish(subject, wire.encode(message))
        except BusError as error:
            log.warning("message lost", error=str(error), **about(message))

    def keep_location(self, location: KvLocation) -> None:
        """Whose KV lies here, for whoever looks into the store."""
        self._kept.put(keys.kv(location.request_id, self._worker_id), location)

    def forget_location(self, request_id: RequestId) -> None:
        self._kept.delete(keys.kv(request_id, self._worker_id))

    # --- hearing and telling ---

    async def _hear(self, delivery: Delivery) -> None:
        try:
            order: EventT = wire.decode(delivery.data, self._orders)
        except WireError as error:
            log.warning("unreadable order", error=str(error))
            return
        try:
            self.tell(order)
        except MailboxFull as error:
            log.error("order dropped", error=str(error), **about(order))

    async def _perform_all(self, commands: list[CommandT]) -> None:
        await self._perform(commands)
        if self._core.idle:
            self._empty.set()

    async def _beat(self) -> None:
        leaving = self._stopping.is_set()
        beat = WorkerHeartbeat(profile=self._profile(), holdings=self._core.holdings(), leaving=leaving)
        await self.publish(subjects.SCHEDULER, beat)

    def _profile(self) -> WorkerProfile:
        profile = self._ports.engine.profile
        return WorkerProfile(
            worker_id=self._worker_id,
            role=self._role,
            incarnation=self.incarnation,
            node=self._settings.node,
            replica=self._settings.replica or self._worker_id,
            model_id=profile.model_id,
            model_fingerprint=profile.model_fingerprint,
            layers=profile.layers,
            kv_bytes_per_token=profile.kv_bytes_per_token,
            kv_capacity_tokens=profile.kv_capacity_tokens,
            context_tokens=profile.context_tokens,
            rows_max=profile.rows_max,
            data_address=self.data_plane.address,
            group_address=self._group_address(),
            step_cost=profile.step_cost,
            layer=profile.layer,
            exchange=profile.exchange,
            core_share=profile.core_share,
            spill_bytes_max=profile.spill_bytes_max,
        )
