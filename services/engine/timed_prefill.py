"""A prefill engine that answers at the speed of a cost model; see `timed_language.py`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

from common.messages.requests import RequestSpec
from common.policy.sp_shares import kv_of_rank
from common.units import RequestId
from services.engine.collectives import GroupBroken, GroupLink, GroupShare, OnCalled, StepRecalled
from services.engine.interface import (
    BrokenOff,
    EngineError,
    EngineProfile,
    KvFull,
    KvSink,
    LayerKv,
    PassResult,
    Sampled,
    Segment,
    Spilled,
)
from services.engine.shared_sequence import SharedSequence
from services.engine.timed_group import TimedGroup
from services.engine.timed_language import (
    START,
    STATE_BYTES,
    TimedShape,
    chain,
    mask_of,
    masked,
    now_s,
    require_valid,
    sampled_token,
    sleep_until,
)
from services.engine.timed_spill import TimedMover

PASS_ROWS_MAX = 64
"""Segments in one pass of a prefill engine."""


@dataclass(slots=True, eq=False)
class _Sequence:
    spec: RequestSpec
    token_ids: list[int]
    """The prompt, then what was sampled."""
    sink: KvSink | None
    kv_reserved: int
    computed: int = 0
    state: int = START
    buffers: list[list[bytearray]] = field(default_factory=list)
    """[layers][2 * kv_heads] of [prompt tokens * STATE_BYTES]; empty without a sink: nobody reads them."""
    group: TimedGroup | None = None
    """Set if a group of workers computes it."""
    parted: GroupLink | None = None
    """Of the group that prefilled it, when this worker has gathered all its KV."""


@dataclass(slots=True, eq=False)
class _Pass:
    segments: list[Segment]
    step_s: float
    states: dict[RequestId, bytes]
    """Of each segment: its tokens' states, as KV carries them."""
    fails: bool
    steps_done: int = 0
    recalled: int = 0
    """The step taken back last: it is not a second time, nor is the first."""
    group: TimedGroup | None = None
    """Of the shared sequence in it."""


