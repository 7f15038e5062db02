"""KV of a paused long moved out and back: the bounds of its pause, the group's core, the worker's core. (What the
scheduler decides, in golden scenarios 41 to 44; any interleaving, in the state machines.)"""

from __future__ import annotations

import pytest

from common.messages.prefill import KvReleased
from common.messages.sp import (
    DropSegment,
    GroupFailed,
    GroupFormed,
    GroupNotSpilled,
    GroupPaused,
    GroupSpilled,
    RestoreGroup,
    RestoreSegment,
    ResumeGroup,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentNotSpilled,
    SegmentPaused,
    SegmentPrefilled,
    SegmentSpilled,
    SpillGroup,
    SpillSegment,
)
from common.policy.preemption import PauseAccount, PauseBounds
from common.policy.prefill_events import CloseSequence, GroupLost, SpillKv, StopMove
from common.policy.sp_coordinator import SpCoordinator
from common.policy.sp_group import GroupState
from common.units import RequestId
from tests.policy.prefill_world import LAYERS, WORKER, World, load, run_prefill, spec
from tests.policy.test_prefill_worker import drop_segment, pause, run, with_running_long
from tests.policy.test_sp_group import ANSWER_S, Scene, kinds

MOVE_S = 30.0
LONG = RequestId("long")

# --- the bounds of a pause -----------------------------------------------------------------------

BOUNDS = PauseBounds(pause_max_s=10.0, share_max=1.0, immunity_s=0.1, remaining_min_s=0.1)


def test_the_way_back_counts_in_the_bounds_of_a_pause():
    account = PauseAccount(started_s=0.0, estimate_s=60.0)
    account.paused(20.0)
    account.moved_out(22.0, took_s=2.0, reserved=(500, 500))
    assert account.pause_left_s(22.0, BOUNDS) == pytest.approx(10.0 - 2.0 - 2.0)
    account.spilled = ()
    assert account.pause_left_s(22.0, BOUNDS) == pytest.approx(10.0 - 2.0)


def test_it_is_not_moved_again_before_it_has_run_for_as_long_as_both_ways_took():
    account = PauseAccount(started_s=0.0, estimate_s=60.0)
    assert account.may_spill(0.0)
    account.paused(20.0)
    account.moved_out(21.0, took_s=1.0, reserved=(500,))
    assert not account.may_spill(25.0), "not in the same pause"
    account.resumed(25.0, BOUNDS)
    assert not account.may_spill(26.9)
    assert account.may_spill(27.1)


def test_a_move_that_took_no_time_is_not_repeated_in_its_pause():
    account = PauseAccount(started_s=0.0, estimate_s=60.0)
    account.paused(20.0)
    account.moved_out(20.0, took_s=0.0, reserved=(500,))
    assert not account.may_spill(29.0)


# --- the group -----------------------------------------------------------------------------------


def paused(ranks: int) -> Scene:
    return Scene(ranks, core=SpCoordinator(ANSWER_S, MOVE_S)).paused()


def spilled(ranks: int) -> Scene:
    scene = paused(ranks)
    scene.order(SpillGroup)
    scene.words(SegmentSpilled, kv_bytes=7)
    assert scene.state is GroupState.SPILLED
    return scene


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_group_is_moved_out_and_back_and_stands_as_before(ranks: int):
    scene = paused(ranks)
    out = scene.order(SpillGroup)
    assert [(type(order), order.worker_id) for order in out] == [(SpillSegment, member) for member in scene.members]
    for rank in range(ranks - 1):
        assert scene.word(SegmentSpilled, rank, kv_bytes=7) == []
    assert kinds(scene.word(SegmentSpilled, ranks - 1, kv_bytes=7)) == [GroupFormed, GroupSpilled]
    out = scene.order(RestoreGroup)
    assert [(type(order), order.worker_id) for order in out] == [(RestoreSegment, member) for member in scene.members]
    out = scene.words(SegmentPaused)
    assert kinds(out) == [GroupFormed, GroupPaused]
    assert out[-1].step == 10
    assert scene.state is GroupState.PAUSED
    assert RunSegment in kinds(scene.order(ResumeGroup))


