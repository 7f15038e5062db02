"""The prefill worker's shell: performs what its core decides with the engine, the data plane, bus and store.

A pass is one task; its end is an event. KV of shorts leaves layer by layer, called by the engine as each layer
is computed. Nothing here waits inside the mailbox except for the bus to take a message.

A share of a long is opened when its ranks have met (`GroupLinks.join`); from then on the engine computes with the
others, and rank 0's calls come in as events.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter
from typing import assert_never

from common.errors import StartupError
from common.logs import get_logger
from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.groups import Announcement
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished
from common.messages.requests import Prompt, TokensGenerated
from common.messages.sp import (
    RanksMet,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentNotSpilled,
    SegmentParted,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
    SegmentSpilled,
)
from common.metrics import TRANSFER_TAIL, TRANSFERS_FAILED, Metrics
from common.policy.prefill_events import (
    AbortHandoff,
    BreakShare,
    BrokeOff,
    CloseSequence,
    EnterGroup,
    FinishHandoff,
    ForgetKv,
    GroupCalled,
    HandoffFailed,
    HandoffFinished,
    MeetOthers,
    OpenFailed,
    OpenSequence,
    PassFailed,
    PassFinished,
    PassSegment,
    PassStopped,
    PlaceKv,
    PrefillCommand,
    PrefillLocalEvent,
    PrefillOrder,
    PrefillWorkerConfig,
    RestoreKv,
    ResumePass,
    RunPass,
    SampledToken,
    SequenceOpened,
    SequenceShare,
    SpillKv,
    StopMove,
    StopPass,
)
from common.policy.prefill_worker import PrefillWorkerCore
from common.runtime import subjects
from common.runtime.bus import Bus
from common.runtime.shell import JournalSink
from common.runtime.store import Store, StoreError
from common.runtime.supervisor import Supervisor
from common.settings import PrefillWorkerSettings
from common.units import Attempt, RequestId, WorkerId
from services.engine.collectives import GroupBroken, GroupKey, GroupLinks, GroupShare
from services.engine.data_plane import DataPlaneFactory, KvHeader, KvTrailer, PeerLost, TransferFailed
from services.engine.interface import EngineError, KvFull, PassResult, PrefillEngine, Segment
from services.prefill_worker.handoff import Handoff
from services.prefill_worker.moves import move_kv
from services.prefill_worker.open_links import OpenLinks
from services.worker.shell import WorkerPorts, WorkerShell, worker_id_of

log = get_logger(__name__)

TOKEN_BYTES = 4
"""A token id is a little-endian int32."""

GroupLinksFactory = Callable[[], GroupLinks]
"""Opens this worker's door for groups; called on the event loop. Raises: OSError, if the address is taken."""


class PromptUnreadable(Exception):
    """The bytes of a prompt are missing or are not what the request says."""


