"""Prefill workers as ranks of a group, one situation at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.messages.cluster import StepCost
from common.messages.decode import DecodeFailed
from common.messages.groups import Announcement, GroupScheme
from common.messages.prefill import KvReleased, PrefillFailed, PrefillFinished
from common.messages.sp import (
    DropSegment,
    GroupFailed,
    GroupFinished,
    GroupPrefillFinished,
    LoadSegment,
    PauseSegment,
    RunSegment,
    SegmentFailed,
    SegmentLoaded,
    SegmentPart,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.policy.prefill_events import GroupCalled
from common.policy.prefill_jobs import LongJob, LongState
from common.policy.prefill_passes import CALL_S
from common.policy.prefill_worker import PrefillWorkerCore
from common.policy.sp_group import GroupState
from common.units import RequestId, WorkerId
from tests.policy.group_world import GroupWorld
from tests.policy.prefill_world import LAYERS, WORKER, World, config, run_prefill, spec

LONG = RequestId("long")
STATES = ["forming", "prefilling", "pausing", "paused", "resuming", "decoding", "finishing"]


def until(world: GroupWorld, holds: Callable[[], object]) -> GroupWorld:
    for _ in range(5_000):
        if holds():
            return world
        assert world.act(), world.describe()
    raise AssertionError(world.describe())


def reached(state: str, ranks: int, seed: int = 1, max_tokens: int = 5) -> GroupWorld:
    """A group of so many ranks in this state, on workers of which another one has nothing to do with it."""
    world = GroupWorld(seed, ranks + 1)
    world.form(LONG, tuple(f"p{n}" for n in range(ranks)), 3_000, max_tokens)
    if state == "forming":
        return world
    first = "prefilling" if state != "decoding" else "decoding"
    until(world, lambda: world.coordinator.state_of(LONG, 0) == first)
    if state in ("prefilling", "pausing", "paused", "resuming"):
        until(world, lambda: all(world.worlds[WorkerId(f"p{n}")].running for n in range(ranks)))
    if state in ("pausing", "paused", "resuming"):
        world.pause(LONG)
    if state in ("paused", "resuming"):
        until(world, lambda: world.coordinator.state_of(LONG, 0) is GroupState.PAUSED)
    if state == "resuming":
        world.resume(LONG)
    return until(world, lambda: world.coordinator.state_of(LONG, 0) == state)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_dropped_in_every_state(state: str, ranks: int):
    world = reached(state, ranks)
    world.dissolve(LONG)
    world.settle()
    world.require_empty()
    assert isinstance(world.endings[LONG, 0], GroupFailed)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_lost_in_every_state(state: str, rank: int):
    world = reached(state, 3)
    world.kill(WorkerId(f"p{rank}"))
    while world.act():
        pass
    if state not in ("forming", "finishing"):
        assert not any(world.jobs((LONG, 0))), "the others are free before anybody's time is up"
    world.settle()
    world.dissolve(LONG)  # as the scheduler does, once it misses the worker
    world.settle()
    world.require_empty()
    assert isinstance(world.endings[LONG, 0], GroupFinished if state == "finishing" else GroupFailed)


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("here", [False, True])
def test_shorts_that_share_a_pass_with_a_group_outlive_it(lost: int, here: bool):
    world = reached("decoding", 3, max_tokens=50)
    others = [WorkerId(f"p{n}") for n in range(3) if n != lost]
    for number, name in enumerate(others):
        world.short(name, f"s{number}", 1_500, here=here, exclusive=False)

    def share(name: WorkerId) -> bool:
        running = world.worlds[name].running
        return running is not None and len(running.segments) > 1 and LONG in {s.request_id for s in running.segments}

    until(world, lambda: any(share(name) for name in others))
    world.kill(WorkerId(f"p{lost}"))
    world.settle()
    world.dissolve(LONG)
    world.settle()
    world.require_empty()
    assert isinstance(world.endings[LONG, 0], GroupFailed)
    assert world.seen["broke off"] > 0
    for number, name in enumerate(others):
        assert not world.worlds[name].of(PrefillFailed, DecodeFailed)
        assert [index for index, _ in world.tokens_of(f"s{number}")] == list(range(3 if here else 1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_say_the_same_step_and_go_on_from_there(ranks: int):
    world = reached("paused", ranks)
    jobs = world.jobs((LONG, 0))
    assert [job.state for job in jobs] == [LongState.PAUSED] * ranks
    assert len({(job.prefilled, job.chunk_steps, job.chunk_tokens) for job in jobs}) == 1
    world.resume(LONG)
    world.settle()
    world.require_empty()
    assert isinstance(world.endings[LONG, 0], GroupFinished)
    assert [index for index, _ in world.tokens_of(LONG)] == list(range(5))


def test_a_pause_that_meets_the_end_of_the_prefill_is_void():
    world = reached("prefilling", 2)
    leader = world.worlds[WorkerId("p0")]
    until(world, lambda: leader.of(SegmentPrefilled))
    world.pause(LONG)  # the coordinator has not heard of the end
    world.settle()
    world.require_empty()
    assert len(world.of(GroupPrefillFinished)) == 1
    assert isinstance(world.endings[LONG, 0], GroupFinished)


def test_chunks_are_as_large_as_the_ranks_make_them():
    world = reached("prefilling", 3)
    until(world, lambda: world.worlds[WorkerId("p2")].running)
    (segment,) = world.worlds[WorkerId("p2")].passes[0]
    assert (segment.start, segment.tokens, segment.sample) == (0, 3 * 512, False)


# --- one follower, called by hand ---


class Quiet:
    """Ranks that are not there."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.began_at: list[int] = []

    def began(self, worker_id, segment, step) -> None:
        self.began_at.append(step)

    def broke(self, worker_id, request_id, attempt) -> None:
        self.broken.append(request_id)

    def left(self, worker_id, request_id, attempt) -> None:
        pass