@pytest.mark.parametrize("refuses", [0, 1, 2])
@pytest.mark.parametrize("last", [True, False])
def test_if_one_rank_cannot_the_others_bring_theirs_back(refuses: int, last: bool):
    scene = paused(3)
    scene.order(SpillGroup)
    others = [rank for rank in range(3) if rank != refuses]
    out = []
    for rank in [*others, refuses] if last else [refuses, *others]:
        if rank == refuses:
            out += scene.word(SegmentNotSpilled, rank, reason="disk full")
        else:
            out += scene.word(SegmentSpilled, rank, kv_bytes=7)
    assert [(type(order), order.worker_id) for order in out] == [(RestoreSegment, f"w{rank}") for rank in others]
    assert scene.word(SegmentPaused, others[0]) == []
    (said,) = scene.word(SegmentPaused, others[1])
    assert isinstance(said, GroupNotSpilled)
    assert said.reason == f"rank {refuses} (w{refuses}): disk full"
    assert scene.state is GroupState.PAUSED
    assert kinds(scene.order(SpillGroup)) == [SpillSegment] * 3, "it may be asked again"
    assert kinds(scene.words(SegmentSpilled, kv_bytes=7))[-1] is GroupSpilled


def test_if_none_can_nobody_has_anything_to_bring_back():
    scene = paused(2)
    scene.order(SpillGroup)
    assert kinds(scene.words(SegmentNotSpilled, reason="disk full")) == [GroupNotSpilled]
    assert scene.state is GroupState.PAUSED


def test_orders_that_are_repeated_or_late_are_answered_by_where_the_group_stands():
    scene = paused(2)
    assert kinds(scene.order(RestoreGroup)) == [GroupFormed, GroupPaused]
    scene.order(SpillGroup)
    assert scene.order(SpillGroup) == scene.order(RestoreGroup) == [], "the answer is still to come"
    scene.words(SegmentSpilled, kv_bytes=7)
    for order in (SpillGroup, ResumeGroup):
        assert kinds(scene.order(order)) == [GroupFormed, GroupSpilled]
    assert kinds(scene.core.standings()) == [GroupFormed, GroupSpilled]
    scene.order(RestoreGroup)
    assert scene.order(RestoreGroup) == scene.order(SpillGroup) == []
    scene.words(SegmentPaused)
    assert kinds(scene.order(RestoreGroup)) == [GroupFormed, GroupPaused]


@pytest.mark.parametrize("back", [False, True])
def test_a_rank_may_take_longer_to_move_than_to_answer_but_not_for_ever(back: bool):
    scene = spilled(2) if back else paused(2)
    scene.order(RestoreGroup if back else SpillGroup)
    scene.word(SegmentPaused if back else SegmentSpilled, 0, **({} if back else {"kv_bytes": 7}))
    assert scene.pass_time(ANSWER_S + 1.0) == []
    out = scene.pass_time(MOVE_S)
    assert scene.now_s == pytest.approx(0.1 + MOVE_S)
    assert {order.worker_id for order in out if isinstance(order, DropSegment)} == {"w0", "w1"}
    (failed,) = scene.word(SegmentDropped, 0)
    assert isinstance(failed, GroupFailed)
    assert "rank 1 (w1)" in failed.reason
    assert f"{MOVE_S:g} s" in failed.reason


@pytest.mark.parametrize("state", [GroupState.SPILLING, GroupState.SPILLED, GroupState.RESTORING])
def test_a_rank_that_fails_or_runs_on_ends_the_group_in_every_state(state: GroupState):
    for word in (SegmentFailed, SegmentPrefilled, SegmentDropped):
        scene = paused(2) if state is GroupState.SPILLING else spilled(2)
        if state is not GroupState.SPILLED:
            scene.order(SpillGroup if state is GroupState.SPILLING else RestoreGroup)
        assert scene.state is state
        out = scene.word(word, 0)
        assert DropSegment in kinds(out)
        assert scene.state is GroupState.DISSOLVING


# --- the worker ----------------------------------------------------------------------------------


def order(kind: type[SpillSegment | RestoreSegment]) -> SpillSegment | RestoreSegment:
    return kind(worker_id=WORKER, request_id=LONG, attempt=0, epoch=1)


def stopped_in_a_chunk() -> World:
    world = with_running_long()
    world.step()
    world.tell(pause("long"))
    world.step()
    return world


def moved_out() -> World:
    world = stopped_in_a_chunk()
    world.tell(order(SpillSegment))
    world.moved(LONG)
    return world


