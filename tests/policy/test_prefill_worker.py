"""The prefill worker's core against a world that plays engine, data plane and bus."""

from __future__ import annotations

import msgspec
import pytest

from common.messages.cluster import StepCost
from common.messages.prefill import DropRequest, KvReleased, PrefillFailed, PrefillFinished
from common.messages.sp import (
    DropSegment,
    PauseSegment,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentPart,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.policy.core import InvariantViolated
from common.policy.costs import CHUNK_GRAIN_TOKENS
from common.policy.prefill_events import PassFinished, StopPass
from common.policy.prefill_jobs import LONG_TRANSITIONS, SHORT_TRANSITIONS
from common.policy.prefill_worker import PrefillWorkerCore
from common.units import RequestId, WorkerId
from tests.policy.prefill_world import LAYERS, STOP_TOKEN, WORKER, World, config, load, run_prefill, spec


def run(name: str, attempt: int = 0, epoch: int = 1) -> RunSegment:
    return RunSegment(worker_id=WORKER, request_id=RequestId(name), attempt=attempt, epoch=epoch)


def pause(name: str, attempt: int = 0) -> PauseSegment:
    return PauseSegment(worker_id=WORKER, request_id=RequestId(name), attempt=attempt, epoch=1)


def drop(name: str, attempt: int = 0) -> DropRequest:
    return DropRequest(worker_id=WORKER, request_id=RequestId(name), attempt=attempt, epoch=1)


def drop_segment(name: str, attempt: int = 0) -> DropSegment:
    return DropSegment(worker_id=WORKER, request_id=RequestId(name), attempt=attempt, epoch=1)


def segments(world: World) -> list[tuple[str, int, int]]:
    """Of the running pass."""
    assert world.running is not None
    return [(segment.request_id, segment.start, segment.tokens) for segment in world.running.segments]


def with_running_long(tokens: int = 1_500, max_tokens: int = 16, **changes: object) -> World:
    world = World(core=PrefillWorkerCore(config(**changes)))
    world.tell(load(spec("long", tokens, max_tokens=max_tokens)))
    world.tell(run("long"))
    return world


def with_decoding_long(tokens: int = 600, max_tokens: int = 16, **changes: object) -> World:
    world = with_running_long(tokens, max_tokens, **changes)
    while not world.of(SegmentPrefilled):
        world.finish()
    return world


# --- shorts ---


def test_a_short_streams_its_first_token_is_delivered_and_its_kv_is_freed_after_the_handoff():
    world = World()
    world.now_s = 5.0
    world.tell(run_prefill(spec("a", 100, generated_before=3)))
    assert segments(world) == [("a", 0, 100)]
    assert [h.phase for h in world.core.holdings()] == ["prefill"]
    world.finish()
    assert world.tokens_of("a") == [(3, 7)], "the first token counts on from earlier attempts"
    assert world.of(PrefillFinished)[0].finish_reason is None
    assert [h.phase for h in world.core.holdings()] == ["handoff"]
    assert not world.of(KvReleased)
    world.handoff("a")
    assert [m.kv_tokens for m in world.of(KvReleased)] == [100]
    world.require_empty()


def test_tokens_leave_before_the_word_that_they_are_out():
    world = World()
    world.tell(run_prefill(spec("a", 10)))
    world.finish()
    kinds = [type(message).__name__ for message in world.sent]
    assert kinds.index("TokensGenerated") < kinds.index("PrefillFinished")


def test_shorts_are_packed_in_their_order_and_not_beyond_the_batch():
    world = World()
    for name, tokens in [("a", 50), ("b", 300), ("c", 200), ("d", 100), ("e", 5)]:
        world.tell(run_prefill(spec(name, tokens)))
    assert segments(world) == [("a", 0, 50)]
    world.finish()
    assert segments(world) == [("b", 0, 300), ("c", 0, 200)], "d does not fit, and e does not overtake it"
    world.finish()
    assert segments(world) == [("d", 0, 100), ("e", 0, 5)]
    world.settle()
    assert world.started() == ["a", "b", "c", "d", "e"]
    world.require_empty()


def test_a_short_above_the_batch_is_split_and_its_rest_is_packed_with_others():
    world = World()
    world.tell(run_prefill(spec("big", 1_100)))
    world.tell(run_prefill(spec("b", 400)))
    world.tell(run_prefill(spec("c", 200)))
    assert segments(world) == [("big", 0, 512)]
    world.finish()
    assert segments(world) == [("big", 512, 512)]
    world.finish()
    assert segments(world) == [("big", 1_024, 76), ("b", 0, 400)]
    world.settle()
    assert world.started() == ["big", "b", "c"]
    assert world.of(PrefillFinished)[0].compute_s == pytest.approx(0.3)
    world.require_empty()


def test_a_pass_takes_no_more_rows_than_the_engine():
    world = World(core=PrefillWorkerCore(config(rows_max=2)))
    world.tell(run_prefill(spec("first", 10)))
    for name in "abc":
        world.tell(run_prefill(spec(name, 10)))
    world.finish()
    assert [name for name, _, _ in segments(world)] == ["a", "b"]


@pytest.mark.parametrize(("max_tokens", "token", "reason"), [(1, 7, "length"), (5, STOP_TOKEN, "stop")])
def test_a_first_token_that_is_the_last_ends_here(max_tokens: int, token: int, reason: str):
    world = World()
    world.tell(run_prefill(spec("a", 20, max_tokens=max_tokens)))
    world.finish(token)
    assert world.of(PrefillFinished)[0].finish_reason == reason
    if world.streams:  # begun for a handoff that is not needed: ended first
        world.handoff("a", failed=True)
    assert not world.of(PrefillFailed)
    assert len(world.of(KvReleased)) == 1
    world.require_empty()


def test_a_failed_handoff_fails_its_request_alone():
    world = World()
    world.tell(run_prefill(spec("x", 10)))
    world.tell(run_prefill(spec("a", 10)))
    world.tell(run_prefill(spec("b", 10)))
    world.finish()
    world.finish()
    world.handoff("a", failed=True)
    assert [m.request_id for m in world.of(PrefillFailed)] == ["a"]
    world.settle()
    assert sorted(m.request_id for m in world.of(KvReleased)) == ["a", "b", "x"]
    world.require_empty()


def test_a_failed_pass_fails_those_in_it_and_nothing_else():
    world = World()
    world.tell(run_prefill(spec("x", 10)))
    world.tell(run_prefill(spec("a", 500)))
    world.tell(run_prefill(spec("b", 500)))
    world.finish()
    world.fail_pass()
    world.settle()
    assert [(m.request_id, m.retryable) for m in world.of(PrefillFailed)] == [("a", True)]
    assert [m.request_id for m in world.of(PrefillFinished)] == ["x", "b"]
    world.require_empty()


def test_what_cannot_be_opened_fails_and_holds_up_nobody():
    world = World(auto_open=False)
    world.tell(run_prefill(spec("a", 10)))
    world.tell(run_prefill(spec("b", 10)))
    world.opened("b")
    assert segments(world) == [("b", 0, 10)]
    world.open_failed("a")
    assert [m.request_id for m in world.of(PrefillFailed)] == ["a"]
    world.settle()
    world.require_empty()


@pytest.mark.parametrize("when", ["opening", "queued", "running", "between passes", "handoff"])
def test_a_drop_is_legal_in_every_state_and_ends_in_one_release(when: str):
    world = World(auto_open=when != "opening")
    world.tell(run_prefill(spec("first", 600)))
    world.tell(run_prefill(spec("a", 600)))
    if when in ("running", "between passes", "handoff"):
        world.finish()
        world.finish()
    if when == "between passes":
        world.tell(run_prefill(spec("b", 600)))
    if when == "handoff":
        world.finish()
        world.finish()
    world.tell(drop("a"))
    if any(holding.request_id == "a" for holding in world.core.holdings()):
        world.tell(drop("a"))
    world.settle()
    assert len([m for m in world.of(KvReleased) if m.request_id == "a"]) == 1
    assert not world.of(PrefillFailed)
    world.require_empty()


def test_a_drop_of_the_unknown_or_of_an_older_attempt_is_answered_and_changes_nothing():
    world = World()
    world.tell(drop("nobody", 3))
    world.tell(run_prefill(spec("a", 10, attempt=2)))
    world.tell(drop("a", 1))
    assert [(m.request_id, m.attempt, m.kv_tokens) for m in world.of(KvReleased)] == [("nobody", 3, 0), ("a", 1, 0)]
    world.settle()
    assert [m.attempt for m in world.of(PrefillFinished)] == [2]


def test_a_later_attempt_drops_the_held_one_first_and_then_runs():
    world = World()
    world.tell(run_prefill(spec("a", 10)))
    world.tell(run_prefill(spec("a", 11, attempt=1)))
    world.tell(run_prefill(spec("a", 12, attempt=2)))
    assert [m.attempt for m in world.of(KvReleased)] == [1], "the one overtaken before it was taken up"
    assert {(h.request_id, h.attempt) for h in world.core.holdings()} == {("a", 0), ("a", 2)}
    world.settle()
    assert [m.attempt for m in world.of(KvReleased)] == [1, 0, 2]
    assert [m.attempt for m in world.of(PrefillFinished)] == [2]
    world.require_empty()


def test_a_drop_of_the_later_attempt_takes_the_waiting_order_too():
    world = World()
    world.tell(run_prefill(spec("a", 10)))
    world.tell(run_prefill(spec("a", 11, attempt=1)))
    world.tell(drop("a", 1))
    world.settle()
    assert sorted(m.attempt for m in world.of(KvReleased)) == [0, 1]
    assert not world.of(PrefillFinished)
    world.require_empty()


def test_orders_of_an_older_term_or_for_another_worker_are_ignored():
    world = World()
    world.tell(run_prefill(spec("a", 10), epoch=5))
    world.tell(run_prefill(spec("b", 10), epoch=4))
    elsewhere = msgspec.structs.replace(run_prefill(spec("c", 10), epoch=9), worker_id=WorkerId("p1"))
    world.tell(elsewhere)
    world.settle()
    assert world.started() == ["a"]
    assert world.core.epoch == 5


def test_repeated_orders_change_nothing():
    world = World()
    for _ in range(2):
        world.tell(run_prefill(spec("a", 10)))
    world.settle()
    assert world.started() == ["a"]
    world.require_empty()


def test_no_more_requests_are_taken_than_the_bound():
    world = World(core=PrefillWorkerCore(config(requests_max=1)))
    world.tell(run_prefill(spec("a", 10)))
    world.tell(run_prefill(spec("b", 10)))
    world.tell(load(spec("c", 10)))
    assert [(m.request_id, m.retryable) for m in world.of(PrefillFailed)] == [("b", True)]
    assert [m.request_id for m in world.of(SegmentFailed)] == ["c"]


# --- longs ---


def test_a_long_runs_in_chunks_then_decodes_and_frees_its_kv():
    world = with_running_long(1_100, max_tokens=3)
    assert [type(m) for m in world.sent] == [SegmentLoaded, SegmentRunning]
    world.settle()
    chunks = [(p[0].start, p[0].tokens) for p in world.passes]
    assert chunks == [(0, 512), (512, 512), (1_024, 76), (1_100, 1), (1_101, 1)]
    assert world.tokens_of("long") == [(0, 7), (1, 7), (2, 7)]
    assert world.of(SegmentPrefilled)[0].steps == 3 * LAYERS
    finished = world.of(SegmentFinished)
    assert [(m.finish_reason, m.generated) for m in finished] == [("length", 3)]
    world.require_empty()


def test_chunks_shrink_as_the_past_grows_so_that_steps_stay_short():
    cost = {"pass_s": 0.0, "token_s": 1e-4, "pair_s": 1e-6}
    core = PrefillWorkerCore(config(step_cost=msgspec.convert(cost, type(config().step_cost)), step_s_max=0.03))
    world = World(core=core)
    world.tell(load(spec("long", 1_500)))
    world.tell(run("long"))
    world.settle()
    chunks = [p[0] for p in world.passes if p[0].start < 1_500]
    assert len(chunks) > 3
    assert [c.tokens for c in chunks[:-1]] == sorted((c.tokens for c in chunks[:-1]), reverse=True)
    for chunk in chunks:
        step_s = (1e-4 * chunk.tokens + 1e-6 * chunk.tokens * (chunk.start + chunk.tokens / 2)) / LAYERS
        assert step_s <= 0.03
    assert all(chunk.tokens % CHUNK_GRAIN_TOKENS == 0 for chunk in chunks[:-1])


def test_a_running_long_holds_back_shorts_until_it_is_paused_and_goes_on_where_it_stood():
    world = with_running_long()
    world.step()
    world.tell(run_prefill(spec("a", 10)))
    assert segments(world)[0][0] == "long"
    world.tell(pause("long"))
    assert not world.of(SegmentPaused)
    world.step()
    paused = world.of(SegmentPaused)[0]
    assert (paused.step, paused.prefilled_tokens) == (2, 0)
    assert segments(world) == [("a", 0, 10)]
    world.tell(run_prefill(spec("b", 10)))
    world.tell(run("long"))
    world.finish()
    assert segments(world) == [("long", 0, 512)], "it continues though b waits"
    assert world.running is not None
    assert world.running.steps_done == 2
    world.settle()
    assert max(world.computed.values()) == 1
    assert world.started() == ["a", "b"]
    world.require_empty()


def test_a_long_waits_for_the_shorts_before_it_and_not_for_those_behind():
    world = World()
    world.tell(load(spec("long", 600)))
    world.tell(run_prefill(spec("x", 10)))
    world.tell(run_prefill(spec("a", 300)))
    world.tell(run("long"))
    world.tell(run_prefill(spec("b", 100)))
    world.finish()
    assert [name for name, _, _ in segments(world)] == ["a", "b"], "b shares a pass with what goes first anyway"
    world.tell(run_prefill(spec("c", 10)))
    world.finish()
    assert segments(world) == [("long", 0, 512)]
    world.settle()
    assert world.started() == ["x", "a", "b", "c"]


def test_a_short_that_began_ends_before_a_resumed_long_runs():
    world = with_running_long()
    world.step()
    world.tell(pause("long"))
    world.step()
    world.tell(run_prefill(spec("big", 1_000)))
    world.tell(run("long"))
    world.finish()
    assert segments(world) == [("big", 512, 488)], "its stream is open and must not fall silent"
    world.finish()
    assert segments(world)[0][0] == "long"


def test_pause_latency_counts_from_the_first_short_that_waited():
    world = with_running_long()
    world.tick(1.0)
    world.tell(run_prefill(spec("a", 10)))
    world.tick(0.010)
    world.tell(pause("long"))
    world.now_s += 0.005
    world.step()
    assert world.of(SegmentPaused)[0].pause_latency_s == pytest.approx(0.015)


def test_shorts_left_over_from_an_earlier_pause_do_not_count_as_waiting():
    world = with_running_long()
    world.tell(pause("long"))
    world.step()
    world.tell(run_prefill(spec("a", 10)))
    world.tell(run_prefill(spec("b", 10)))
    world.tell(run("long"))
    world.tick(1.0)
    world.finish()
    world.tick(1.0)
    world.tell(pause("long"))
    world.now_s += 0.003
    world.step()
    assert world.of(SegmentPaused)[1].pause_latency_s == pytest.approx(0.003)


def test_pauses_that_find_nothing_running_take_effect_at_once():
    world = World()
    world.tell(load(spec("long", 600)))
    world.tell(pause("long"))
    world.tell(pause("long"))
    assert [(m.step, m.pause_latency_s) for m in world.of(SegmentPaused)] == [(0, 0.0), (0, 0.0)]
    world.tell(run("long"))
    world.tell(run("long"))
    assert len(world.of(SegmentRunning)) == 2
    assert len(world.passes) == 1


def test_a_pause_that_meets_the_end_of_a_chunk_or_of_the_prefill():
    world = with_running_long(600)
    world.tell(pause("long"))
    world.finish()
    assert world.of(SegmentPaused)[0].step == LAYERS
    assert world.running is None
    world.tell(run("long"))
    world.tell(pause("long"))
    world.finish()
    assert len(world.of(SegmentPaused)) == 1, "void: the prefill ended first"
    assert len(world.of(SegmentPrefilled)) == 1
    world.tell(pause("long"))
    assert len(world.of(SegmentPaused)) == 1
    world.settle()
    world.require_empty()


def test_told_to_run_again_before_it_stopped():
    world = with_running_long()
    world.tell(pause("long"))
    world.tell(run("long"))
    world.step()
    assert not world.of(SegmentPaused)
    assert segments(world)[0][0] == "long"
    world.settle()
    assert max(world.computed.values()) == 1


@pytest.mark.parametrize("when", ["loading", "loaded", "running", "paused", "decoding"])
def test_a_segment_can_be_dropped_in_every_state(when: str):
    world = World(auto_open=when != "loading")
    world.tell(load(spec("long", 1_000)))
    if when in ("running", "paused", "decoding"):
        world.tell(run("long"))
        world.step()
    if when == "paused":
        world.tell(pause("long"))
        world.step()
    while when == "decoding" and not world.of(SegmentPrefilled):
        world.finish()
    world.tell(drop_segment("long"))
    if when == "running":
        assert world.stop_asked, "at once: not at the end of its chunk"
    world.settle()
    assert len(world.of(SegmentDropped)) == 1
    assert not world.of(SegmentFailed)
    world.require_empty()


def test_a_long_dropped_by_the_scheduler_is_told_to_both():
    world = with_running_long()
    world.tell(drop("long"))
    world.settle()
    assert len(world.of(KvReleased)) == 1
    assert len(world.of(SegmentFailed)) == 1
    world.require_empty()


def test_orders_about_longs_not_held_are_answered():
    world = World()
    world.tell(run("nobody"))
    world.tell(drop_segment("nobody"))
    assert [type(m) for m in world.sent] == [SegmentFailed, SegmentDropped]


def test_a_share_of_a_group_of_several_is_refused():
    world = World()
    order = msgspec.structs.replace(
        load(spec("long", 100)), members=(WORKER, WorkerId("p1")), parts=(SegmentPart(start=0, tokens=50),)
    )
    world.tell(order)
    assert [m.retryable for m in world.of(SegmentFailed)] == [False]
    assert not world.opening


# --- decoding longs ---


def test_shorts_share_the_passes_of_a_decoding_long_up_to_the_cap():
    world = with_decoding_long(max_tokens=8)
    world.tell(run_prefill(spec("a", 300)))
    world.tell(run_prefill(spec("b", 50)))
    world.finish()
    assert segments(world) == [("long", 601, 1), ("a", 0, 192)]
    world.finish()
    assert segments(world) == [("long", 602, 1), ("a", 192, 108), ("b", 0, 50)]
    world.settle()
    assert world.started() == ["a", "b"]
    assert [index for index, _ in world.tokens_of("long")] == list(range(8))
    world.require_empty()


def test_a_prefilling_and_a_decoding_long_alternate_and_shorts_wait():
    world = with_decoding_long()
    world.tell(load(spec("second", 2_000)))
    world.tell(run("second"))
    world.tell(run_prefill(spec("a", 10)))
    seen = []
    for _ in range(6):
        world.finish()
        seen.append([name for name, _, _ in segments(world)])
    assert seen == [["second"], ["long"], ["second"], ["long"], ["second"], ["long"]]


def test_a_chunk_that_holds_up_a_decoding_long_stops_after_its_turn_and_goes_on_after_the_row():
    world = with_decoding_long(step_cost=StepCost(pass_s=0.05, token_s=0.0, pair_s=0.0), long_itl_s_max=0.25)
    world.tell(load(spec("second", 512)))
    world.tell(run("second"))
    world.finish()
    assert segments(world) == [("second", 0, 512)]
    assert world.core.next_deadline_s() == pytest.approx(0.2), "the decode step takes 0.05 of 0.25 s"
    world.step()
    world.tick(0.2)
    world.step()
    assert segments(world) == [("long", 601, 1)], "after two of four steps"
    assert world.core.next_deadline_s() is None
    world.finish()
    assert segments(world) == [("second", 0, 512)], "the same pass"
    assert world.core.next_deadline_s() == pytest.approx(0.4)
    assert not world.of(SegmentPaused), "the long has not been paused"
    world.settle()
    assert max(world.computed.values()) == 1
    world.require_empty()


def test_a_decode_step_that_takes_longer_than_it_may_leaves_a_chunk_half_of_the_time():
    world = with_decoding_long(step_cost=StepCost(pass_s=0.3, token_s=0.0, pair_s=0.0), long_itl_s_max=0.25)
    world.tell(load(spec("second", 512)))
    world.tell(run("second"))
    world.finish()
    assert world.core.next_deadline_s() == pytest.approx(0.3)


def test_a_stop_token_ends_a_decoding_long():
    world = with_decoding_long()
    world.finish(STOP_TOKEN)
    assert [(m.finish_reason, m.generated) for m in world.of(SegmentFinished)] == [("stop", 2)]
    world.require_empty()


# --- the rest of the contract ---


def test_every_message_names_its_cause_and_the_story_tells_it():
    world = World()
    order = msgspec.structs.replace(run_prefill(spec("a", 10)), cause="s#17")
    world.tell(order)
    assert all(message.cause.startswith("p0#") for message in world.sent)
    assert "RunPrefill caused by s#17" in world.core.story(RequestId("a"))[0]


def test_a_word_about_something_unknown_is_an_error_that_tells_the_story():
    world = World()
    with pytest.raises(InvariantViolated, match="pass 9"):
        world.tell(PassFinished(pass_id=9, sampled=(), compute_s=0.0, last_layer_computed_s=0.0))


def test_one_stop_is_sent_per_pass():
    world = with_running_long()
    first = world.tell(pause("long"))
    second = world.tell(drop_segment("long"))
    assert sum(isinstance(command, StopPass) for command in [*first, *second]) == 1


def test_the_tables_end_in_gone():
    for table in (SHORT_TRANSITIONS, LONG_TRANSITIONS):
        assert all(targets or source == "gone" for source, targets in table.items())