def share(tokens: int, name: RequestId = LONG, rank: int = 1, **changes: Any) -> LoadSegment:
    """Of a group of two."""
    members = (WORKER, WorkerId("p9")) if rank == 0 else (WorkerId("p9"), WORKER)
    values = {"members": members, "parts": (SegmentPart(start=0, tokens=tokens),), "addresses": ("a:1", "b:1")}
    return LoadSegment(worker_id=WORKER, spec=spec(name, tokens), **({"rank": rank} | values | changes))


def follower(tokens: int = 1_500, **changes: Any) -> World:
    world = World(core=PrefillWorkerCore(config(**changes)), group=Quiet())
    world.tell(share(tokens))
    world.tell(run())
    return world


def run() -> RunSegment:
    return RunSegment(worker_id=WORKER, request_id=LONG, attempt=0)


def pause(step: int) -> PauseSegment:
    return PauseSegment(worker_id=WORKER, request_id=LONG, attempt=0, step=step)


def call(world: World, start: int, tokens: int, step: int = 0, kind: str = "chunk", pass_no: int = 1) -> None:
    told = Announcement(pass_no=pass_no, kind=kind, start=start, tokens=tokens, step=step)
    world.tell(GroupCalled(request_id=LONG, attempt=0, announcement=told))


def running(world: World) -> list[tuple[str, int, int]]:
    return [] if world.running is None else [(s.request_id, s.start, s.tokens) for s in world.running.segments]


def job(world: World) -> LongJob:
    found = world.core.books.jobs[LONG]
    assert isinstance(found, LongJob)
    return found


def decoding_follower(**changes: Any) -> World:
    world = follower(600, **changes)
    call(world, 0, 600)
    world.finish()
    assert world.of(SegmentPrefilled)
    return world


def with_another(world: World, tokens: int) -> RequestId:
    """A long of which this worker is rank 0, prefilled in one pass."""
    other = RequestId("other")
    world.tell(share(tokens, other, rank=0))
    world.tell(RunSegment(worker_id=WORKER, request_id=other, attempt=0))
    world.finish()
    return other


