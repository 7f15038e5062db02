"""The scheduler's shell: one active process runs the core, any number stand by for its lease.

The messages of an event go out at once; the records of requests follow behind, in one transaction for all that
gathered meanwhile, latest per request. No message depends on a record: who runs what is known to workers and
routers, and a successor learns it from their heartbeats. So a record that comes late costs a person a stale
view, while a scheduler that waited for the store would cost every client its answer. Records not written are
kept until the store is back; each failure is counted (`store_errors`) and shown in the cluster view.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import msgspec

from common.logs import about, get_logger
from common.messages.base import Message, Record
from common.messages.decode import ExpectKv
from common.messages.prefill import (
    DropRequest,
    RunPrefill,
)
from common.messages.scheduling import (
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
)
from common.messages.sp import (
    DissolveGroup,
    FormGroup,
    GrowGroup,
    PartGroup,
    PauseGroup,
    RestoreGroup,
    ResumeGroup,
    SpillGroup,
)
from common.messages.views import ClusterView, DescribeCluster, QueryFailed, StoryTold, TellStory
from common.metrics import Metrics
from common.policy.scheduler import Scheduler
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import (
    EndBusRequest,
    ForgetRequest,
    SaveRequest,
    SchedulerCommand,
    SchedulerEvent,
    SchedulerHeard,
    WorkerKeptOut,
)
from common.runtime import keys, subjects
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.heartbeat import show_life
from common.runtime.lease import Lease
from common.runtime.shell import CoreShell, JournalSink, MailboxFull
from common.runtime.store import Delete, Put, Store, StoreError, Write
from common.runtime.supervisor import Supervisor
from common.runtime.wire import WireError, decode, encode, encode_record
from common.settings import SchedulerSettings
from common.tracing import Tracer
from common.units import RequestId
from services.scheduler.telemetry import SchedulerTelemetry

log = get_logger(__name__)

Query = DescribeCluster | TellStory

RECORD_TTL_S = 3_600.0
"""Of a request's record: nothing outlives its cluster for longer."""
GATHER_S = 0.2
"""How long records gather before they are written; a request that ends within it leaves no trace in the store."""
WRITE_S = 0.5
"""How long one transaction may take."""
STORE_REST_S = 2.0
"""After a failure, how long until the store is tried again."""
UNWRITTEN_MAX = 20_000
"""Records kept for a store that is away; the oldest are given up (they expire by themselves)."""
DONE_HEADER = "Pecsched-Done"

JournalOf = Callable[[int], AbstractContextManager[JournalSink | None]]
"""The journal of the run under this epoch. A replay needs the epoch and the settings."""


def no_journal(_epoch: int) -> AbstractContextManager[JournalSink | None]:
    return nullcontext()


def config_of(settings: SchedulerSettings) -> SchedulerConfig:
    """What the core needs of the settings; names are the same in both."""
    shared = set(SchedulerConfig.__struct_fields__) & set(SchedulerSettings.__struct_fields__)
    return SchedulerConfig(**{name: getattr(settings, name) for name in sorted(shared)})


