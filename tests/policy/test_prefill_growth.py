"""What a prefill worker does when the group of its long grows, one situation at a time."""

from __future__ import annotations

import pytest

from common.messages.base import Message
from common.messages.groups import RING
from common.messages.sp import (
    DropSegment,
    LoadSegment,
    MeetRanks,
    PauseSegment,
    RanksMet,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentPart,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.policy.prefill_events import EnterGroup, GroupLost, MeetOthers, OthersMet, PassSegment
from common.policy.prefill_jobs import LongJob, LongState
from common.units import Attempt, RequestId, WorkerId
from tests.policy.prefill_world import LAYERS, WORKER, World, load, run_prefill, spec

LONG = RequestId("long")
ABOUT = {"worker_id": WORKER, "request_id": LONG, "attempt": Attempt(0)}
ADDRESSES = ("p0:1", "p1:1")


class Others:
    """The other ranks: they do what is asked."""

    def __init__(self) -> None:
        self.orders: list[MeetOthers | EnterGroup] = []

    def began(self, worker_id: WorkerId, segment: PassSegment, step: int) -> None:
        pass

    def broke(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None:
        pass

    def left(self, worker_id: WorkerId, request_id: RequestId, attempt: int) -> None:
        pass

    def meets(self, worker_id: WorkerId, order: MeetOthers) -> None:
        self.orders.append(order)

    def entered(self, worker_id: WorkerId, order: EnterGroup) -> None:
        self.orders.append(order)


class Scene(World):
    """A worker on which a long of 2,000 tokens prefills alone, in chunks of 512."""

    def __init__(self) -> None:
        super().__init__(group=Others())
        self.tell(load(spec(LONG, 2_000)))
        self.tell(RunSegment(**ABOUT))
        assert self.running is not None

    @property
    def job(self) -> LongJob:
        job = self.core.books.jobs[LONG]
        assert isinstance(job, LongJob)
        return job

    @property
    def others(self) -> Others:
        assert isinstance(self.group, Others)
        return self.group

    def last(self) -> Message:
        return self.sent[-1]

    def meet(self, growth: int = 1) -> None:
        self.tell(MeetRanks(**ABOUT, growth=growth, rank=0, addresses=ADDRESSES))
        self.tell(OthersMet(request_id=LONG, attempt=Attempt(0), growth=growth))

    def stand(self) -> SegmentPaused:
        """At the end of the chunk."""
        self.tell(PauseSegment(**ABOUT, at_chunk_end=True))
        self.finish()
        word = self.last()
        assert isinstance(word, SegmentPaused)
        return word

    def enter(self, growth: int = 1, start: int = 512, step: int = LAYERS, kept: tuple[int, ...] = (512, 0)) -> None:
        self.tell(RunSegment(**ABOUT, growth=growth, start=start, step=step, kept=kept))


def test_it_meets_the_others_while_it_computes_and_goes_over_at_the_end_of_a_chunk() -> None:
    scene = Scene()
    scene.step()
    scene.meet()
    assert scene.running is not None
    assert scene.last() == RanksMet(**ABOUT, growth=1, cause=scene.last().cause)
    word = scene.stand()
    assert (word.step, word.prefilled_tokens) == (LAYERS, 512)
    scene.enter()
    assert [type(order) for order in scene.others.orders] == [MeetOthers, EnterGroup]
    assert scene.others.orders[1] == EnterGroup(
        request_id=LONG, attempt=Attempt(0), growth=1, rank=0, size=2, start=512, kept=(512, 0), scheme=RING
    )
    assert (scene.job.rank, scene.job.size, scene.job.state) == (0, 2, LongState.RUNNING)
    assert scene.passes[-1][0].start == 512
    assert scene.passes[-1][0].tokens == 1_024, "a chunk of two ranks"
    assert scene.job.kv_tokens == 2_016, "what it had set aside"


def test_a_stop_at_the_end_of_a_chunk_waits_for_it_and_one_at_once_does_not() -> None:
    scene = Scene()
    scene.step()
    scene.tell(PauseSegment(**ABOUT, at_chunk_end=True))
    scene.step()
    assert scene.running is not None
    assert not scene.of(SegmentPaused)
    scene.tell(PauseSegment(**ABOUT))
    scene.step()
    (word,) = scene.of(SegmentPaused)
    assert word.step == 3
    scene.tell(RunSegment(**ABOUT))
    scene.finish()
    assert scene.running is not None, "told to run on: not any more to stand at the end of a chunk"


def test_between_two_chunks_it_stands_at_once() -> None:
    scene = Scene()
    scene.tell(PauseSegment(**ABOUT))
    scene.finish()
    scene.tell(run_prefill(spec("s", 100)))
    scene.tell(RunSegment(**ABOUT))
    assert scene.job.state is LongState.RUNNING
    scene.tell(PauseSegment(**ABOUT, at_chunk_end=True))
    assert scene.job.state is LongState.PAUSED
    assert len(scene.of(SegmentPaused)) == 2


def test_the_last_chunk_ends_the_prefill_and_nobody_stands() -> None:
    scene = Scene()
    for _ in range(3):
        scene.finish()
    scene.tell(PauseSegment(**ABOUT, at_chunk_end=True))
    scene.finish()
    assert scene.of(SegmentPrefilled)
    assert not scene.of(SegmentPaused)


def test_shorts_are_served_while_it_stands() -> None:
    scene = Scene()
    scene.tell(run_prefill(spec("s", 100)))
    scene.stand()
    assert scene.running is not None
    assert [segment.request_id for segment in scene.running.segments] == ["s"]


@pytest.mark.parametrize("growth", [0, 2])
def test_whoever_has_not_met_the_others_cannot_go_over(growth: int) -> None:
    scene = Scene()
    if growth:
        scene.meet(growth)
    scene.stand()
    scene.enter(growth=1 if growth == 0 else 3)
    assert isinstance(scene.last(), SegmentFailed)
    assert "without having met" in scene.last().reason
    scene.require_empty()


def test_nor_in_the_middle_of_a_chunk_nor_from_another_place() -> None:
    scene = Scene()
    scene.meet()
    scene.tell(PauseSegment(**ABOUT))
    scene.step()
    scene.enter(start=0, step=0, kept=(0, 0))
    assert "into a chunk" in scene.last().reason
    other = Scene()
    other.meet()
    other.stand()
    other.enter(start=1_024, step=2 * LAYERS, kept=(1_024, 0))
    assert "it is 512" in other.last().reason


def test_a_newcomer_takes_the_groups_count_for_its_own() -> None:
    world = World(group=Others())
    members = (WorkerId("a"), WORKER)
    long = spec(LONG, 2_000)
    parts = (SegmentPart(start=0, tokens=2_000),)
    order = LoadSegment(
        worker_id=WORKER, spec=long, rank=1, members=members, parts=parts, addresses=ADDRESSES, growth=3
    )
    world.tell(order)
    world.tell(RunSegment(**ABOUT, growth=3, start=512, step=LAYERS, kept=(512, 0)))
    job = world.core.books.jobs[LONG]
    assert isinstance(job, LongJob)
    assert (job.prefilled, job.steps_done, job.rank, job.size) == (512, LAYERS, 1, 2)
    assert job.kv_tokens == 1_008
    assert isinstance(world.sent[-1], SegmentRunning)
    world.tell(PauseSegment(**ABOUT, step=LAYERS))
    word = world.sent[-1]
    assert isinstance(word, SegmentPaused)
    assert (word.step, word.prefilled_tokens) == (LAYERS, 512)


def test_a_meeting_that_fails_is_said_and_a_later_one_counts() -> None:
    scene = Scene()
    scene.tell(MeetRanks(**ABOUT, growth=1, rank=0, addresses=ADDRESSES))
    scene.tell(OthersMet(request_id=LONG, attempt=Attempt(0), growth=1, reason="nobody answers"))
    assert scene.last().reason == "nobody answers"
    scene.meet(2)
    scene.tell(OthersMet(request_id=LONG, attempt=Attempt(0), growth=1))
    assert [word.growth for word in scene.of(RanksMet)] == [1, 2], "of an earlier one: nobody asks any more"
    scene.tell(MeetRanks(**ABOUT, growth=2, rank=0, addresses=ADDRESSES))
    assert [word.growth for word in scene.of(RanksMet)] == [1, 2, 2], "asked again"
    scene.stand()
    scene.enter(growth=2)
    assert scene.job.growth == 2
    scene.tell(RunSegment(**ABOUT, growth=2, start=512, step=LAYERS, kept=(512, 0)))
    assert len([order for order in scene.others.orders if isinstance(order, EnterGroup)]) == 1


def test_who_does_not_hold_it_says_so_and_a_drop_ends_everything() -> None:
    world = World(group=Others())
    world.tell(MeetRanks(**ABOUT, growth=1, rank=0, addresses=ADDRESSES))
    assert "not held" in world.sent[-1].reason
    scene = Scene()
    scene.meet()
    scene.stand()
    scene.tell(DropSegment(**ABOUT))
    assert isinstance(scene.last(), SegmentDropped)
    scene.tell(OthersMet(request_id=LONG, attempt=Attempt(0), growth=1))
    scene.require_empty()


def test_a_larger_group_that_is_gone_ends_the_job() -> None:
    scene = Scene()
    scene.meet()
    scene.stand()
    scene.enter()
    scene.stop_asked = False
    scene.fail_pass()
    assert isinstance(scene.last(), SegmentFailed)
    scene.tell(GroupLost(request_id=LONG, attempt=Attempt(0), reason="the larger group is gone"))
    scene.require_empty()