def test_a_long_stopped_in_a_chunk_goes_on_in_it_after_its_kv_was_elsewhere():
    world = stopped_in_a_chunk()
    (kept,) = world.core.holdings()
    world.tell(order(SpillSegment))
    assert world.core.holdings() == (kept,), "until it is moved"
    world.moved(LONG)
    assert world.of(SegmentSpilled)
    assert [held.kv_tokens for held in world.core.holdings()] == [0]
    location = world.located[LONG].location
    assert (location.state, location.moved_to, location.reserved_tokens) == ("spilled", "disk", 0)
    world.tell(run_prefill(spec("short", 100)))
    world.settle()
    world.tell(order(RestoreSegment))
    world.moved(LONG)
    first, again = world.of(SegmentPaused)
    assert (first.step, first.prefilled_tokens) == (again.step, again.prefilled_tokens) == (2, 0)
    assert world.located[LONG].location.state == "paused"
    assert world.core.holdings() == (kept,)
    world.tell(run("long"))
    world.settle()
    assert max(world.computed.values()) == 1
    assert world.of(SegmentPrefilled)[0].steps == 3 * LAYERS


def test_orders_to_move_are_idempotent():
    world = stopped_in_a_chunk()
    world.tell(order(RestoreSegment))
    assert len(world.of(SegmentPaused)) == 2
    assert [type(command) for command in world.tell(order(SpillSegment)) if isinstance(command, SpillKv)] == [SpillKv]
    assert world.tell(order(SpillSegment)) == world.tell(order(RestoreSegment)) == []
    world.moved(LONG)
    world.tell(order(SpillSegment))
    assert len(world.of(SegmentSpilled)) == 2
    for late in (run("long"), pause("long")):
        assert world.tell(late) == []


def test_who_runs_is_not_moved_and_a_stranger_has_failed():
    world = with_running_long()
    world.tell(order(SpillSegment))
    (refused,) = world.of(SegmentNotSpilled)
    assert "running" in refused.reason
    world.tell(SpillSegment(worker_id=WORKER, request_id=RequestId("other"), attempt=0))
    assert world.of(SegmentFailed)


def test_a_refused_move_leaves_it_as_it_was():
    world = stopped_in_a_chunk()
    world.tell(order(SpillSegment))
    world.moved(LONG, failed=True)
    assert world.of(SegmentNotSpilled)[0].reason == "full"
    assert world.located[LONG].location.state == "paused"
    world.tell(run("long"))
    world.settle()
    assert max(world.computed.values()) == 1


def test_kv_that_is_not_brought_back_fails_the_segment():
    world = moved_out()
    world.tell(order(RestoreSegment))
    world.moved(LONG, failed=True)
    (failed,) = world.of(SegmentFailed)
    assert failed.retryable
    assert "not brought back" in failed.reason
    world.require_empty()


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("how", ["dropped", "lost"])
def test_the_end_of_a_long_ends_its_move_and_waits_for_that(how: str, back: bool, failed: bool):
    world = moved_out() if back else stopped_in_a_chunk()
    world.tell(order(RestoreSegment if back else SpillSegment))
    if how == "lost":
        world.core.books.held(LONG, 0).size = 2
    ends = drop_segment("long") if how == "dropped" else GroupLost(request_id=LONG, attempt=0, reason="gone")
    assert [type(command) for command in world.tell(ends)] == [StopMove]
    assert world.tell(drop_segment("long")) == [], "it was told once"
    world.moved(LONG, failed=failed)
    assert world.of(SegmentDropped)
    world.require_empty()


def test_what_lies_elsewhere_is_dropped_at_once():
    world = moved_out()
    commands = world.tell(drop_segment("long"))
    assert {type(command) for command in commands} >= {CloseSequence, SegmentDropped}
    assert not world.of(KvReleased)
    world.require_empty()


def test_a_long_that_was_loaded_and_never_ran_may_be_moved_too():
    world = World()
    world.tell(load(spec("long", 1_500)))
    world.tell(order(SpillSegment))
    world.moved(LONG)
    world.tell(order(RestoreSegment))
    world.moved(LONG)
    assert world.of(SegmentPaused)[0].step == 0
    world.tell(run("long"))
    world.settle()
    assert max(world.computed.values()) == 1
    assert world.of(SegmentPrefilled)