class RequestRecords:
    """The scheduler's records in the store, written behind its messages; see the top of this file."""

    def __init__(self, store: Store) -> None:
        self.errors = 0
        self._store = store
        self._unwritten: OrderedDict[RequestId, SaveRequest | ForgetRequest] = OrderedDict()
        self._written: set[RequestId] = set()
        """Requests of which the store may have a record."""
        self._behind = asyncio.Event()

    def note(self, command: SaveRequest | ForgetRequest) -> None:
        """To be written soon."""
        request_id = command.record.spec.request_id if isinstance(command, SaveRequest) else command.request_id
        self._unwritten.pop(request_id, None)
        if isinstance(command, ForgetRequest) and request_id not in self._written:
            return
        self._unwritten[request_id] = command
        if len(self._unwritten) > UNWRITTEN_MAX:
            given_up_id, given_up = self._unwritten.popitem(last=False)
            if isinstance(given_up, ForgetRequest):
                self._written.discard(given_up_id)
        self._behind.set()

    async def keep_up(self) -> None:
        """Until cancelled: write what is noted, one transaction after another."""
        while True:
            await self._behind.wait()
            await asyncio.sleep(GATHER_S)
            if not await self.write():
                await asyncio.sleep(STORE_REST_S)

    async def write(self) -> bool:
        """All that is noted, in one transaction of at most `WRITE_S`. False: the store did not take it."""
        batch = dict(self._unwritten)
        if batch:
            self._written.update(batch)
            try:
                async with asyncio.timeout(WRITE_S):
                    await self._store.commit([_write_of(request_id, last) for request_id, last in batch.items()])
            except (StoreError, TimeoutError) as error:
                self.errors += 1
                reason = str(error) or "no answer"
                log.warning("records could not be written", waiting=len(self._unwritten), error=reason)
                return False
        for request_id, written in batch.items():
            if self._unwritten.get(request_id) is written:  # else a newer one came meanwhile
                del self._unwritten[request_id]
                if isinstance(written, ForgetRequest):
                    self._written.discard(request_id)
        if not self._unwritten:
            self._behind.clear()
        return True

    async def forget_former(self) -> None:
        """Records of an earlier scheduler. Its requests are submitted again by their routers, which own them,
        and recorded anew; those of lost routers have nobody left to serve."""
        try:
            former = await self._store.scan(keys.requests())
            await self._store.commit([Delete(key) for key in former])
        except StoreError as error:
            self.errors += 1
            log.warning("records of an earlier scheduler remain until they expire", error=str(error))


def _write_of(request_id: RequestId, command: SaveRequest | ForgetRequest) -> Write:
    if isinstance(command, SaveRequest):
        return Put(keys.request(request_id), encode_record(command.record), RECORD_TTL_S)
    return Delete(keys.request(request_id))