class TimedPrefillEngine:
    """A `PrefillEngine` whose steps take the time that `StepCost` names. `tally`: for tests, fill `computed_tokens`."""

    def __init__(self, shape: TimedShape, *, tally: bool = True) -> None:
        self.shape = shape
        self.computed_tokens: Counter[tuple[RequestId, int]] = Counter()
        """How often each (request, position) went through a whole pass. It grows without end."""
        self._tally = tally
        self.passes_started = 0
        self.stops = 0
        self._profile = shape.profile(rows_max=PASS_ROWS_MAX)
        self._sequences: dict[RequestId, _Sequence] = {}
        self._stopped: list[_Pass] = []
        self._running: _Pass | None = None
        self._stop_asked = False
        self._mover = TimedMover(shape)

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    @property
    def kv_used_tokens(self) -> int:
        return sum(sequence.kv_reserved for sequence in self._sequences.values())

    def open(self, spec: RequestSpec, token_ids: Sequence[int], sink: KvSink | None) -> None:
        require_valid(spec, token_ids, self.shape, already=spec.request_id in self._sequences)
        need = len(token_ids) if sink is not None else spec.kv_tokens
        self._require_room(spec, need)
        sequence = _Sequence(spec=spec, token_ids=list(token_ids), sink=sink, kv_reserved=need)
        if sink is not None:
            size = len(token_ids) * STATE_BYTES
            heads = range(2 * self.shape.kv_heads)
            sequence.buffers = [[bytearray(size) for _ in heads] for _ in range(self.shape.layers)]
        self._sequences[spec.request_id] = sequence

    def open_share(self, spec: RequestSpec, token_ids: Sequence[int], share: GroupShare, on_called: OnCalled) -> None:
        require_valid(spec, token_ids, self.shape, already=spec.request_id in self._sequences)
        need = kv_of_rank(share.scheme, share.size, share.rank, spec.kv_tokens, self._profile.layer)
        self._require_room(spec, need)
        shared = SharedSequence(share, len(token_ids), spec.kv_tokens)
        self._sequences[spec.request_id] = _Sequence(spec, list(token_ids), None, need, group=TimedGroup(shared))
        shared.listen(spec.request_id, on_called)

    def regroup(self, request_id: RequestId, share: GroupShare, on_called: OnCalled) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise EngineError(f"{request_id} is not open")
        former = sequence.parted if sequence.group is None else sequence.group.link
        if self._stopped_with(request_id) is not None or (sequence.computed != share.base and former is not share.link):
            raise EngineError(
                f"{request_id} has {sequence.computed} tokens computed, not {share.base}, or is in a pass"
            )
        shared = SharedSequence(share, sequence.spec.prompt.tokens, sequence.spec.kv_tokens)
        sequence.group, sequence.parted, sequence.computed = TimedGroup(shared), None, share.base
        sequence.state = reduce(chain, sequence.token_ids[: share.base], START)
        shared.listen(request_id, on_called)
        if former is not None and former is not share.link:
            former.close()

    async def run(self, segments: Sequence[Segment], *, background: bool = False) -> PassResult:
        self._require_idle()
        for segment in segments:
            self._require_runnable(segment)
        if not segments or len({segment.request_id for segment in segments}) != len(segments):
            raise EngineError("a pass takes one segment of each of one or more sequences")
        if len(segments) > PASS_ROWS_MAX:
            raise EngineError(f"a pass of {len(segments)} segments; at most {PASS_ROWS_MAX} are allowed")
        group = self._group_of(segments)
        fails = self.passes_started == self.shape.fail_at_pass
        self.passes_started += 1
        started = _Pass(
            segments=list(segments),
            step_s=self._pass_s(segments) / self.shape.layers,
            states={segment.request_id: self._states_of(segment) for segment in segments},
            fails=fails,
            group=group,
        )
        return await self._advance(started)

    async def resume(self, request_id: RequestId) -> PassResult:
        self._require_idle()
        self._mover.require_here(request_id)
        stopped = self._stopped_with(request_id)
        if stopped is None:
            raise EngineError(f"no stopped pass contains {request_id}")
        self._stopped.remove(stopped)
        return await self._advance(stopped)

    def stop(self) -> None:
        if self._running is not None:
            self._stop_asked = True

    def close(self, request_id: RequestId) -> None:
        if self._runs(request_id):
            raise EngineError(f"a pass with {request_id} runs")
        self._mover.forget(request_id)
        sequence = self._sequences.pop(request_id, None)
        link = None if sequence is None else sequence.parted if sequence.group is None else sequence.group.link
        if link is not None:
            link.close()
        stopped = self._stopped_with(request_id)
        if stopped is not None:
            stopped.segments = [segment for segment in stopped.segments if segment.request_id != request_id]
            if sequence is not None and stopped.group is sequence.group:
                stopped.group = None
            if not stopped.segments:
                self._stopped.remove(stopped)

    async def spill(self, request_id: RequestId) -> Spilled:
        stopped = self._stopped_with(request_id)
        if request_id not in self._sequences or self._runs(request_id) or (stopped and len(stopped.segments) > 1):
            raise EngineError(f"{request_id} is not open, or does not stand still alone")
        begun = stopped.segments[0].tokens if stopped else 0
        return await self._mover.move_out(self._sequences[request_id], begun)

    async def restore(self, request_id: RequestId) -> None:
        self._require_room(self._sequences[request_id].spec, self._mover.reserved(request_id))
        await self._mover.bring_back(self._sequences[request_id])

    def stop_move(self, request_id: RequestId) -> None:
        self._mover.stop(request_id)

    async def shutdown(self) -> None:
        self.stop()
        for sequence in self._sequences.values():
            if sequence.group is not None:
                sequence.group.link.abort()

    # --- inside ---

    async def _advance(self, work: _Pass) -> PassResult:
        begun_s, broken_off = now_s(), None
        self._running, self._stop_asked = work, False
        try:
            try:
                async with self._in_step(work):
                    stopped = await self._steps(work)
            except GroupBroken as error:
                broken_off = self._leave_group(work, error)
                if broken_off is None:
                    raise
                stopped = await self._steps(work)
            if stopped:
                return self._stop_here(work, begun_s, broken_off)
            return PassResult(
                finished=True,
                steps_done=work.steps_done,
                sampled=self._finish(work),
                compute_s=now_s() - begun_s,
                last_layer_computed_s=now_s(),
                broken_off=broken_off,
            )
        finally:
            self._running = None

    def _leave_group(self, work: _Pass, error: GroupBroken) -> BrokenOff | None:
        """The shared sequence leaves the pass. None: there is nothing else in it."""
        shared = next(s.request_id for s in work.segments if self._sequences[s.request_id].group is not None)
        if len(work.segments) == 1:
            return None
        work.segments = [segment for segment in work.segments if segment.request_id != shared]
        work.group, work.step_s = None, self._pass_s(work.segments) / self.shape.layers
        return BrokenOff(shared, str(error))

    def _in_step(self, work: _Pass) -> AbstractAsyncContextManager[None]:
        """With the other ranks, if it has a shared sequence."""
        for segment in work.segments:
            group = self._sequences[segment.request_id].group
            if group is not None:
                return group.in_pass(segment, work.steps_done)
        return nullcontext()

    async def _steps(self, work: _Pass) -> bool:
        """Until the end or a stop. Returns whether it was stopped."""
        at_s = now_s()
        while work.steps_done < self.shape.layers:
            stop = False
            if work.group is not None:
                recallable = work.steps_done != work.recalled
                try:
                    stop = await work.group.begin_step(work.steps_done, self._stop_asked, recallable=recallable)
                except StepRecalled:
                    work.recalled = work.steps_done
                    return True
            at_s = (at_s if work.group is None else now_s()) + work.step_s  # others may have kept it waiting
            await sleep_until(at_s)
            if work.fails and work.steps_done >= self.shape.layers // 2:
                raise EngineError("failed as it was told to")
            if work.group is not None:
                await work.group.end_step(work.steps_done)
            self._emit_layer(work, work.steps_done)
            work.steps_done += 1
            if (self._stop_asked if work.group is None else stop) and work.steps_done < self.shape.layers:
                return True
        return False

    def _stop_here(self, work: _Pass, begun_s: float, broken_off: BrokenOff | None) -> PassResult:
        self.stops += 1
        self._stopped.append(work)
        ended_s = now_s()
        return PassResult(
            finished=False,
            steps_done=work.steps_done,
            sampled=(),
            compute_s=ended_s - begun_s,
            last_layer_computed_s=ended_s,
            broken_off=broken_off,
        )

    def _emit_layer(self, work: _Pass, layer: int) -> None:
        for segment in work.segments:
            sequence = self._sequences[segment.request_id]
            if sequence.sink is None:
                continue
            begin, end = segment.start * STATE_BYTES, (segment.start + segment.tokens) * STATE_BYTES
            states = work.states[segment.request_id]
            for number, buffer in enumerate(sequence.buffers[layer]):
                buffer[begin:end] = masked(states, mask_of(layer, number))
            views = tuple(memoryview(buffer)[begin:end] for buffer in sequence.buffers[layer])
            sequence.sink(LayerKv(layer=layer, start=segment.start, tokens=segment.tokens, buffers=views))

    def _finish(self, work: _Pass) -> tuple[Sampled, ...]:
        sampled: list[Sampled] = []
        for segment in work.segments:
            sequence = self._sequences[segment.request_id]
            sequence.computed = segment.start + segment.tokens
            sequence.state = _last_state(work.states[segment.request_id], sequence.state)
            if self._tally:
                self.computed_tokens.update((segment.request_id, position) for position in self._own(segment))
            if (group := sequence.group) is not None and group.leads and segment.gathers:
                sequence.parted, sequence.group = group.link, None
            if segment.sample:
                index = sequence.spec.generated_before + len(sequence.token_ids) - sequence.spec.prompt.tokens
                drawn = sampled_token(sequence.spec, index, sequence.state, self.shape)
                sequence.token_ids.append(drawn.token_id)
                sampled.append(drawn)
        return tuple(sampled)

    def _states_of(self, segment: Segment) -> bytes:
        """Of a shared sequence's tokens as far as they are known here: a follower does not know what was drawn."""
        sequence = self._sequences[segment.request_id]
        state, states = sequence.state, array("Q")
        for token_id in sequence.token_ids[segment.start : segment.start + segment.tokens]:
            state = chain(state, token_id)
            states.append(state)
        return states.tobytes()

    def _pass_s(self, segments: Sequence[Segment]) -> float:
        computes = any(self._own(segment) for segment in segments)
        return (self.shape.step_cost.pass_s if computes else 0.0) + sum(map(self._segment_s, segments))

    def _segment_s(self, segment: Segment) -> float:
        cost, group = self.shape.step_cost, self._sequences[segment.request_id].group
        pairs_s = cost.pair_s * segment.tokens * (segment.start + segment.tokens / 2)
        return cost.token_s * len(self._own(segment)) + (pairs_s if group is None else pairs_s / group.size)

    def _own(self, segment: Segment) -> range:
        """Positions that are computed here."""
        group = self._sequences[segment.request_id].group
        return range(segment.start, segment.start + segment.tokens) if group is None else group.own(segment)

    def _group_of(self, segments: Sequence[Segment]) -> TimedGroup | None:
        """Raises: EngineError (two shared sequences)."""
        groups = [self._sequences[segment.request_id].group for segment in segments]
        shared = [group for group in groups if group is not None]
        if len(shared) > 1:
            raise EngineError("a pass takes one sequence that a group shares: two could wait for each other")
        return shared[0] if shared else None

    def _require_room(self, spec: RequestSpec, need: int) -> None:
        if self.kv_used_tokens + need > self.shape.kv_capacity_tokens:
            raise KvFull(f"{spec.request_id} needs {need} tokens of KV; {self.kv_used_tokens} are in use")

    def _stopped_with(self, request_id: RequestId) -> _Pass | None:
        for stopped in self._stopped:
            if any(segment.request_id == request_id for segment in stopped.segments):
                return stopped
        return None

    def _runs(self, request_id: RequestId) -> bool:
        return self._running is not None and any(part.request_id == request_id for part in self._running.segments)

    def _require_idle(self) -> None:
        if self._running is not None:
            raise EngineError("a pass runs already")

    def _require_runnable(self, segment: Segment) -> None:
        sequence = self._sequences.get(segment.request_id)
        if sequence is None:
            raise EngineError(f"{segment.request_id} is not open")
        self._mover.require_here(segment.request_id)
        if self._stopped_with(segment.request_id) is not None:
            raise EngineError(f"{segment.request_id} stands in a stopped pass: resume it")
        end = segment.start + segment.tokens
        follows = sequence.group is not None and not sequence.group.leads
        known = sequence.spec.kv_tokens if follows else len(sequence.token_ids)
        if segment.tokens < 1 or segment.start != sequence.computed or end > known or (follows and segment.sample):
            raise EngineError(
                f"{segment.request_id}: [{segment.start}, {end}) does not follow the {sequence.computed} computed"
                f" of {known} known tokens"
            )


def _last_state(states: bytes, before: int) -> int:
    return int.from_bytes(states[-STATE_BYTES:], "little") if states else before