class PrefillWorker:
    """One per GPU (on CPU: one per process). `run` serves until `stop` (drains, says farewell) or until
    cancelled (as if killed). `groups`: how it meets the other ranks of a group; None: it serves longs alone."""

    def __init__(
        self,
        settings: PrefillWorkerSettings,
        bus: Bus,
        store: Store,
        engine: PrefillEngine,
        data_plane: DataPlaneFactory,
        *,
        groups: GroupLinksFactory | None = None,
        journal: JournalSink | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        measured = Metrics("prefill-worker") if metrics is None else metrics
        self.settings = settings
        self.worker_id = worker_id_of("prefill", settings)
        self.core = PrefillWorkerCore(config_of(settings, self.worker_id, engine))
        self._store = store
        self._engine = engine
        self._shell: WorkerShell[PrefillOrder | PrefillLocalEvent, PrefillCommand] = WorkerShell(
            "prefill",
            self.worker_id,
            settings,
            WorkerPorts(bus, store, engine, data_plane),
            self.core,
            self._perform,
            orders=PrefillOrder,
            group_address=lambda: self._groups.address if self._groups is not None else "",
            journal=journal,
            metrics=measured,
        )
        self.incarnation = self._shell.incarnation
        self._open_groups = groups
        self._groups: GroupLinks | None = None
        self._links = OpenLinks(self._shell.spawn, self._shell.tell)
        self._joining: dict[RequestId, asyncio.Event] = {}
        """Of sequences whose ranks meet: set, if these are waited for no more."""
        self._handoffs: dict[RequestId, Handoff] = {}
        self._pass_id: int | None = None
        self._tail_s = measured.histogram(TRANSFER_TAIL)
        self._failed_handoffs = measured.counter(TRANSFERS_FAILED)

    def __repr__(self) -> str:
        return f"PrefillWorker({self.worker_id!r}, {self.core!r})"

    async def run(self) -> None:
        """Raises: StartupError, if an address cannot be bound; whatever ends the core."""
        try:
            self._groups = None if self._open_groups is None else self._open_groups()
        except OSError as error:
            raise StartupError(
                f"cannot listen on {self.settings.data_host} for groups: {error.strerror}; pass another --data-host"
            ) from error
        try:
            await self._shell.run(None)
        finally:
            self._links.close()
            if self._groups is not None:
                await self._groups.close()

    def stop(self) -> None:
        """Drain and leave; `run` returns when that is done."""
        self._shell.stop()

    async def started(self) -> None:
        """Wait until it hears orders."""
        await self._shell.started()

    # --- performing ---

    async def _perform(self, commands: list[PrefillCommand]) -> None:
        for command in commands:
            match command:
                case TokensGenerated():
                    await self._shell.publish(subjects.router(command.router_id), command)
                case PrefillFinished() | PrefillFailed() | DecodeFinished() | DecodeFailed() | KvReleased():
                    await self._shell.publish(subjects.SCHEDULER, command)
                case (
                    SegmentLoaded()
                    | RanksMet()
                    | SegmentParted()
                    | SegmentRunning()
                    | SegmentPaused()
                    | SegmentSpilled()
                    | SegmentNotSpilled()
                    | SegmentPrefilled()
                    | SegmentFinished()
                    | SegmentFailed()
                    | SegmentDropped()
                ):
                    await self._shell.publish(subjects.COORDINATOR, command)
                case _:
                    self._begin(command)

    def _begin(
        self,
        command: OpenSequence
        | CloseSequence
        | RunPass
        | ResumePass
        | StopPass
        | BreakShare
        | MeetOthers
        | EnterGroup
        | FinishHandoff
        | AbortHandoff
        | SpillKv
        | RestoreKv
        | StopMove
        | PlaceKv
        | ForgetKv,
    ) -> None:
        match command:
            case RunPass(pass_id=pass_id, segments=segments, background=background):
                parts = [_segment(segment) for segment in segments]
                self._compute(pass_id, partial(self._engine.run, parts, background=background))
            case ResumePass(pass_id=pass_id, request_id=request_id):
                self._compute(pass_id, partial(self._engine.resume, request_id))
            case StopPass(pass_id=pass_id):
                # After the pass's task had its first turn: before that the engine knows of no pass to stop.
                asyncio.get_running_loop().call_soon(self._stop_pass, pass_id)
            case BreakShare(request_id=request_id):
                self._break_share(request_id)
            case MeetOthers():
                self._links.meet_others(self._groups, command)
            case EnterGroup():
                self._enter_group(command)
            case OpenSequence():
                self._open(command)
            case CloseSequence(request_id=request_id):
                self._engine.close(request_id)
                self._handoffs.pop(request_id, None)
                self._links.forget(request_id)
            case FinishHandoff(request_id=request_id):
                finishing = self._finish_handoff(command, self._handoffs[request_id])
                self._shell.spawn(finishing, name=f"handoff {request_id}")
            case AbortHandoff(request_id=request_id):
                # The end of the stream may be in the mailbox already: then the sequence is closed before this runs.
                aborting = self._abort_handoff(command, self._handoffs[request_id])
                self._shell.spawn(aborting, name=f"abort {request_id}")
            case SpillKv() | RestoreKv():
                self._shell.spawn(self._move(command), name=f"move {command.request_id}")
            case StopMove(request_id=request_id):
                # After the move's task had its first turn, as for a pass.
                asyncio.get_running_loop().call_soon(self._engine.stop_move, request_id)
            case PlaceKv(location=location):
                self._shell.keep_location(location)
            case ForgetKv(request_id=request_id):
                self._shell.forget_location(request_id)
            case _:
                assert_never(command)

    # --- sequences ---

    def _open(self, command: OpenSequence) -> None:
        prompt = command.spec.prompt
        if command.share is not None:
            leave = self._joining[command.spec.request_id] = asyncio.Event()
            self._shell.spawn(self._join(command, command.share, leave), name=f"join {command.spec.request_id}")
        elif prompt.inline is not None:
            self._reserve(command, prompt.inline)
        else:
            self._shell.spawn(self._fetch(command), name=f"fetch {command.spec.request_id}")

    async def _fetch(self, command: OpenSequence) -> None:
        data = await self._prompt_of(command)
        if data is not None:
            self._reserve(command, data)

    async def _prompt_of(self, command: OpenSequence) -> bytes | None:
        """None: it is not to be had, and that has been said."""
        prompt = command.spec.prompt
        if prompt.inline is not None:
            return prompt.inline
        try:
            data = await self._store.get(prompt.key) if prompt.key is not None else None
        except StoreError as error:
            self._open_failed(command, f"the prompt could not be fetched: {error}")
            return None
        if data is None:
            self._open_failed(command, "the prompt is not in the store (any more)")
        return data

    async def _join(self, command: OpenSequence, share: SequenceShare, leave: asyncio.Event) -> None:
        """Meet the other ranks, then open this rank's share; unless told, at any time, to wait for them no more."""
        try:
            async with Supervisor() as tasks:
                meeting = tasks.spawn(self._meet(command, share), name="meeting")
                leaving = tasks.spawn(leave.wait(), name="leaving")
                await asyncio.wait([meeting, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._joining[command.spec.request_id]
        if meeting.cancelled():
            self._open_failed(command, "given up while its ranks had not met")

    async def _meet(self, command: OpenSequence, share: SequenceShare) -> None:
        if self._groups is None:
            self._open_failed(command, "this worker serves longs alone", retryable=False)
            return
        data = await self._prompt_of(command)
        if data is None:
            return
        spec = command.spec
        key = GroupKey(request_id=spec.request_id, attempt=spec.attempt, growth=share.growth)
        try:
            link = await self._groups.join(key, share.rank, share.addresses)
        except GroupBroken as error:
            self._open_failed(command, str(error))
            return
        self._links.put(spec.request_id, link)
        self._reserve(command, data)
        if self._links.get(spec.request_id) is None:
            link.close()

    def _break_share(self, request_id: RequestId) -> None:
        link = self._links.get(request_id)
        if link is not None:
            link.abort()
        elif request_id in self._joining:
            self._joining[request_id].set()

    def _reserve(self, command: OpenSequence, prompt: bytes) -> None:
        spec = command.spec
        handoff = self._handoff_of(command)
        try:
            token_ids = _token_ids(spec.prompt, prompt)
            self._open_in_engine(command, token_ids, handoff)
        except KvFull as error:
            self._open_failed(command, str(error))
            return
        except (EngineError, PromptUnreadable) as error:
            self._open_failed(command, str(error), retryable=False)
            return
        if handoff is not None:
            self._handoffs[spec.request_id] = handoff
        self._shell.tell(SequenceOpened(request_id=spec.request_id, attempt=spec.attempt))

    def _open_in_engine(self, command: OpenSequence, token_ids: list[int], handoff: Handoff | None) -> None:
        """Raises: KvFull, EngineError."""
        spec, part = command.spec, command.share
        if part is None:
            self._engine.open(spec, token_ids, None if handoff is None else handoff.push)
            return
        link = self._links.get(spec.request_id)
        assert link is not None  # its ranks have met
        share = GroupShare(rank=part.rank, size=len(part.addresses), scheme=part.scheme, link=link)
        self._engine.open_share(spec, token_ids, share, partial(self._called, spec.attempt))
        self._links.watch(link, spec.request_id, spec.attempt)

    def _enter_group(self, command: EnterGroup) -> None:
        share = self._links.enter(command)
        if share is not None:
            self._engine.regroup(command.request_id, share, partial(self._called, command.attempt))
            self._links.watch(share.link, command.request_id, command.attempt)

    def _called(self, attempt: Attempt, request_id: RequestId, announcement: Announcement) -> None:
        self._shell.tell(GroupCalled(request_id=request_id, attempt=attempt, announcement=announcement))

    def _open_failed(self, command: OpenSequence, reason: str, *, retryable: bool = True) -> None:
        spec = command.spec
        self._links.drop(spec.request_id)
        self._shell.tell(
            OpenFailed(request_id=spec.request_id, attempt=spec.attempt, reason=reason, retryable=retryable)
        )

    def _handoff_of(self, command: OpenSequence) -> Handoff | None:
        if command.handoff is None:
            return None
        spec, profile = command.spec, self._engine.profile
        header = KvHeader(
            request_id=spec.request_id,
            attempt=spec.attempt,
            sender=self.worker_id,
            model_fingerprint=profile.model_fingerprint,
            layers=profile.layers,
            tokens=spec.prompt.tokens,
        )
        return Handoff(self._shell.data_plane, command.handoff.address, header)

    # --- passes ---

    def _compute(self, pass_id: int, compute: Callable[[], Awaitable[PassResult]]) -> None:
        self._pass_id = pass_id
        self._shell.spawn(self._await_pass(pass_id, compute), name=f"pass {pass_id}")

    async def _await_pass(self, pass_id: int, compute: Callable[[], Awaitable[PassResult]]) -> None:
        try:
            result = await compute()
        except EngineError as error:
            if isinstance(error, GroupBroken):  # somebody else's fault: no trace of it leads anywhere
                log.warning("a pass failed: its group broke", request_ids=self._in_pass(), error=str(error))
            else:
                log.error("a pass failed", request_ids=self._in_pass(), error=str(error), exc_info=error)
            self._pass_ended(PassFailed(pass_id=pass_id, reason=str(error)))
            return
        if (lost := result.broken_off) is not None:
            log.warning("a pass goes on without a group that broke", request_id=lost.request_id, error=lost.reason)
            self._shell.tell(BrokeOff(pass_id=pass_id, request_id=lost.request_id, reason=lost.reason))
        if not result.finished:
            self._pass_ended(PassStopped(pass_id=pass_id, steps_done=result.steps_done, compute_s=result.compute_s))
            return
        sampled = tuple(
            SampledToken(request_id=drawn.request_id, token_id=drawn.token_id, logprob=drawn.logprob)
            for drawn in result.sampled
        )
        self._pass_ended(
            PassFinished(
                pass_id=pass_id,
                sampled=sampled,
                compute_s=result.compute_s,
                last_layer_computed_s=result.last_layer_computed_s,
            )
        )

    def _in_pass(self) -> list[RequestId]:
        running = self.core.books.running
        return [] if running is None else [segment.request_id for segment in running.segments]

    def _pass_ended(self, event: PassFinished | PassStopped | PassFailed) -> None:
        self._pass_id = None
        self._shell.tell(event)

    def _stop_pass(self, pass_id: int) -> None:
        if self._pass_id == pass_id:
            self._engine.stop()

    async def _move(self, command: SpillKv | RestoreKv) -> None:
        self._shell.tell(await move_kv(self._engine, command))

    # --- handoffs ---

    async def _finish_handoff(self, command: FinishHandoff, handoff: Handoff) -> None:
        trailer = KvTrailer(first_token=command.first_token, first_logprob=command.first_logprob)
        request_id, attempt = command.request_id, command.attempt
        begun_s = perf_counter()
        try:
            await handoff.finish(trailer)
        except TransferFailed as error:
            self._failed_handoffs.inc()
            log.warning("a handoff failed", request_id=request_id, attempt=attempt, error=str(error))
            lost = isinstance(error, PeerLost)
            failed = HandoffFailed(request_id=request_id, attempt=attempt, reason=str(error), peer_lost=lost)
            self._shell.tell(failed)
            return
        self._tail_s.observe(perf_counter() - begun_s)
        self._shell.tell(HandoffFinished(request_id=request_id, attempt=attempt))

    async def _abort_handoff(self, command: AbortHandoff, handoff: Handoff) -> None:
        finishing = handoff.finishing
        await handoff.abort()
        if not finishing:  # else whoever finishes it hears of the abort, and tells
            self._shell.tell(HandoffFailed(request_id=command.request_id, attempt=command.attempt, reason="aborted"))


def config_of(settings: PrefillWorkerSettings, worker_id: WorkerId, engine: PrefillEngine) -> PrefillWorkerConfig:
    profile = engine.profile
    return PrefillWorkerConfig(
        worker_id=worker_id,
        layers=profile.layers,
        step_cost=profile.step_cost,
        layer=profile.layer,
        chunk_tokens=settings.chunk_tokens,
        step_s_max=settings.step_ms_max / 1e3,
        batch_tokens_max=settings.batch_tokens_max,
        colocated_tokens_max=settings.colocated_tokens_max,
        long_itl_s_max=settings.long_itl_ms_max / 1e3,
        rows_max=profile.rows_max,
    )


def _segment(segment: PassSegment) -> Segment:
    return Segment(segment.request_id, segment.start, segment.tokens, segment.sample, segment.gathers)


def _token_ids(prompt: Prompt, data: bytes) -> list[int]:
    """Raises: PromptUnreadable."""
    if len(data) != prompt.tokens * TOKEN_BYTES:
        raise PromptUnreadable(f"{len(data)} bytes for a prompt of {prompt.tokens} tokens")
    ids = array("i", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
