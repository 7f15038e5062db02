"""Random schedules for the prefill worker's core, with every invariant checked after each event."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.messages.base import Message
from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.prefill import DropRequest, KvReleased, PrefillFailed, PrefillFinished
from common.messages.sp import (
    DropSegment,
    PauseSegment,
    RestoreSegment,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentPaused,
    SegmentPrefilled,
    SpillSegment,
)
from common.policy.prefill_jobs import LongJob, LongState, ShortJob
from common.units import RequestId
from tests.policy.prefill_world import PLAIN_TOKEN, STOP_TOKEN, WORKER, World, load, run_prefill, spec

WORDS: dict[type[Message], str] = {
    PrefillFinished: "f",
    PrefillFailed: "!",
    DecodeFinished: "e",
    DecodeFailed: "?",
    KvReleased: "r",
}
HANDED_OVER = re.compile("f?!?r")
DECODED_HERE = re.compile(r"(!?|f\??)r|fe")
"""A drop ends each of them anywhere, with the last word alone."""

SHORT_ENDS = (KvReleased, DecodeFinished)
LONG_ENDS = (SegmentFinished, SegmentFailed, SegmentDropped)


class PrefillWorkerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(auto_open=False)
        self.shorts: set[tuple[RequestId, int]] = set()
        """Every (request, attempt) ever ordered."""
        self.longs: set[tuple[RequestId, int]] = set()

    def held(self, kind: type[ShortJob] | type[LongJob]) -> list[ShortJob | LongJob]:
        return [job for job in self.world.core.books.jobs.values() if isinstance(job, kind)]

    # --- orders ---

    @precondition(lambda self: len(self.held(ShortJob)) < 6)
    @rule(tokens=st.integers(1, 1_300), max_tokens=st.integers(1, 3), here=st.booleans(), exclusive=st.booleans())
    def short(self, tokens: int, max_tokens: int, here: bool, exclusive: bool) -> None:
        name = f"s{len(self.shorts)}"
        self.shorts.add((RequestId(name), 0))
        order = run_prefill(spec(name, tokens, max_tokens=max_tokens), here=here, exclusive=exclusive)
        self.world.tell(order)

    @initialize(tokens=st.integers(600, 1_600), max_tokens=st.integers(1, 4))
    def running_long(self, tokens: int, max_tokens: int) -> None:
        self.long(tokens, max_tokens)
        self.world.opened(RequestId("l0"))
        self.world.tell(RunSegment(worker_id=WORKER, request_id=RequestId("l0"), attempt=0))

    @precondition(lambda self: len(self.held(LongJob)) < 3)
    @rule(tokens=st.integers(1, 1_600), max_tokens=st.integers(1, 4))
    def long(self, tokens: int, max_tokens: int) -> None:
        name = f"l{len(self.longs)}"
        self.longs.add((RequestId(name), 0))
        self.world.tell(load(spec(name, tokens, max_tokens=max_tokens)))

    @precondition(lambda self: self.held(ShortJob))
    @rule(data=st.data(), here=st.booleans())
    def short_again(self, data: st.DataObject, here: bool) -> None:
        job = data.draw(st.sampled_from(self.held(ShortJob)))
        latest = max(attempt for name, attempt in self.shorts if name == job.request_id) + 1
        self.shorts.add((job.request_id, latest))
        self.world.tell(run_prefill(spec(job.request_id, 100, attempt=latest), here=here))

    @precondition(lambda self: self.held(LongJob))
    @rule(data=st.data())
    def long_again(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.held(LongJob)))
        latest = max(attempt for name, attempt in self.longs if name == job.request_id) + 1
        self.longs.add((job.request_id, latest))
        self.world.tell(load(spec(job.request_id, 700, attempt=latest)))

    @precondition(lambda self: self.held(LongJob))
    @rule(data=st.data())
    def run_long(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.held(LongJob)))
        self.world.tell(RunSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))

    @precondition(lambda self: self.held(LongJob))
    @rule(data=st.data())
    def pause_long(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.held(LongJob)))
        self.world.tell(PauseSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))
        assert isinstance(job, LongJob)
        if job.state is LongState.PAUSING:
            assert self.world.stop_asked, "a pause that is not carried out at once is on its way"
        elif job.verdict is None:
            assert job.state is not LongState.RUNNING

    @precondition(lambda self: self.held(LongJob))
    @rule(data=st.data(), order=st.sampled_from([SpillSegment, SpillSegment, RestoreSegment]))
    def move_long(self, data: st.DataObject, order: type[SpillSegment | RestoreSegment]) -> None:
        job = data.draw(st.sampled_from(self.held(LongJob)))
        self.world.tell(order(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))

    @precondition(lambda self: self.held(ShortJob))
    @rule(data=st.data())
    def drop_short(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.held(ShortJob)))
        self.world.tell(DropRequest(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))

    @precondition(lambda self: self.held(LongJob))
    @rule(data=st.data())
    def drop_long(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.held(LongJob)))
        self.world.tell(DropSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))

    # --- effects ---

    @precondition(lambda self: self.world.opening)
    @rule(data=st.data(), fails=st.integers(0, 4))
    def opening_ends(self, data: st.DataObject, fails: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.world.opening)))
        if fails == 0:
            self.world.open_failed(request_id)
        else:
            self.world.opened(request_id)

    @precondition(lambda self: self.world.moving)
    @rule(data=st.data(), failed=st.booleans())
    def move_ends(self, data: st.DataObject, failed: bool) -> None:
        self.world.moved(data.draw(st.sampled_from(sorted(self.world.moving))), failed=failed)

    @precondition(lambda self: self.world.running is not None)
    @rule(token=st.sampled_from([PLAIN_TOKEN, PLAIN_TOKEN, STOP_TOKEN]))
    def step(self, token: int) -> None:
        pausing = [job for job in self.held(LongJob) if isinstance(job, LongJob) and job.state is LongState.PAUSING]
        answers = len(self.world.of(SegmentPaused, SegmentPrefilled))
        self.world.step(token)
        if pausing and pausing[0].verdict is None:
            assert len(self.world.of(SegmentPaused, SegmentPrefilled)) > answers, "a pause takes at most one step"

    @precondition(lambda self: self.world.running is not None)
    @rule(token=st.sampled_from([PLAIN_TOKEN, PLAIN_TOKEN, STOP_TOKEN]))
    def pass_ends_before_the_stop_is_heard(self, token: int) -> None:
        self.world.finish(token)

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.3]))
    def time_passes(self, seconds: float) -> None:
        rows = [job for job in self.held(LongJob) if job.state is LongState.DECODING]
        self.world.tick(seconds)
        running = self.world.core.books.running
        if seconds > 0.25 and rows and running is not None and running.kind == "chunk":
            assert self.world.stop_asked, "a chunk has held up a decode for too long"

    @precondition(lambda self: self.world.running is not None)
    @rule(chance=st.integers(0, 7))
    def pass_fails(self, chance: int) -> None:
        if chance == 0:
            self.world.fail_pass()

    @precondition(lambda self: any(job.state is LongState.RUNNING for job in self.held(LongJob)))
    @rule()
    def pause_step_and_run_again(self) -> None:
        job = next(job for job in self.held(LongJob) if job.state is LongState.RUNNING)
        self.world.tell(PauseSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))
        if self.world.running is not None:
            self.step(PLAIN_TOKEN)
        if job in self.held(LongJob):
            self.world.tell(RunSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))

    @precondition(lambda self: self.world.streams)
    @rule(data=st.data(), failed=st.booleans())
    def stream_ends(self, data: st.DataObject, failed: bool) -> None:
        self.world.handoff(data.draw(st.sampled_from(sorted(self.world.streams))), failed=failed)

    # --- what always holds ---

    @invariant()
    def nothing_is_computed_twice(self) -> None:
        assert not self.world.computed or max(self.world.computed.values()) == 1

    @invariant()
    def the_books_are_those_of_the_engine(self) -> None:
        jobs = self.world.core.books.jobs
        assert set(self.world.held) | set(self.world.opening) == set(jobs)
        held_tokens = {h.request_id: h.kv_tokens for h in self.world.core.holdings() if h.kv_tokens}
        there = {name for name, held in self.world.held.items() if not held.away}
        assert there <= set(held_tokens) <= set(self.world.held)
        away = {name for name, held in self.world.held.items() if held.away and name not in self.world.moving}
        assert not away & set(held_tokens)

    @invariant()
    def nobody_ends_twice(self) -> None:
        ends = Counter((m.request_id, m.attempt) for m in self.world.of(*SHORT_ENDS))
        ends += Counter((m.request_id, m.attempt) for m in self.world.of(*LONG_ENDS))
        assert all(count == 1 for count in ends.values()), ends
        words = Counter((m.request_id, m.attempt) for m in self.world.of(PrefillFinished))
        assert all(count == 1 for count in words.values()), words

    def the_words_of_shorts_are_in_order(self) -> None:
        for key, order in self.world.shorts.items():
            said = [m for m in self.world.of(*WORDS) if (m.request_id, m.attempt) == key]
            words = "".join(WORDS[type(message)] for message in said)
            legal = DECODED_HERE if order.decode_worker_id == WORKER else HANDED_OVER
            assert legal.fullmatch(words), f"{key}: {words}"

    def teardown(self) -> None:
        self.world.settle()
        for job in self.held(LongJob):
            self.world.tell(RestoreSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))
        self.world.settle()
        for job in self.held(LongJob):
            self.world.tell(RunSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))
        self.world.settle()
        for job in self.held(LongJob):  # loaded only now
            self.world.tell(RunSegment(worker_id=WORKER, request_id=job.request_id, attempt=job.attempt))
        self.world.settle()
        self.world.require_empty()
        self.nothing_is_computed_twice()
        self.nobody_ends_twice()
        self.the_words_of_shorts_are_in_order()
        assert {(m.request_id, m.attempt) for m in self.world.of(*SHORT_ENDS)} == self.shorts
        assert {(m.request_id, m.attempt) for m in self.world.of(*LONG_ENDS)} == self.longs
        for failed in self.world.of(PrefillFailed):
            assert (failed.request_id, failed.attempt) in self.shorts


def test_random_schedules(request: pytest.FixtureRequest) -> None:
    nightly = request.config.getoption("--nightly")
    run_state_machine_as_test(
        PrefillWorkerMachine,
        settings=settings(
            max_examples=10_000 if nightly else 80,
            stateful_step_count=40,
            deadline=None,
            derandomize=not nightly,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