class SchedulerService:
    """`owner` names this process among schedulers, new at every start."""

    def __init__(
        self,
        settings: SchedulerSettings,
        bus: Bus,
        store: Store,
        *,
        owner: str,
        journal_of: JournalOf = no_journal,
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.epoch: int | None = None
        """Of the orders given; None: standing by."""
        self.core: Scheduler | None = None
        self._settings = settings
        self._bus = bus
        self._journal_of = journal_of
        self._lease = Lease(store, keys.scheduler_lease(), owner, settings.lease_s)
        self._records = RequestRecords(store)
        self._shell: CoreShell[SchedulerEvent, SchedulerCommand] | None = None
        self._stop = asyncio.Event()
        self._telemetry = SchedulerTelemetry(
            Metrics("scheduler") if metrics is None else metrics, tracer, lambda: self.core
        )
        self._counts = {"bus_errors": 0, "refused_messages": 0, "dropped_messages": 0}

    def __repr__(self) -> str:
        return f"SchedulerService({'standing by' if self.epoch is None else f'epoch {self.epoch}'})"

    @property
    def store_errors(self) -> int:
        return self._records.errors

    def stop(self) -> None:
        """Take no more messages, let `run` return. What runs goes on without a scheduler until the next one."""
        self._stop.set()

    async def run(self) -> None:
        """Stand by, then serve until stopped or cancelled. Raises: LeaseLost, and whatever the core raised."""
        try:
            async with Supervisor() as tasks:
                tasks.spawn(show_life(self._settings.alive_file, self._settings.heartbeat_s), name="sign of life")
                epoch = await self._lease.stand_by(tasks, self._stop)
                if epoch is None:
                    return
                await self._records.forget_former()
                writing = tasks.spawn(self._records.keep_up(), name="records")
                await self._serve(tasks, epoch)
                writing.cancel()
                await asyncio.wait([writing])
                await self._records.write()
        finally:
            await self._lease.release()

    async def _serve(self, tasks: Supervisor, epoch: int) -> None:
        self.core = Scheduler(config_of(self._settings), epoch)
        with self._journal_of(epoch) as journal:
            shell = self._shell = CoreShell(
                "scheduler", self.core, self._perform, journal=journal, on_decision=self._telemetry.decision_s.observe
            )
            running = tasks.spawn(shell.run(), name="scheduler core")
            inbox = await self._bus.subscribe(subjects.SCHEDULER, self._receive)
            queries = await self._bus.subscribe(subjects.SCHEDULER_QUERY, self._answer)
            self.epoch = epoch
            log.info("scheduling", epoch=epoch, policy=self._settings.policy)
            await self._stop.wait()
            await queries.unsubscribe()
            await inbox.unsubscribe()
            await shell.drained()
            running.cancel()
            await asyncio.wait([running])

    async def _receive(self, delivery: Delivery) -> None:
        assert self._shell is not None
        try:
            self._shell.tell(decode(delivery.data, SchedulerHeard))
        except WireError as error:
            self._counts["refused_messages"] += 1
            log.error("a message was refused", subject=delivery.subject, error=str(error))
        except MailboxFull as error:
            # Routers submit again, heartbeats repeat what holds: a lost message costs seconds.
            self._counts["dropped_messages"] += 1
            log.error("a message was dropped", error=str(error))

    # --- commands --------------------------------------------------------------------------------

    async def _perform(self, commands: list[SchedulerCommand]) -> None:
        for command in commands:
            match command:
                case SaveRequest():
                    self._records.note(command)
                case ForgetRequest():
                    self._records.note(command)
                    self._telemetry.ended(command.request_id, command.life)
                case EndBusRequest():
                    await self._end_bus_request(command)
                case WorkerKeptOut():
                    log.error("a worker is kept out", worker_id=command.worker_id, reason=command.reason)
                case RunPrefill() | DropRequest() | ExpectKv():
                    await self._send(subjects.worker(command.worker_id), command)
                case FormGroup():
                    self._telemetry.planned(command)
                    await self._send(subjects.COORDINATOR, command)
                case (
                    GrowGroup()
                    | PartGroup()
                    | PauseGroup()
                    | ResumeGroup()
                    | SpillGroup()
                    | RestoreGroup()
                    | DissolveGroup()
                ):
                    await self._send(subjects.COORDINATOR, command)
                case RequestAccepted() | RequestRefused() | RequestInterrupted() | RequestFailed():
                    await self._send(subjects.router(command.router_id), command)

    async def _send(self, subject: str, message: Message) -> None:
        await self._publish(subject, encode(message), {}, message)

    async def _end_bus_request(self, command: EndBusRequest) -> None:
        error = {"message": command.message, "type": "server_error", "param": None, "code": "router_lost"}
        body = {"request_id": command.request_id, "error": error, "done": True}
        await self._publish(command.reply_inbox, json.dumps(body).encode(), {DONE_HEADER: "true"}, command)

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str], what: Record) -> None:
        try:
            await self._bus.publish(subject, data, headers=headers)
        except BusError as error:
            # As good as lost on the way; heartbeats mend what depended on it.
            self._counts["bus_errors"] += 1
            log.warning("a message could not be sent", subject=subject, error=str(error), **about(what))

    # --- questions -------------------------------------------------------------------------------

    async def _answer(self, delivery: Delivery) -> None:
        if delivery.reply is None:
            return
        try:
            answer = self._answer_to(decode(delivery.data, Query))
        except WireError as error:
            answer = QueryFailed(message=str(error))
        await self._publish(delivery.reply, encode(answer), {}, answer)

    def _answer_to(self, query: Query) -> Message:
        assert self.core is not None
        match query:
            case DescribeCluster():
                return self.describe()
            case TellStory():
                return StoryTold(request_id=query.request_id, lines=tuple(self.core.story(query.request_id)))

    def describe(self) -> ClusterView:
        """Raises: RuntimeError, while standing by."""
        if self.core is None or self._shell is None:
            raise RuntimeError("this scheduler stands by")
        view = self.core.view(asyncio.get_running_loop().time())
        return msgspec.structs.replace(
            view,
            counters={**view.counters, **self._counts, "store_errors": self.store_errors},
            decision_p50_s=self._shell.decision_p50_s,
            decision_p99_s=self._shell.decision_p99_s,
        )
