"""The SP coordinator: runs its core on the bus, says what it drives, dissolves its groups when it stops."""

from __future__ import annotations

import asyncio
import contextlib

from common.logs import about, get_logger
from common.messages.cluster import CoordinatorHeartbeat, CoordinatorLeft
from common.messages.sp import (
    DropSegment,
    FormGroup,
    LoadSegment,
    MeetRanks,
    PartSegment,
    PauseSegment,
    RestoreSegment,
    RunSegment,
    SpillSegment,
)
from common.metrics import Metrics
from common.policy.sp_coordinator import SpCoordinator as Core
from common.policy.sp_io import CoordinatorCommand, CoordinatorEvent, CoordinatorHeard, StopAsked
from common.runtime import keys, subjects
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.heartbeat import Heartbeat, show_life
from common.runtime.lease import Lease
from common.runtime.shell import CoreShell, JournalSink, MailboxFull
from common.runtime.store import Store
from common.runtime.supervisor import Supervisor
from common.runtime.wire import WireError, decode, encode
from common.settings import CoordinatorSettings
from common.units import CoordinatorId
from services.sp_coordinator.telemetry import CoordinatorTelemetry

log = get_logger(__name__)


class SpCoordinator:
    """One active process per cluster; more stand by for its lease.

    `incarnation` names this start of it: new at every start. `journal`: see `common.runtime.journal`.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        bus: Bus,
        store: Store,
        *,
        incarnation: str,
        coordinator_id: str = "sp",
        journal: JournalSink | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.core = Core(settings.answer_s, settings.move_s)
        self.bus_errors = 0
        self._settings = settings
        self._bus = bus
        self._coordinator_id = CoordinatorId(coordinator_id)
        self._incarnation = incarnation
        self._lease = Lease(store, keys.coordinator_lease(), f"{coordinator_id}:{incarnation}", settings.lease_s)
        self._shell: CoreShell[CoordinatorEvent, CoordinatorCommand] = CoreShell(
            "sp-coordinator", self.core, self._perform, journal=journal
        )
        self._stop = asyncio.Event()
        self._heartbeat = Heartbeat(settings.heartbeat_s, self._say_what_is_driven)
        self._undriven = asyncio.Event()
        self._active = False
        self._telemetry = CoordinatorTelemetry(
            Metrics("sp-coordinator") if metrics is None else metrics,
            lambda: len(self.core.driving()) if self._active else None,
        )
        self._in_order = asyncio.Lock()
        """A heartbeat that lacks a group must not overtake the word of how that group ended."""

    def __repr__(self) -> str:
        return f"SpCoordinator({self._coordinator_id}:{self._incarnation}, driving={len(self.core.driving())})"

    def stop(self) -> None:
        """Dissolve every group, then let `run` return."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped or cancelled. Raises: LeaseLost, and whatever the core raised."""
        try:
            async with Supervisor() as tasks:
                tasks.spawn(show_life(self._settings.alive_file, self._settings.heartbeat_s), name="sign of life")
                if await self._lease.stand_by(tasks, self._stop) is None:
                    return
                self._active = True
                tasks.spawn(self._shell.run(), name="coordinator core")
                subscription = await self._bus.subscribe(subjects.COORDINATOR, self._receive)
                self._bus.on_reconnect(self._heartbeat.now)
                beats = tasks.spawn(self._heartbeat.run(), name="coordinator heartbeats")
                log.info("coordinating", incarnation=self._incarnation)
                await self._stop.wait()
                beats.cancel()  # a heartbeat after the farewell would take it back
                await self._drain()
                await subscription.unsubscribe()
        finally:
            await self._lease.release()

    async def _drain(self) -> None:
        """Members drop what they hold within a step's time; a silent one is given up after `answer_s`."""
        # First: a group refused here would cost its request one of its attempts.
        left = CoordinatorLeft(coordinator_id=self._coordinator_id, incarnation=self._incarnation)
        await self._publish(subjects.SCHEDULER, left)
        self._shell.tell(StopAsked())
        await self._shell.drained()
        self._undriven.clear()
        if self.core.driving():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * self._settings.answer_s):
                    await self._undriven.wait()

    async def _receive(self, delivery: Delivery) -> None:
        try:
            order = decode(delivery.data, CoordinatorHeard)
            if isinstance(order, FormGroup) and len(order.members) > 1:
                log.info("a group is formed", request_id=order.spec.request_id, members=order.members, why=order.why)
            self._shell.tell(order)
        except WireError as error:
            log.error("a message was refused", subject=delivery.subject, error=str(error))
        except MailboxFull as error:
            # Whoever sent it repeats it or gives it up after its own bound.
            log.error("a message was dropped", error=str(error))

    async def _perform(self, commands: list[CoordinatorCommand]) -> None:
        async with self._in_order:
            for command in commands:
                match command:
                    case (
                        LoadSegment()
                        | MeetRanks()
                        | RunSegment()
                        | PauseSegment()
                        | PartSegment()
                        | SpillSegment()
                        | RestoreSegment()
                        | DropSegment()
                    ):
                        await self._publish(subjects.worker(command.worker_id), command)
                    case _:
                        self._telemetry.said(command, asyncio.get_running_loop().time())
                        await self._publish(subjects.SCHEDULER, command)
        if not self.core.driving():
            self._undriven.set()

    async def _publish(
        self, subject: str, message: CoordinatorCommand | CoordinatorHeartbeat | CoordinatorLeft
    ) -> None:
        try:
            await self._bus.publish(subject, encode(message))
        except BusError as error:
            # As good as lost on the way: the bounds of the core cover members, heartbeats the scheduler.
            self.bus_errors += 1
            log.warning("a message could not be sent", subject=subject, error=str(error), **about(message))

    async def _say_what_is_driven(self) -> None:
        async with self._in_order:
            await self._publish(
                subjects.SCHEDULER,
                CoordinatorHeartbeat(
                    coordinator_id=self._coordinator_id,
                    incarnation=self._incarnation,
                    driving=self.core.driving(),
                ),
            )
            # Again what was said once: if it was lost, the scheduler still waits for it.
            for word in self.core.standings():
                await self._publish(subjects.SCHEDULER, word)
