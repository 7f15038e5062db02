"""The prefill worker: a local queue of shorts, the longs it prefills and decodes, and one engine for all.

Rules, beside those of `prefill_passes.py` (which pass is next) and `prefill_jobs.py` (the lives of requests):

- A pause stops the long's pass at the next step; nothing is computed twice. A pause that finds no pass of the
  long running takes effect at once; one that meets the end of the prefill is void.
- So does the end of its turn, where others decode (`prefill_passes.py`): it goes on after their step, unasked.
- A short's KV streams to its decode worker while it is computed and is freed here when the handoff ended, well or
  badly. A request whose first token is its last has no handoff, nor has one that decodes here: its KV is reserved
  whole, and it says what a decode worker would say (`DecodeFinished` or `DecodeFailed`).
- A failed pass ends the requests in it and nothing else. If only the group of a shared sequence in it broke, the others
  in it are computed all the same.
- A follower of a group stops when rank 0 does, in the very step; being told to pause, it waits for that and says where
  it stands. Its share of a pass ends with the others': to drop it meanwhile, the group is broken.
- A rank of a group that grows goes over to the larger one between two chunks (`prefill_growth.py`); rank 0 may also
  take in the KV of all and go on alone (`prefill_parting.py`).
- Every short ends with exactly one `KvReleased` or, decoded here, `DecodeFinished`, its last message; every long with
  `SegmentFinished`, `SegmentFailed` or `SegmentDropped`.
- The KV of a paused long may be moved out of its places, and is brought back before it runs on: `prefill_spill.py`.
- An order of an older term than the newest seen is ignored (term 0: from someone who has none). An order for an
  older attempt than the one held is ignored or answered with "nothing held"; one for a later attempt first
  drops what is held, and is taken up when that has ended.
"""

from __future__ import annotations

from typing import assert_never

from common.messages.cluster import Holding
from common.messages.prefill import DropRequest, RunPrefill
from common.messages.sp import (
    DropSegment,
    LoadSegment,
    MeetRanks,
    PartSegment,
    PauseSegment,
    RestoreSegment,
    RunSegment,
    SpillSegment,
)
from common.policy import prefill_spill
from common.policy.core import InvariantViolated, TimePassed
from common.policy.prefill_books import PrefillBooks, RunningPass
from common.policy.prefill_events import (
    BrokeOff,
    GroupCalled,
    GroupLost,
    HandoffFailed,
    HandoffFinished,
    KvMoved,
    KvRestored,
    KvSpilled,
    OpenFailed,
    OthersMet,
    PassFailed,
    PassFinished,
    PassSegment,
    PassStopped,
    PrefillCommand,
    PrefillEvent,
    PrefillOrder,
    PrefillWorkerConfig,
    RestoreFailed,
    ResumePass,
    SampledToken,
    SequenceOpened,
    SpillFailed,
)
from common.policy.prefill_growth import enter_group, meet, others_met
from common.policy.prefill_jobs import Asker, LongJob, LongState, ShortJob, ShortState, Verdict, finish_reason
from common.policy.prefill_parting import gathered, part
from common.units import Attempt, RequestId


