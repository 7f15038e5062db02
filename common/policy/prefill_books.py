"""What a prefill worker holds, and the ways a request comes in, runs and ends. `prefill_worker.py` is the door.

One pass runs at a time; one job per request id; each job ends once, and only when no effect touches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from common.messages.cluster import Holding
from common.messages.prefill import RunPrefill
from common.messages.sp import LoadSegment
from common.policy.core import InvariantViolated
from common.policy.prefill_events import (
    BreakShare,
    HandoffTarget,
    OpenSequence,
    PassSegment,
    PrefillWorkerConfig,
    ResumePass,
    RunPass,
    SequenceShare,
    StopPass,
)
from common.policy.prefill_jobs import MOVING, Job, LongJob, LongState, Meeting, ShortJob, ShortState, Verdict
from common.policy.prefill_outbox import Outbox
from common.policy.prefill_passes import PassKind, call_due_s, chunk_turn_s, next_pass, running_long
from common.policy.prefill_spill import MOVED, stop_moving
from common.policy.sp_shares import misfit
from common.policy.story import OF_A_WORKER, StoryLog
from common.units import Attempt, RequestId


@dataclass(slots=True, eq=False)
class RunningPass:
    pass_id: int
    kind: PassKind
    segments: tuple[PassSegment, ...]
    begun_s: float
    stopping: bool = False
    breaking: bool = False

    def __contains__(self, request_id: RequestId) -> bool:
        return any(segment.request_id == request_id for segment in self.segments)


class PrefillBooks:
    """Mutated by `PrefillWorkerCore` alone."""

    def __init__(self, config: PrefillWorkerConfig) -> None:
        self.config = config
        self.jobs: dict[RequestId, ShortJob | LongJob] = {}
        self.running: RunningPass | None = None
        self.last_kind: PassKind | None = None
        self.out = Outbox(config.worker_id, config.layers)
        self.now_s = 0.0
        self.wakes_s: float | None = None
        """When something is to be done though nothing happens: see `keep_time`."""
        self._places = 0
        self._passes = 0
        self._stories = StoryLog(OF_A_WORKER)

    # --- views ---

    def shorts(self) -> list[ShortJob]:
        return [job for job in self.jobs.values() if isinstance(job, ShortJob)]

    def longs(self) -> list[LongJob]:
        return [job for job in self.jobs.values() if isinstance(job, LongJob)]

    def in_pass(self, job: Job) -> bool:
        return self.running is not None and job.request_id in self.running

    def held(self, request_id: RequestId, attempt: Attempt) -> ShortJob | LongJob:
        job = self.jobs.get(request_id)
        if job is None or job.attempt != attempt:
            raise InvariantViolated.told(f"word of {request_id}/{attempt}, which is not held", self.story(request_id))
        return job

    def tell(self, request_id: RequestId, line: str) -> None:
        self._stories.note(request_id, self.now_s, self.out.cause, line)

    def holdings(self) -> tuple[Holding, ...]:
        """All requests in hand, for heartbeats."""
        held = [job.holding() for job in self.jobs.values()]
        waiting = (job.successor for job in self.jobs.values() if job.successor is not None)
        held += [
            Holding(request_id=order.spec.request_id, attempt=order.spec.attempt, phase="queued", kv_tokens=0)
            for order in waiting
        ]
        return tuple(held)

    # --- coming in ---

    def next_place(self) -> int:
        """In the local queue, at its end."""
        self._places += 1
        return self._places

    def admit(self, order: RunPrefill | LoadSegment) -> None:
        spec = order.spec
        refusal = self._refusal(order)
        if refusal is not None:
            if isinstance(order, RunPrefill):
                self.out.prefill_failed(spec.request_id, spec.attempt, refusal)
                self.out.kv_released(spec.request_id, spec.attempt)
            else:
                self.out.segment_failed(spec.request_id, spec.attempt, refusal)
            return
        place, story = self.next_place(), partial(self.story, spec.request_id)
        handoff = share = None
        if isinstance(order, RunPrefill):
            if spec.max_tokens > 1 and order.decode_worker_id != order.worker_id:
                handoff = HandoffTarget(worker_id=order.decode_worker_id, address=order.decode_address)
            self.jobs[spec.request_id] = ShortJob(
                spec, place, story, handoff=handoff, exclusive=order.exclusive, received_s=self.now_s
            )
        else:
            size = len(order.members)
            rank, scheme, layer = order.rank, order.scheme, self.config.layer
            job = LongJob(spec, place, story, rank=rank, size=size, scheme=scheme, layer=layer, kv_size=size)
            if order.growth:
                job.meets = Meeting(order.growth, rank, size, over=True)  # to open it is to have met them
            self.jobs[spec.request_id] = job
            if size > 1:
                share = SequenceShare(
                    rank=order.rank, scheme=order.scheme, addresses=order.addresses, growth=order.growth
                )
        self.out.do(OpenSequence(spec=spec, handoff=handoff, share=share))

    def _refusal(self, order: RunPrefill | LoadSegment) -> Verdict | None:
        if len(self.jobs) >= self.config.requests_max:
            return Verdict("failed", f"{self.config.requests_max} requests are in hand already")
        if isinstance(order, LoadSegment):
            return self._misplaced(order)
        return None

    def _misplaced(self, order: LoadSegment) -> Verdict | None:
        members, size = order.members, len(order.members)
        if not 0 <= order.rank < size or members[order.rank] != self.config.worker_id or len(set(members)) < size:
            return Verdict("failed", f"this worker is not rank {order.rank} of {members}", retryable=False)
        if size > 1 and len(order.addresses) != size:
            return Verdict("failed", f"{len(order.addresses)} addresses for {size} ranks", retryable=False)
        if refusal := misfit(order.scheme, size):
            return Verdict("failed", refusal, retryable=False)
        if [(part.start, part.tokens) for part in order.parts] != [(0, order.spec.prompt.tokens)]:
            return Verdict("failed", "a rank needs the whole prompt: each chunk is dealt out anew", retryable=False)
        return None

    # --- ending ---

    def end(self, job: ShortJob | LongJob, verdict: Verdict) -> None:
        """End it with the first verdict it got, as soon as nothing of it is under way."""
        job.verdict = job.verdict or verdict
        self.settle(job)

    def settle(self, job: ShortJob | LongJob) -> None:
        if self.running is not None and self.in_pass(job):
            if isinstance(job, LongJob) and job.is_shared and self.running.kind == "chunk":
                self._break_share(job)
            elif self.running.kind == "chunk":
                self.stop_pass()
            return
        if isinstance(job, LongJob):
            if job.state in MOVING:
                stop_moving(self.out, job)
            elif job.state is not LongState.LOADING:
                self.close(job)
            elif job.is_shared and not job.leaves:
                job.leaves = True
                self.out.do(BreakShare(request_id=job.request_id, attempt=job.attempt))
            return
        if job.state in (ShortState.OPENING, ShortState.ABORTING):
            return
        if job.handoff is not None and job.started:
            job.move(ShortState.ABORTING)
            self.out.abort_handoff(job)
        else:
            self.close(job)

    def close(self, job: ShortJob | LongJob) -> None:
        """Free what is held, say so to everyone who waits for it, take up what waited."""
        opened = job.state not in (ShortState.OPENING, LongState.LOADING)
        freed = job.kv_tokens if opened else 0
        if opened:
            self.out.close_sequence(job)
        if isinstance(job, ShortJob):
            job.move(ShortState.GONE)
        else:
            job.move(LongState.GONE)
        del self.jobs[job.request_id]
        self.tell(job.request_id, f"gone: {job.verdict or 'handed over'}")
        self._say_farewell(job, freed)
        if job.successor is not None:
            self.admit(job.successor)

    def _say_farewell(self, job: ShortJob | LongJob, freed: int) -> None:
        verdict = job.verdict
        asked = set(job.asked)
        if isinstance(job, ShortJob):
            if verdict is not None and verdict.kind == "failed":
                if job.generated and job.handoff is None:
                    self.out.decode_failed(job, verdict)
                else:
                    self.out.prefill_failed(job.request_id, job.attempt, verdict)
            if verdict is not None and verdict.decoded is not None:
                self.out.decode_finished(job, verdict.decoded, freed)
            else:
                self.out.kv_released(job.request_id, job.attempt, freed)
            asked.discard(("scheduler", job.attempt))
        elif verdict is not None and verdict.kind != "finished" and ("coordinator", job.attempt) not in asked:
            self.out.segment_failed(job.request_id, job.attempt, verdict)
        for asker, attempt in sorted(asked):
            self.out.dropped(asker, job.request_id, attempt)

    # --- passes ---

    def start_next_pass(self) -> None:
        if self.running is not None:
            return
        self._refuse_wrong_calls()
        plan = next_pass(self.config, self.shorts(), self.longs(), self.last_kind, self.now_s)
        if plan is None:
            return
        self._passes += 1
        self.running = RunningPass(self._passes, plan.kind, plan.segments, begun_s=self.now_s)
        if plan.resumed is not None:
            self.out.do(ResumePass(pass_id=self._passes, request_id=plan.resumed.request_id))
        else:
            background = plan.kind == "chunk"
            self.out.do(RunPass(pass_id=self._passes, segments=plan.segments, background=background))
        for segment in plan.segments:
            self._started(self.jobs[segment.request_id], segment)

    def keep_time(self) -> None:
        """Do what is due, and find out when something is next, though nothing else happens."""
        running = self.running
        self.wakes_s = self._shorts_go_on_s() if running is None else self._turn_ends_s(running)
        if running is not None and self.wakes_s is not None and self.now_s >= self.wakes_s:
            self.wakes_s = None
            self.stop_pass()

    def _shorts_go_on_s(self) -> float | None:
        """When shorts wait no longer for the call to a row; None: they do not."""
        due_s = call_due_s(self.longs())
        held_back = due_s > self.now_s and any(short.state is ShortState.READY for short in self.shorts())
        return due_s if held_back else None

    def _turn_ends_s(self, running: RunningPass) -> float | None:
        """When a chunk has held up what decodes here for long enough; None: it holds up nothing, stops already, or is a
        follower's, which stops when that of rank 0 does."""
        if running.kind != "chunk" or running.stopping or running.breaking:
            return None
        long = self.jobs[running.segments[0].request_id]
        if not isinstance(long, LongJob) or long.follows:
            return None
        turn = chunk_turn_s(self.config, self.shorts(), self.longs())
        return None if turn is None else running.begun_s + turn

    def _refuse_wrong_calls(self) -> None:
        """Rank 0 calls to what does not follow from what was done here: one of the two has lost count."""
        for long in self.longs():
            call, expected = long.called, long.expected
            if call is None or expected is None or long.verdict is not None:
                continue
            same = (call.kind, call.start, call.step) == (expected.kind, expected.start, expected.step)
            begins = call.step == 0
            fits = call.tokens == expected.tokens or (begins and 0 < call.tokens < expected.tokens)
            fits = fits and (begins or call.gathers == expected.gathers)
            if not (same and fits):
                self.end(long, Verdict("failed", f"called to {call}, which does not follow: {expected} would"))

    def answer_runs(self) -> None:
        """Followers that were told to run say so when nothing stands between them and a call."""
        longs = self.longs()
        owing = [long for long in longs if long.owes_running]
        if not owing:
            return
        shorts = [short for short in self.shorts() if short.state in (ShortState.READY, ShortState.RUNNING)]
        first = running_long(longs, [short for short in shorts if short.state is ShortState.READY])
        for long in owing:
            # Shorts that another long holds back stand in nobody's way: two groups that share two workers would each
            # wait for the other there.
            waits = first is None or first is long
            if not any(self._goes_before(short, long, waits=waits) for short in shorts):
                long.owes_running = False
                self.out.segment_running(long)

    def _goes_before(self, short: ShortJob, long: LongJob, *, waits: bool) -> bool:
        """`waits`: for what came before it."""
        earlier = waits and not long.started and short.order < long.order
        return short.state is ShortState.RUNNING or short.begun or earlier

    def _started(self, job: Job, segment: PassSegment) -> None:
        if isinstance(job, ShortJob):
            if job.state is ShortState.DECODING:
                return
            job.move(ShortState.RUNNING)
            if not job.started:
                job.started = True
                job.waited_s = self.now_s - job.received_s
            return
        assert isinstance(job, LongJob)
        job.called = None
        job.row_pass_id = self._passes
        if job.state is LongState.RUNNING:
            job.started = True
            job.chunk_tokens, job.chunk_gathers = segment.tokens, segment.gathers
            if job.running_since_s is None:
                job.running_since_s = self.now_s

    def stop_pass(self) -> None:
        if self.running is not None and not self.running.stopping:
            self.running.stopping = True
            self.out.do(StopPass(pass_id=self.running.pass_id))

    def _break_share(self, job: LongJob) -> None:
        """A pass that waits for another rank cannot be stopped, only broken."""
        if self.running is not None and not self.running.breaking:
            self.running.breaking = True
            self.out.do(BreakShare(request_id=job.request_id, attempt=job.attempt))

    def story(self, request_id: RequestId) -> list[str]:
        """Oldest first, from a bounded log."""
        return self._stories.tell(request_id)

    # --- invariants ---

    def check(self) -> None:
        """Raises: InvariantViolated."""
        for request_id, job in self.jobs.items():
            in_pass = self.in_pass(job)
            self._require(job.request_id == request_id, job, "is filed under another name")
            self._require(0 <= job.prefilled <= job.spec.prompt.tokens, job, f"has {job.prefilled} tokens prefilled")
            follows = isinstance(job, LongJob) and job.follows  # it hears of the last token when it is drawn
            self._require(job.generated < job.spec.max_tokens + follows, job, f"generated {job.generated}")
            if isinstance(job, ShortJob):
                decodes = job.state is ShortState.DECODING
                agree = decodes or in_pass == (job.state is ShortState.RUNNING)
                self._require(agree, job, f"is {job.state}, in pass: {in_pass}")
                waits = in_pass or job.state in (ShortState.OPENING, ShortState.ABORTING)
                self._require(job.verdict is None or waits, job, f"is {job.state} though it ended")
            else:
                waits = in_pass or job.state is LongState.LOADING or job.state in MOVING
                self._require(job.verdict is None or waits, job, f"is {job.state} though it ended")
                self._require(job.state is not LongState.PAUSING or in_pass, job, "is pausing without a pass")
                self._require(not (in_pass and job.state in MOVED), job, "is in a pass while its KV is elsewhere")
                self._require(job.chunk_steps < self.config.layers, job, f"stands at step {job.chunk_steps}")
        if self.running is None:
            left = next_pass(self.config, self.shorts(), self.longs(), self.last_kind, self.now_s)
            if left is not None:
                raise InvariantViolated(f"the engine idles while {left} could run")
            return
        held = [self.jobs.get(segment.request_id) for segment in self.running.segments]
        if None in held:
            raise InvariantViolated(f"{self.running} has a request that is gone")
        if sum(isinstance(job, LongJob) and job.is_shared for job in held) > 1:
            raise InvariantViolated(f"{self.running} has more than one shared sequence")
        if self.running.stopping and self.running.kind != "chunk":
            raise InvariantViolated(f"{self.running} is stopped, and with it whoever shares it")

    def _require(self, holds: bool, job: Job, what: str) -> None:
        if not holds:
            raise InvariantViolated.told(f"{job.name} {what}", job.story())
