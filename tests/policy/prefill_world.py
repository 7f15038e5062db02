"""A prefill worker's surroundings in memory: it keeps what the core ordered and answers when the test says so.

It refuses, as an engine would, whatever breaks the engine's contract, and counts what was computed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from common.messages.base import Message
from common.messages.cluster import StepCost
from common.messages.prefill import RunPrefill
from common.messages.requests import Prompt, RequestSpec, TokensGenerated
from common.messages.sp import LoadSegment, SegmentPart
from common.policy.core import TimePassed
from common.policy.prefill_events import (
    AbortHandoff,
    BreakShare,
    BrokeOff,
    CloseSequence,
    EnterGroup,
    FinishHandoff,
    ForgetKv,
    HandoffFailed,
    HandoffFinished,
    KvRestored,
    KvSpilled,
    MeetOthers,
    OpenFailed,
    OpenSequence,
    PassFailed,
    PassFinished,
    PassSegment,
    PassStopped,
    PlaceKv,
    PrefillCommand,
    PrefillEvent,
    PrefillWorkerConfig,
    RestoreFailed,
    RestoreKv,
    ResumePass,
    RunPass,
    SampledToken,
    SequenceOpened,
    SpillFailed,
    SpillKv,
    StopMove,
    StopPass,
)
from common.policy.prefill_worker import PrefillWorkerCore
from common.units import RequestId, RouterId, WorkerId

WORKER = WorkerId("p0")
LAYERS = 4
STOP_TOKEN = 2
PLAIN_TOKEN = 7


def config(**changes: object) -> PrefillWorkerConfig:
    values: dict[str, object] = {
        "worker_id": WORKER,
        "layers": LAYERS,
        "step_cost": StepCost(pass_s=0.0, token_s=1e-6, pair_s=0.0),
        "chunk_tokens": 512,
        "step_s_max": 1.0,
        "batch_tokens_max": 512,
        "colocated_tokens_max": 192,
    }
    return PrefillWorkerConfig(**(values | changes))  # type: ignore[arg-type]


def spec(name: str, tokens: int, *, max_tokens: int = 16, attempt: int = 0, generated_before: int = 0) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        attempt=attempt,
        router_id=RouterId("r0"),
        prompt=Prompt(tokens=tokens, inline=b""),
        max_tokens=max_tokens,
        stop_token_ids=(STOP_TOKEN,),
        generated_before=generated_before,
    )


def run_prefill(request: RequestSpec, epoch: int = 1, *, here: bool = False, exclusive: bool = False) -> RunPrefill:
    """`here`: it decodes where it prefills."""
    return RunPrefill(
        worker_id=WORKER,
        spec=request,
        decode_worker_id=WORKER if here else WorkerId("d0"),
        decode_address="" if here else "host:1",
        exclusive=exclusive,
        epoch=epoch,
    )


def load(request: RequestSpec, epoch: int = 1) -> LoadSegment:
    return LoadSegment(
        worker_id=WORKER,
        spec=request,
        rank=0,
        members=(WORKER,),
        parts=(SegmentPart(start=0, tokens=request.prompt.tokens),),
        epoch=epoch,
    )


class Group(Protocol):
    """The other ranks, as an engine that computes shared sequences sees them."""

    def began(self, worker_id: WorkerId, segment: PassSegment, step: int) -> None: ...

    def broke(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None: ...

    def meets(self, worker_id: WorkerId, order: MeetOthers) -> None: ...

    def entered(self, worker_id: WorkerId, order: EnterGroup) -> None: ...

    def left(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None: ...


@dataclass(eq=False)
class Held:
    spec: RequestSpec
    rank: int = 0
    shared: bool = False
    may_gather: bool = False
    gone: bool = False
    """To rank 0, which goes on alone."""
    computed: int = 0
    known: int = 0
    came_at: int = 0
    """Into its group, when so much had been computed."""
    in_stopped_pass: bool = False
    away: bool = False
    """Its KV is elsewhere, or on its way there or back."""


@dataclass(eq=False)
class Pass:
    segments: list[PassSegment]
    steps_done: int = 0


@dataclass(eq=False)
class World:
    core: PrefillWorkerCore = field(default_factory=lambda: PrefillWorkerCore(config()))
    now_s: float = 0.0
    auto_open: bool = True
    group: Group | None = None
    opening: dict[RequestId, OpenSequence] = field(default_factory=dict)
    leaving: set[RequestId] = field(default_factory=set)
    """Of those: shared, and the other ranks are waited for no more."""
    held: dict[RequestId, Held] = field(default_factory=dict)
    moving: dict[RequestId, SpillKv | RestoreKv] = field(default_factory=dict)
    unwanted: set[RequestId] = field(default_factory=set)
    """Of those: told to end."""
    streams: set[RequestId] = field(default_factory=set)
    """Handoffs whose end is awaited."""
    pass_id: int | None = None
    running: Pass | None = None
    stop_asked: bool = False
    stopped: list[Pass] = field(default_factory=list)
    broken_off: RequestId | None = None
    """The shared sequence that the running pass goes on without."""
    located: dict[RequestId, PlaceKv] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    """All messages, oldest first."""
    passes: list[tuple[PassSegment, ...]] = field(default_factory=list)
    in_background: list[bool] = field(default_factory=list)
    """Of each pass."""
    shorts: dict[tuple[RequestId, int], RunPrefill] = field(default_factory=dict)
    """Every short ever ordered, by request and attempt."""
    computed: Counter[tuple[RequestId, int, int, int]] = field(default_factory=Counter)
    """How often each (request, attempt, layer, position) was computed."""

    @property
    def worker_id(self) -> WorkerId:
        return self.core.books.config.worker_id

    def tell(self, event: PrefillEvent) -> list[PrefillCommand]:
        """Hand an event in, perform what comes out, answer openings at once if `auto_open`."""
        if isinstance(event, RunPrefill):
            self.shorts[event.spec.request_id, event.spec.attempt] = event
        commands = self.core.handle(event, self.now_s)
        for command in commands:
            self._perform(command)
        self.core.check()
        if self.auto_open:
            for request_id in list(self.opening):
                if request_id in self.opening:
                    self.opened(request_id)
        return commands

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self.tell(TimePassed())

    def of(self, *kinds: type[Message]) -> list[Message]:
        return [message for message in self.sent if isinstance(message, kinds)]

    # --- answers ---

    def opened(self, request_id: RequestId) -> None:
        command = self.opening.pop(request_id)
        self.leaving.discard(request_id)
        assert request_id not in self.held, "opened twice"
        share = command.share
        held = Held(command.spec)
        if share is not None:
            held.rank, held.shared, held.may_gather = share.rank, True, share.scheme.gathers
        # A follower is not told what was drawn, nor need it be.
        held.known = command.spec.prompt.tokens + (command.spec.max_tokens if held.rank else 0)
        self.held[request_id] = held
        self.tell(SequenceOpened(request_id=request_id, attempt=command.spec.attempt))

    def open_failed(self, request_id: RequestId) -> None:
        command = self.opening.pop(request_id)
        self.leaving.discard(request_id)
        self.tell(OpenFailed(request_id=request_id, attempt=command.spec.attempt, reason="no room"))

    def step(self, token: int = PLAIN_TOKEN) -> None:
        """One layer of the running pass; then it ends if it is complete or was asked to stop."""
        assert self.running is not None
        for segment in self.running.segments:
            attempt = self.held[segment.request_id].spec.attempt
            for position in range(segment.start, segment.start + segment.tokens):
                self.computed[segment.request_id, attempt, self.running.steps_done, position] += 1
        self.running.steps_done += 1
        if self.running.steps_done == LAYERS:
            self._finish(token)
        elif self.stop_asked:
            self.stop_here()

    def finish(self, token: int = PLAIN_TOKEN) -> None:
        """Compute until the running pass ends; a stop asked for is not heard."""
        self.stop_asked = False
        before = self.running
        while self.running is before and before is not None and before.steps_done < LAYERS:
            self.step(token)

    def stop_here(self) -> None:
        """The pass ends between two steps."""
        ended, pass_id = self._end_pass()
        self.stopped.append(ended)
        for segment in ended.segments:
            self.held[segment.request_id].in_stopped_pass = True
        self._tell_broken_off(pass_id)
        self.tell(PassStopped(pass_id=pass_id, steps_done=ended.steps_done, compute_s=0.1))

    def break_off(self) -> None:
        """The group of the shared sequence in the running pass broke."""
        assert self.running is not None
        (shared,) = (s.request_id for s in self.running.segments if self.held[s.request_id].shared)
        if len(self.running.segments) == 1:
            self.fail_pass()
            return
        self.running.segments = [segment for segment in self.running.segments if segment.request_id != shared]
        self.broken_off = shared

    def _tell_broken_off(self, pass_id: int) -> None:
        if self.broken_off is not None:
            event = BrokeOff(pass_id=pass_id, request_id=self.broken_off, reason="a rank is gone")
            self.broken_off = None
            self.tell(event)

    def fail_pass(self) -> None:
        _, pass_id = self._end_pass()
        self.tell(PassFailed(pass_id=pass_id, reason="broken"))

    def handoff(self, request_id: RequestId, *, failed: bool = False) -> None:
        self.streams.remove(request_id)
        attempt = self.held[request_id].spec.attempt
        if failed:
            self.tell(HandoffFailed(request_id=request_id, attempt=attempt, reason="peer gone"))
        else:
            self.tell(HandoffFinished(request_id=request_id, attempt=attempt))

    def moved(self, request_id: RequestId, *, failed: bool = False) -> None:
        """One that is not wanted any more fails, unless it was just done."""
        command = self.moving.pop(request_id)
        self.unwanted.discard(request_id)
        out = isinstance(command, SpillKv)
        self.held[request_id].away = out != failed
        about = {"request_id": request_id, "attempt": command.attempt}
        if failed:
            self.tell(SpillFailed(reason="full", **about) if out else RestoreFailed(reason="broken", **about))
        else:
            self.tell(KvSpilled(kv_bytes=1, moved_to="disk", **about) if out else KvRestored(**about))

    def settle(self, token: int = PLAIN_TOKEN) -> None:
        """Answer everything, successfully, until nothing is under way."""
        for _ in range(10_000):
            if self.moving:
                self.moved(next(iter(self.moving)))
            elif self.opening:
                self.opened(next(iter(self.opening)))
            elif self.running is not None:
                self.step(token)
            elif self.streams:
                self.handoff(next(iter(self.streams)))
            else:
                return
        raise AssertionError("it never comes to rest")

    def _end_pass(self) -> tuple[Pass, int]:
        assert self.running is not None
        assert self.pass_id is not None
        ended, pass_id = self.running, self.pass_id
        self.running = self.pass_id = None
        self.stop_asked = False
        return ended, pass_id

    def _finish(self, token: int) -> None:
        ended, pass_id = self._end_pass()
        sampled = []
        for segment in ended.segments:
            held = self.held[segment.request_id]
            held.computed += segment.tokens
            if segment.gathers:
                assert held.shared
                assert held.may_gather
                assert held.computed <= held.spec.prompt.tokens
                held.shared, held.gone = held.rank > 0, held.rank > 0
            if segment.sample:
                held.known += 1
                sampled.append(SampledToken(request_id=segment.request_id, token_id=token))
        self._tell_broken_off(pass_id)
        self.tell(
            PassFinished(pass_id=pass_id, sampled=tuple(sampled), compute_s=0.1, last_layer_computed_s=self.now_s)
        )

    # --- performing ---

    def _perform(self, command: PrefillCommand) -> None:
        match command:
            case OpenSequence():
                assert command.spec.request_id not in self.opening
                order = self.shorts.get((command.spec.request_id, command.spec.attempt))
                elsewhere = order is not None and order.decode_worker_id != self.worker_id
                elsewhere = elsewhere and command.spec.max_tokens > 1
                assert (command.handoff is not None) == elsewhere
                self.opening[command.spec.request_id] = command
            case RunPass():
                self._run(command)
            case ResumePass(pass_id=pass_id, request_id=request_id):
                self._require_idle()
                found = [p for p in self.stopped if any(s.request_id == request_id for s in p.segments)]
                assert len(found) == 1, "resumed what was not stopped"
                self.stopped.remove(found[0])
                for segment in found[0].segments:
                    self.held[segment.request_id].in_stopped_pass = False
                    assert not self.held[segment.request_id].away
                self.running, self.pass_id = found[0], pass_id
                self._tell_group(found[0])
            case StopPass(pass_id=pass_id):
                assert self.pass_id == pass_id
                assert self.running is not None
                assert all(self.held[s.request_id].rank == 0 for s in self.running.segments), "rank 0 stops a group"
                self.stop_asked = True
            case BreakShare(request_id=request_id, attempt=attempt):
                assert self.group is not None
                if request_id in self.opening:
                    self.leaving.add(request_id)
                    return
                assert self.running is not None
                assert any(segment.request_id == request_id for segment in self.running.segments)
                self.group.broke(self.worker_id, request_id, attempt)
            case MeetOthers():
                assert self.group is not None
                self.group.meets(self.worker_id, command)
            case EnterGroup():
                self._enter(command)
            case CloseSequence(request_id=request_id):
                self._close(request_id)
            case FinishHandoff(request_id=request_id):
                self.streams.add(request_id)
            case AbortHandoff(request_id=request_id):
                self.streams.add(request_id)
            case SpillKv(request_id=request_id) | RestoreKv(request_id=request_id):
                assert request_id not in self.moving
                assert self.held[request_id].away == isinstance(command, RestoreKv)
                assert not (self.running and any(part.request_id == request_id for part in self.running.segments))
                self.held[request_id].away = True
                self.moving[request_id] = command
            case StopMove(request_id=request_id):
                assert request_id in self.moving
                assert request_id not in self.unwanted
                self.unwanted.add(request_id)
            case PlaceKv():
                assert command.location.request_id in self.held
                self.located[command.location.request_id] = command
            case ForgetKv(request_id=request_id):
                self.located.pop(request_id, None)
            case _:
                self.sent.append(command)

    def _run(self, command: RunPass) -> None:
        self._require_idle()
        names = [segment.request_id for segment in command.segments]
        assert len(set(names)) == len(names) > 0
        for segment in command.segments:
            held = self.held[segment.request_id]
            assert segment.start == held.computed
            assert 0 < segment.tokens <= held.known - held.computed
            assert segment.sample == (segment.start + segment.tokens == held.known and held.rank == 0)
            assert not held.in_stopped_pass
            assert not held.away
            assert not held.gone
        orders = [self.shorts.get((s.request_id, self.held[s.request_id].spec.attempt)) for s in command.segments]
        long_decodes = any(
            order is None and segment.start >= self.held[segment.request_id].spec.prompt.tokens
            for order, segment in zip(orders, command.segments, strict=True)
        )
        for order, segment in zip(orders, command.segments, strict=True):
            prefills = segment.start < self.held[segment.request_id].spec.prompt.tokens
            assert not (order is not None and order.exclusive and prefills and long_decodes), "not exclusive"
        assert sum(self.held[segment.request_id].shared for segment in command.segments) <= 1
        self.running, self.pass_id = Pass(list(command.segments)), command.pass_id
        self._tell_group(self.running)
        self.passes.append(command.segments)
        self.in_background.append(command.background)

    def _enter(self, command: EnterGroup) -> None:
        assert self.group is not None
        held = self.held[command.request_id]
        assert not held.in_stopped_pass
        assert self.running is None or all(s.request_id != command.request_id for s in self.running.segments)
        assert held.computed in (command.start, 0), "a newcomer, or one that has done what the group has"
        assert len(command.kept) == command.size
        assert sum(command.kept) == command.start
        assert command.kept[command.rank] > 0 or held.computed in (0, held.came_at), "only a newcomer keeps nothing yet"
        held.came_at = held.came_at if held.computed else command.start
        held.rank, held.shared, held.computed = command.rank, True, command.start
        held.may_gather = command.scheme.gathers
        self.group.entered(self.worker_id, command)

    def _tell_group(self, begun: Pass) -> None:
        for segment in begun.segments:
            if self.held[segment.request_id].shared:
                assert self.group is not None
                self.group.began(self.worker_id, segment, begun.steps_done)

    def _close(self, request_id: RequestId) -> None:
        assert request_id not in self.moving, "closed while its KV is moved"
        assert request_id in self.held
        assert request_id not in self.streams, "closed while its KV was being sent"
        assert self.running is None or all(s.request_id != request_id for s in self.running.segments)
        if self.held[request_id].shared:
            assert self.group is not None
            self.group.left(self.worker_id, request_id, self.held[request_id].spec.attempt)
        del self.held[request_id]
        for stopped in self.stopped:
            stopped.segments = [s for s in stopped.segments if s.request_id != request_id]
        self.stopped = [stopped for stopped in self.stopped if stopped.segments]

    def _require_idle(self) -> None:
        assert self.running is None, "two passes at a time"

    # --- at the end of a test ---

    def require_empty(self) -> None:
        assert self.core.idle
        assert not self.held
        assert not self.located
        assert not self.stopped
        assert not self.core.holdings()

    def tokens_of(self, name: str) -> list[tuple[int, int]]:
        """(output index, token id) in the order sent."""
        return [
            (chunk.index + offset, token_id)
            for message in self.sent
            if isinstance(message, TokensGenerated)
            for chunk in message.chunks
            if chunk.request_id == name
            for offset, token_id in enumerate(chunk.token_ids)
        ]

    def started(self) -> list[RequestId]:
        """Shorts in the order in which passes took their first tokens."""
        shorts = {request_id for request_id, _ in self.shorts}
        begun = (s.request_id for segments in self.passes for s in segments if s.start == 0)
        return [request_id for request_id in begun if request_id in shorts]