def test_a_follower_begins_nothing_by_itself_and_holds_back_shorts():
    world = follower()
    assert world.of(SegmentLoaded)
    assert world.of(SegmentRunning)
    world.tell(run_prefill(spec("a", 50)))
    assert running(world) == []
    call(world, 0, 1_000)
    assert running(world) == [(LONG, 0, 1_000)]
    world.finish()
    assert running(world) == [], "between two chunks too"
    world.tell(pause(LAYERS))
    assert world.of(SegmentPaused)[0].step == LAYERS
    assert running(world) == [("a", 0, 50)]


def test_a_follower_reserves_its_share():
    world = follower(1_500)
    assert world.core.holdings()[0].kv_tokens == (1_500 + 16) // 2


@pytest.mark.parametrize("long_short", [300, 1_300])
def test_a_follower_says_that_it_runs_when_the_shorts_before_it_are_done(long_short: int):
    world = World(group=Quiet())
    world.tell(run_prefill(spec("a", long_short)))
    world.tell(run_prefill(spec("b", 400)))
    world.tell(share(1_500))
    world.tell(run())
    world.tell(run_prefill(spec("later", 100)))
    assert not world.of(SegmentRunning)
    world.tell(run())  # repeated: no answer was heard
    while not world.of(SegmentRunning):
        world.finish()
    assert {m.request_id for m in world.of(PrefillFinished)} >= {"a", "b"}
    assert running(world) == []
    assert len(world.of(SegmentRunning)) == 1
    call(world, 0, 1_000)
    assert running(world) == [(LONG, 0, 1_000)]


def test_shorts_that_another_long_holds_back_are_in_nobodys_way():
    """Else two groups that share two workers would wait for each other there."""
    world = follower()
    other = RequestId("other")
    call(world, 0, 1_000)
    world.finish()
    world.tell(run_prefill(spec("a", 300)))
    world.tell(share(900, other))
    world.tell(RunSegment(worker_id=WORKER, request_id=other, attempt=0))
    assert [m.request_id for m in world.of(SegmentRunning)] == [LONG, other]
    assert running(world) == []


def test_a_pause_takes_back_the_word_that_a_follower_owes():
    world = World(group=Quiet())
    world.tell(run_prefill(spec("a", 300)))
    for order in (share(900), run(), pause(0)):
        world.tell(order)
    assert world.of(SegmentPaused)[0].step == 0
    world.finish()
    assert not world.of(SegmentRunning)


def test_a_follower_stops_when_rank_0_does_and_says_where():
    world = follower()
    call(world, 0, 1_000)
    world.step()
    world.tell(pause(2))  # rank 0's word came by way of the coordinator before the step was done here
    assert job(world).state is LongState.PAUSING
    assert not world.stop_asked
    world.step()
    world.stop_here()
    assert [m.step for m in world.of(SegmentPaused)] == [2]
    world.tell(run())
    assert running(world) == [], "it goes on when it is called"
    call(world, 0, 1_000, step=2, pass_no=2)
    assert running(world) == [(LONG, 0, 1_000)]
    world.finish()
    assert job(world).prefilled == 1_000


def test_a_followers_chunk_stops_with_that_of_rank_0_and_lets_a_called_row_in():
    world = follower()
    other = with_another(world, 1)
    call(world, 0, 1_000)
    assert world.core.next_deadline_s() is None, "it cannot stop by itself"
    world.tick(1.0)
    assert not world.stop_asked
    world.step()
    world.stop_here()
    assert running(world) == [(other, 1, 1)], "what decodes here, before rank 0 calls again"
    world.finish()
    call(world, 0, 1_000, step=1)
    assert running(world) == [(LONG, 0, 1_000)]