class PrefillWorkerCore:
    """Implements `common.policy.core.Core`."""

    def __init__(self, config: PrefillWorkerConfig) -> None:
        self.books = PrefillBooks(config)
        self.epoch = 0
        """Highest term of a scheduler seen."""
        self._events = 0

    def __repr__(self) -> str:
        books = self.books
        return f"PrefillWorkerCore({books.config.worker_id!r}, holds={len(books.jobs)}, running={books.running})"

    # --- the door ---

    def handle(self, event: PrefillEvent, now_s: float) -> list[PrefillCommand]:
        self.books.now_s = now_s
        self._events += 1
        self.books.out.cause = f"{self.books.config.worker_id}#{self._events}"
        match event:
            case (
                RunPrefill()
                | DropRequest()
                | LoadSegment()
                | MeetRanks()
                | RunSegment()
                | PauseSegment()
                | DropSegment()
            ):
                self._obey(event)
            case PartSegment() | SpillSegment() | RestoreSegment():
                self._obey(event)
            case SequenceOpened():
                self._opened(event)
            case OpenFailed():
                self._open_failed(event)
            case OthersMet():
                others_met(self.books, event)
            case GroupCalled():
                self._called(event)
            case GroupLost():
                self._lost(event)
            case BrokeOff():
                self._broke_off(event)
            case PassFinished():
                self._pass_finished(event)
            case PassStopped():
                self._pass_stopped(event)
            case PassFailed():
                self._pass_failed(event)
            case HandoffFinished() | HandoffFailed():
                self._handoff_ended(event)
            case KvSpilled() | SpillFailed() | KvRestored() | RestoreFailed():
                self._moved(event)
            case TimePassed():
                pass
            case _:
                assert_never(event)
        self.books.start_next_pass()
        self.books.keep_time()
        self.books.answer_runs()
        return self.books.out.take()

    def next_deadline_s(self) -> float | None:
        """When a chunk makes way for what decodes here, or shorts are not held back any longer for a call. (Every other
        wait is for an effect that is bounded where it is performed.)"""
        return self.books.wakes_s

    @property
    def idle(self) -> bool:
        return not self.books.jobs

    def holdings(self) -> tuple[Holding, ...]:
        """All requests in hand, for heartbeats."""
        return self.books.holdings()

    def story(self, request_id: RequestId) -> list[str]:
        """What happened to a request, oldest first, from a bounded log."""
        return self.books.story(request_id)

    def check(self) -> None:
        """Raises: InvariantViolated."""
        self.books.check()

    # --- orders ---

    def _obey(self, order: PrefillOrder) -> None:
        request_id = order.spec.request_id if isinstance(order, RunPrefill | LoadSegment) else order.request_id
        if order.worker_id != self.books.config.worker_id or 0 < order.epoch < self.epoch:
            self.books.tell(request_id, f"ignored {type(order).__name__} for {order.worker_id} of term {order.epoch}")
            return
        self.epoch = max(self.epoch, order.epoch)
        self.books.tell(request_id, f"{type(order).__name__} caused by {order.cause or 'nobody'}")
        match order:
            case RunPrefill() | LoadSegment():
                self._take(order)
            case MeetRanks():
                meet(self.books, order)
            case RunSegment():
                self._run_segment(order)
            case PauseSegment():
                self._pause_segment(order)
            case PartSegment():
                part(self.books, order)
            case SpillSegment() | RestoreSegment():
                self._move_segment(order)
            case DropRequest():
                self._drop("scheduler", order.request_id, order.attempt)
            case DropSegment():
                self._drop("coordinator", order.request_id, order.attempt)
            case _:
                assert_never(order)

    def _take(self, order: RunPrefill | LoadSegment) -> None:
        spec = order.spec
        held = self.books.jobs.get(spec.request_id)
        if held is None:
            self.books.admit(order)
        elif spec.attempt > held.attempt:
            self._supersede(held, order)
        elif (
            spec.attempt == held.attempt
            and isinstance(order, LoadSegment)
            and isinstance(held, LongJob)
            and held.state is not LongState.LOADING
        ):
            self.books.out.segment_loaded(held)

    def _supersede(self, held: ShortJob | LongJob, order: RunPrefill | LoadSegment) -> None:
        earlier = held.successor
        if earlier is not None and earlier.spec.attempt >= order.spec.attempt:
            return
        if earlier is not None:
            self.books.out.dropped(_asker_of(earlier), held.request_id, earlier.spec.attempt)
        held.successor = order
        if isinstance(held, LongJob):
            held.asked.append(("coordinator", held.attempt))
        self.books.end(held, Verdict("dropped", f"superseded by attempt {order.spec.attempt}"))

    def _run_segment(self, order: RunSegment) -> None:
        long = self._long(order)
        if long is None or long.verdict is not None:
            return
        if order.growth > long.growth and not enter_group(self.books, long, order):
            return
        long.ends_chunk = False
        match long.state:
            case LongState.LOADED | LongState.PAUSED | LongState.PAUSING:
                if long.state is LongState.LOADED:
                    long.order = self.books.next_place()
                if long.state is not LongState.PAUSING:
                    long.running_since_s = None
                long.move(LongState.RUNNING)
                self._say_running(long)
            case LongState.RUNNING:
                self._say_running(long)
            case LongState.LOADING | LongState.DECODING | LongState.GATHERED | LongState.GONE:
                return  # answered by SegmentLoaded; was answered by SegmentPrefilled
            case LongState.SPILLING | LongState.SPILLED | LongState.RESTORING:
                return  # nobody asks this of what was not brought back
            case _:
                assert_never(long.state)

    def _say_running(self, long: LongJob) -> None:
        if long.follows:
            long.owes_running = True  # said by `answer_runs`, before this event is done if nothing is in the way
        else:
            self.books.out.segment_running(long)

    def _pause_segment(self, order: PauseSegment) -> None:
        long = self._long(order)
        if long is None or long.verdict is not None:
            return
        long.ends_chunk = order.at_chunk_end and long.state is LongState.RUNNING and long.chunk_tokens > 0
        if long.ends_chunk:
            return
        match long.state:
            case LongState.LOADED | LongState.RUNNING:
                long.pause_received_s = self.books.now_s
                long.owes_running = False
                if self.books.in_pass(long):
                    long.move(LongState.PAUSING)
                    if not long.follows:
                        self.books.stop_pass()
                else:
                    self._paused(long, self._pause_latency_s(long) if long.follows else 0.0)
            case LongState.PAUSED:
                self.books.out.segment_paused(long)
            case LongState.PAUSING | LongState.LOADING | LongState.DECODING | LongState.GATHERED | LongState.GONE:
                return  # the answer is on its way
            case LongState.SPILLING | LongState.SPILLED | LongState.RESTORING:
                return  # it stands, and has said so
            case _:
                assert_never(long.state)

    def _move_segment(self, order: SpillSegment | RestoreSegment) -> None:
        long = self._long(order)
        if long is not None and long.verdict is None:
            prefill_spill.obey(self.books, long, order)

    def _long(self, order: RunSegment | PauseSegment | SpillSegment | RestoreSegment) -> LongJob | None:
        held = self.books.jobs.get(order.request_id)
        if isinstance(held, LongJob) and held.attempt == order.attempt:
            return held
        self.books.out.segment_failed(order.request_id, order.attempt, Verdict("failed", "not held by this worker"))
        return None

    def _drop(self, asker: Asker, request_id: RequestId, attempt: Attempt) -> None:
        held = self.books.jobs.get(request_id)
        if held is None or held.attempt > attempt:
            self.books.out.dropped(asker, request_id, attempt)
            return
        if held.successor is not None and held.successor.spec.attempt <= attempt:
            held.asked.append((_asker_of(held.successor), held.successor.spec.attempt))
            held.successor = None
        held.asked.append((asker, attempt))
        self.books.end(held, Verdict("dropped", f"dropped by the {asker}"))

    # --- effects that ended ---

    def _called(self, event: GroupCalled) -> None:
        held = self.books.jobs.get(event.request_id)
        call = event.announcement
        if call.kind == "chunk":  # rows are many and all alike
            self.books.tell(event.request_id, f"called to {call.tokens} tokens from {call.start}, step {call.step}")
        if isinstance(held, LongJob) and held.attempt == event.attempt and held.follows:
            held.called = call

    def _opened(self, event: SequenceOpened) -> None:
        job = self.books.held(event.request_id, event.attempt)
        self.books.tell(job.request_id, "opened")
        if isinstance(job, ShortJob):
            job.move(ShortState.READY)
            job.ready_s = self.books.now_s
        else:
            job.move(LongState.LOADED)
        if job.verdict is not None:
            self.books.settle(job)
            return
        self.books.out.place_kv(job, "filling")
        if isinstance(job, LongJob):
            self.books.out.segment_loaded(job)

    def _lost(self, event: GroupLost) -> None:
        held = self.books.jobs.get(event.request_id)
        if not isinstance(held, LongJob) or held.attempt != event.attempt or not held.minds_others:
            return
        if not self.books.in_pass(held):  # one in a pass ends with that
            self.books.end(held, Verdict("failed", event.reason))

    def _broke_off(self, event: BrokeOff) -> None:
        running = self._take_running(event.pass_id)
        running.segments = tuple(part for part in running.segments if part.request_id != event.request_id)
        self.books.end(self.books.jobs[event.request_id], Verdict("failed", event.reason))

    def _open_failed(self, event: OpenFailed) -> None:
        job = self.books.held(event.request_id, event.attempt)
        job.verdict = job.verdict or Verdict("failed", event.reason, event.retryable)
        self.books.close(job)

    def _handoff_ended(self, event: HandoffFinished | HandoffFailed) -> None:
        job = self.books.held(event.request_id, event.attempt)
        if isinstance(event, HandoffFailed):
            handoff = job.handoff if isinstance(job, ShortJob) else None
            suspect = handoff.worker_id if handoff is not None and event.peer_lost else None
            job.verdict = job.verdict or Verdict("failed", f"handoff failed: {event.reason}", suspect=suspect)
        self.books.close(job)

    def _moved(self, event: KvMoved) -> None:
        job = self.books.held(event.request_id, event.attempt)
        assert isinstance(job, LongJob)
        prefill_spill.ended(self.books, job, event)

    def _pass_finished(self, event: PassFinished) -> None:
        done = self._take_running(event.pass_id)
        self.books.running, self.books.last_kind = None, done.kind
        sampled = {token.request_id: token for token in event.sampled}
        for segment in done.segments:
            job = self.books.jobs[segment.request_id]
            token = sampled.get(segment.request_id)
            if (token is not None) != segment.sample:
                raise InvariantViolated(f"pass {event.pass_id} sampled {sorted(sampled)} for {done.segments}")
            job.compute_s += event.compute_s
            if job.state in (ShortState.DECODING, LongState.DECODING):
                self._row_advanced(job, token)
            elif isinstance(job, ShortJob):
                self._short_advanced(job, segment, token, event.last_layer_computed_s)
            else:
                self._chunk_advanced(job, segment, token)

    def _short_advanced(
        self, job: ShortJob, segment: PassSegment, token: SampledToken | None, last_layer_computed_s: float
    ) -> None:
        job.prefilled += segment.tokens
        if job.verdict is not None:
            self.books.settle(job)
        elif token is None:
            job.move(ShortState.READY)
        else:
            job.generated = 1
            reason = finish_reason(job.spec, token.token_id, generated=1)
            self.books.out.token(job, token, 1, reason)
            in_worker_s = self.books.now_s - job.received_s
            self.books.out.prefill_finished(job, last_layer_computed_s, in_worker_s, reason)
            if reason is not None:
                self.books.end(job, Verdict("finished", reason))
                return
            if job.handoff is None:
                job.move(ShortState.DECODING)
                self.books.out.place_kv(job, "decoding")
                return
            job.move(ShortState.HANDOFF)
            self.books.out.finish_handoff(job, token)
            self.books.out.place_kv(job, "handoff")

    def _chunk_advanced(self, job: LongJob, segment: PassSegment, token: SampledToken | None) -> None:
        job.prefilled += segment.tokens
        job.steps += self.books.config.layers
        job.chunk_tokens = job.chunk_steps = 0
        job.advanced_s = self.books.now_s
        if job.verdict is not None:
            self.books.settle(job)
            return
        if job.chunk_gathers:
            gathered(self.books, job)
        if job.state is LongState.GATHERED:
            return
        if job.remaining:
            if job.state is LongState.PAUSING:
                self._paused(job, self._pause_latency_s(job))
            elif job.ends_chunk:
                self._paused(job, 0.0)
        else:
            job.generated = 1
            reason = None
            if token is not None:  # else rank 0 has it
                reason = finish_reason(job.spec, token.token_id, generated=1)
                self.books.out.token(job, token, 1, reason)
            self.books.out.segment_prefilled(job, reason)
            if reason is not None:
                self.books.out.segment_finished(job, reason)
                self.books.end(job, Verdict("finished", reason))
                return
            job.move(LongState.DECODING)
            self.books.out.place_kv(job, "decoding")

    def _row_advanced(self, job: ShortJob | LongJob, token: SampledToken | None) -> None:
        if job.verdict is not None:
            self.books.settle(job)
            return
        job.generated += 1
        if isinstance(job, LongJob):
            job.advanced_s = self.books.now_s
        if token is None:
            return  # rank 0 has it; checked by the caller
        reason = finish_reason(job.spec, token.token_id, job.generated)
        self.books.out.token(job, token, job.generated, reason)
        if reason is not None:
            if isinstance(job, LongJob):
                self.books.out.segment_finished(job, reason)
            self.books.end(job, Verdict("finished", reason, decoded=reason))

    def _pass_stopped(self, event: PassStopped) -> None:
        stopped = self._take_running(event.pass_id)
        long = self.books.jobs[stopped.segments[0].request_id]
        if stopped.kind != "chunk" or not isinstance(long, LongJob):
            # Nobody asked for it: on with it.
            self.books.out.do(ResumePass(pass_id=stopped.pass_id, request_id=long.request_id))
            return
        self.books.running, self.books.last_kind = None, stopped.kind
        long.compute_s += event.compute_s
        long.chunk_steps = event.steps_done
        if long.verdict is not None:
            self.books.settle(long)
        elif long.state is LongState.PAUSING:
            self._paused(long, self._pause_latency_s(long))

    def _pass_failed(self, event: PassFailed) -> None:
        failed = self._take_running(event.pass_id)
        self.books.running, self.books.last_kind = None, failed.kind
        for segment in failed.segments:
            self.books.tell(segment.request_id, f"pass {event.pass_id} failed: {event.reason}")
            self.books.end(self.books.jobs[segment.request_id], Verdict("failed", event.reason))

    def _take_running(self, pass_id: int) -> RunningPass:
        if self.books.running is None or self.books.running.pass_id != pass_id:
            raise InvariantViolated(f"word of pass {pass_id} while {self.books.running} runs")
        return self.books.running

    # --- pausing ---

    def _paused(self, long: LongJob, latency_s: float) -> None:
        long.last_pause_latency_s = latency_s
        long.ends_chunk = False
        long.move(LongState.PAUSED)
        self.books.tell(long.request_id, f"paused at step {long.steps_done} after {latency_s * 1e3:.1f} ms")
        self.books.out.segment_paused(long)
        self.books.out.place_kv(long, "paused")

    def _pause_latency_s(self, long: LongJob) -> float:
        """From the order, or from the first short that became ready while the long ran, to now."""
        since_s = long.pause_received_s
        for job in self.books.jobs.values():
            if (
                isinstance(job, ShortJob)
                and job.state is ShortState.READY
                and long.running_since_s is not None
                and job.ready_s >= long.running_since_s
            ):
                since_s = min(since_s, job.ready_s)
        return max(0.0, self.books.now_s - since_s)


def _asker_of(order: RunPrefill | LoadSegment) -> Asker:
    return "scheduler" if isinstance(order, RunPrefill) else "coordinator"