def test_a_row_shares_the_pass_with_shorts_that_wait_and_draws_nothing_here():
    world = decoding_follower()
    world.tell(run_prefill(spec("a", 100)))
    world.tick(CALL_S)
    assert running(world) == [("a", 0, 100)], "not called: it waits no longer"
    world.tell(run_prefill(spec("b", 100)))
    world.tell(run_prefill(spec("c", 150)))
    call(world, 600, 1, kind="row", pass_no=2)
    assert running(world) == [("a", 0, 100)], "called while busy"
    world.finish()
    assert running(world) == [(LONG, 600, 1), ("b", 0, 100), ("c", 0, 92)], "at most 192 tokens beside it"
    assert [segment.sample for segment in world.running.segments] == [False, True, False]
    world.finish()
    assert running(world) == [], "the next call is about to come"
    assert world.core.next_deadline_s() == pytest.approx(2 * CALL_S)
    call(world, 601, 1, kind="row", pass_no=3)
    assert running(world) == [(LONG, 601, 1), ("c", 92, 58)]
    world.finish()
    assert world.tokens_of(LONG) == []
    assert job(world).next_position == 602


def test_where_no_call_comes_shorts_are_taken_in_small_passes():
    cost = StepCost(pass_s=0.05, token_s=1e-3, pair_s=0.0)
    world = decoding_follower(step_cost=cost, long_itl_s_max=0.25)
    world.tell(run_prefill(spec("a", 400)))
    world.tick(CALL_S)
    assert running(world) == [("a", 0, 75)], "half of the time: rank 0 may call at any time, and has passes itself"
    call(world, 600, 1, kind="row", pass_no=2)
    world.finish()
    assert running(world) == [(LONG, 600, 1), ("a", 75, 192)], "with it, all of the time"


def test_only_one_shared_row_in_a_pass_and_they_take_turns():
    world = decoding_follower()
    other = with_another(world, 500)
    rows = []
    for number in range(6):
        rows += [name for name, _, tokens in running(world) if tokens == 1]
        if job(world).called is None and (LONG, 600 + number // 2, 1) not in running(world):
            call(world, job(world).next_position, 1, kind="row", pass_no=2 + number)
        world.finish()
    assert rows == [other, LONG] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 500, "tokens": 100},
        {"start": 0, "tokens": 2_000},
        {"start": 0, "tokens": 100, "step": 1},
        {"start": 0, "tokens": 1, "kind": "row"},
    ],
)
def test_a_call_that_does_not_follow_fails_the_share(wrong: dict):
    world = follower()
    call(world, **wrong)
    (failed,) = world.of(SegmentFailed)
    assert "does not follow" in failed.reason
    assert failed.retryable
    world.require_empty()


def test_a_call_for_another_attempt_is_ignored():
    world = follower()
    told = Announcement(pass_no=1, kind="chunk", start=0, tokens=100, step=0)
    world.tell(GroupCalled(request_id=LONG, attempt=1, announcement=told))
    world.tell(GroupCalled(request_id=RequestId("gone"), attempt=0, announcement=told))
    assert running(world) == []


def test_a_follower_dropped_in_a_pass_breaks_it_and_others_live():
    world = follower()
    call(world, 0, 1_000)
    world.tell(run_prefill(spec("a", 50)))
    world.tell(DropSegment(worker_id=WORKER, request_id=LONG, attempt=0))
    assert world.group.broken == [LONG]
    world.fail_pass()
    assert LONG not in world.core.books.jobs
    world.settle()
    assert [m.request_id for m in world.of(KvReleased)] == ["a"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, "is not rank 0"),
        ({"rank": 2}, "is not rank 2"),
        ({"addresses": ("a:1",)}, "1 addresses for 2 ranks"),
        ({"scheme": GroupScheme(per_node=3)}, "no whole number of nodes of 3"),
        ({"members": (WORKER, WORKER)}, "is not rank 1"),
        ({"parts": (SegmentPart(start=0, tokens=10),)}, "the whole prompt"),
    ],
)
def test_a_share_that_cannot_be_is_refused(changes: dict, reason: str):
    world = World(group=Quiet())
    world.tell(share(900, **({"members": (WorkerId("p9"), WORKER)} | changes)))
    (failed,) = world.of(SegmentFailed)
    assert reason in failed.reason
    assert not failed.retryable
    world.require_empty()
