"""Without disaggregation (a short decodes where it prefilled) and without colocation (an exclusive short)."""

from __future__ import annotations

import pytest

from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.prefill import DropRequest, KvReleased, PrefillFailed, PrefillFinished
from common.messages.requests import TokensGenerated
from common.messages.sp import LoadSegment, PauseSegment, RunSegment, SegmentFinished, SegmentPaused, SegmentPrefilled
from common.policy.prefill_worker import PrefillWorkerCore
from common.units import RequestId
from tests.policy.prefill_world import STOP_TOKEN, WORKER, World, config, load, run_prefill, spec


def rows(world: World) -> list[tuple[str, int, int]]:
    """Of the running pass: who, from where, how many tokens."""
    assert world.running is not None
    return [(segment.request_id, segment.start, segment.tokens) for segment in world.running.segments]


def here(world: World, name: str, tokens: int, *, max_tokens: int = 16, attempt: int = 0, exclusive: bool = False):
    order = run_prefill(spec(name, tokens, max_tokens=max_tokens, attempt=attempt), here=True, exclusive=exclusive)
    world.tell(order)


def run_long(world: World, name: str, tokens: int, max_tokens: int = 16) -> LoadSegment:
    order = load(spec(name, tokens, max_tokens=max_tokens))
    world.tell(order)
    world.tell(RunSegment(worker_id=WORKER, request_id=RequestId(name), attempt=0, epoch=1))
    return order


def with_decoding_long(max_tokens: int = 16) -> World:
    world = World()
    run_long(world, "long", 600, max_tokens)
    while not world.of(SegmentPrefilled):
        world.finish()
    return world


def drop(world: World, name: str) -> None:
    world.tell(DropRequest(worker_id=WORKER, request_id=RequestId(name), attempt=0, epoch=1))


# --- a short that decodes where it prefilled ---


def test_a_short_decodes_where_it_prefilled_and_says_what_a_decode_worker_would():
    world = World()
    here(world, "a", 100, max_tokens=3)
    assert [(h.phase, h.kv_tokens) for h in world.core.holdings()] == [("prefill", 103)], "its whole KV is reserved"
    world.finish()
    assert rows(world) == [("a", 100, 1)]
    assert [h.phase for h in world.core.holdings()] == ["decode"]
    assert world.located[RequestId("a")].location.state == "decoding"
    world.settle()
    assert [type(message) for message in world.sent if not isinstance(message, TokensGenerated)] == [
        PrefillFinished,
        DecodeFinished,
    ]
    assert world.tokens_of("a") == [(0, 7), (1, 7), (2, 7)]
    assert [(m.finish_reason, m.generated) for m in world.of(DecodeFinished)] == [("length", 3)]
    assert [m.kv_tokens for m in world.of(DecodeFinished)] == [103]
    world.require_empty()


def test_a_stop_token_ends_it_in_the_middle():
    world = World()
    here(world, "a", 100)
    world.finish()
    world.finish(STOP_TOKEN)
    assert [(m.finish_reason, m.generated) for m in world.of(DecodeFinished)] == [("stop", 2)]
    world.require_empty()


@pytest.mark.parametrize(("max_tokens", "token", "reason"), [(1, 7, "length"), (5, STOP_TOKEN, "stop")])
def test_a_first_token_that_is_the_last_starts_no_decode(max_tokens: int, token: int, reason: str):
    world = World()
    here(world, "a", 20, max_tokens=max_tokens)
    world.finish(token)
    assert [m.finish_reason for m in world.of(PrefillFinished)] == [reason]
    assert not world.of(DecodeFinished, PrefillFailed)
    assert len(world.of(KvReleased)) == 1
    world.require_empty()


def test_several_decode_in_one_pass_and_shorts_prefill_beside_them_up_to_a_whole_batch():
    world = World()
    for name in "ab":
        here(world, name, 50)
    world.finish()
    assert rows(world) == [("a", 50, 1), ("b", 0, 50)]
    here(world, "c", 400)
    here(world, "d", 200)
    world.finish()
    assert rows(world) == [("b", 50, 1), ("a", 51, 1), ("c", 0, 400)], "d does not fit into a batch of 512"
    world.finish()
    assert sorted(rows(world)) == [("a", 52, 1), ("b", 51, 1), ("c", 400, 1), ("d", 0, 200)]
    world.settle()
    assert len(world.of(DecodeFinished)) == 4
    world.require_empty()


def test_no_more_decode_at_once_than_the_engine_has_rows():
    world = World(core=PrefillWorkerCore(config(rows_max=3)))
    for name in "abcde":
        here(world, name, 10, max_tokens=4)
    seen = []
    while world.running is not None:
        seen.append(len(rows(world)))
        world.finish()
    assert max(seen) == 3
    assert len(world.of(DecodeFinished)) == 5
    world.require_empty()


def test_beside_a_prefilling_long_its_steps_alternate_with_chunks():
    world = World()
    here(world, "a", 10)
    run_long(world, "long", 1_500)
    seen = []
    for _ in range(4):
        world.finish()
        seen.append([name for name, _, _ in rows(world)])
    assert seen == [["long"], ["a"], ["long"], ["a"]]


def test_a_pause_of_a_long_meets_no_decode_step():
    """A long that is paused between two chunks, while the rows of shorts run, is paused at once."""
    world = World()
    here(world, "a", 10)
    run_long(world, "long", 1_500)
    world.finish()
    world.finish()
    assert rows(world) == [("a", 10, 1)]
    world.tell(PauseSegment(worker_id=WORKER, request_id=RequestId("long"), attempt=0, epoch=1))
    assert [m.pause_latency_s for m in world.of(SegmentPaused)] == [0.0]
    world.settle()
    assert [m.request_id for m in world.of(DecodeFinished)] == ["a"], "it goes on while the long stands"


def test_only_the_chunks_of_longs_run_in_the_background():
    world = World()
    here(world, "a", 10, max_tokens=2)
    world.settle()
    run_long(world, "long", 600, max_tokens=2)
    world.settle()
    assert [(len(p), p[0].tokens) for p in world.passes] == [(1, 10), (1, 1), (1, 512), (1, 88), (1, 1)]
    assert world.in_background == [False, False, True, True, False]


@pytest.mark.parametrize("when", ["opening", "running", "between passes", "decoding", "decoding, not in the pass"])
def test_a_drop_is_legal_in_every_state_and_ends_in_one_release(when: str):
    world = World(auto_open=when != "opening")
    here(world, "a", 600)
    if when == "between passes":
        run_long(world, "long", 600)
    if when.startswith("decoding"):
        world.finish()
        world.finish()
        assert [h.phase for h in world.core.holdings()] == ["decode"]
    if when == "decoding, not in the pass":
        run_long(world, "long", 600)
        world.finish()
        assert rows(world) == [("long", 0, 512)]
    drop(world, "a")
    drop(world, "a")
    world.settle()
    released = [m for m in world.of(KvReleased) if m.request_id == "a"]
    assert len(released) == (2 if when == "decoding, not in the pass" else 1), "a second drop finds nothing held"
    assert not world.of(DecodeFinished, DecodeFailed, PrefillFailed)
    world.tell(run_prefill(spec("b", 10)))
    world.settle()
    assert "b" in world.started()


def test_a_later_attempt_ends_the_decode_of_the_held_one_first():
    world = World()
    here(world, "a", 10)
    world.finish()
    here(world, "a", 11, attempt=1, max_tokens=2)
    assert {(h.attempt, h.phase) for h in world.core.holdings()} == {(0, "decode"), (1, "queued")}
    world.settle()
    assert [m.attempt for m in world.of(KvReleased)] == [0]
    assert [m.attempt for m in world.of(DecodeFinished)] == [1]
    world.require_empty()


def test_a_failed_pass_fails_who_decodes_and_who_prefills_in_it_each_in_its_own_words():
    world = World()
    here(world, "a", 10)
    world.finish()
    here(world, "b", 10)
    world.finish()
    assert rows(world) == [("a", 11, 1), ("b", 0, 10)]
    world.fail_pass()
    assert [m.request_id for m in world.of(DecodeFailed)] == ["a"]
    assert [m.request_id for m in world.of(PrefillFailed)] == ["b"]
    assert [m.request_id for m in world.of(KvReleased)] == ["a", "b"]
    world.require_empty()


# --- an exclusive short ---


def test_an_exclusive_short_shares_no_pass_with_the_decode_of_a_long_which_then_goes_on():
    world = with_decoding_long(max_tokens=6)
    world.tell(run_prefill(spec("a", 300), exclusive=True))
    world.finish()
    assert rows(world) == [("a", 0, 300)], "all of it, not what a decode step has room for"
    world.finish()
    assert rows(world) == [("long", 601, 1)]
    world.settle()
    assert [m.request_id for m in world.of(SegmentFinished)] == ["long"]
    world.require_empty()


def test_a_stream_of_exclusive_shorts_cannot_silence_a_decoding_long():
    world = with_decoding_long()
    for name in "abcd":
        world.tell(run_prefill(spec(name, 300), exclusive=True))
    seen = []
    for _ in range(8):
        world.finish()
        seen.append([name for name, _, _ in rows(world)])
    assert seen == [["a"], ["long"], ["b"], ["long"], ["c"], ["long"], ["d"], ["long"]]


def test_an_exclusive_short_longer_than_a_batch_is_not_held_up_in_its_middle():
    world = with_decoding_long()
    world.tell(run_prefill(spec("big", 1_100), exclusive=True))
    seen = []
    for _ in range(4):
        world.finish()
        seen.append(rows(world))
    assert seen == [[("big", 0, 512)], [("big", 512, 512)], [("big", 1_024, 76)], [("long", 601, 1)]]


def test_exclusive_shorts_behind_others_wait_for_them():
    world = with_decoding_long()
    world.tell(run_prefill(spec("shares", 250)))
    world.tell(run_prefill(spec("alone", 50), exclusive=True))
    world.tell(run_prefill(spec("shares too", 50)))
    seen = []
    for _ in range(4):
        world.finish()
        seen.append([(name, tokens) for name, _, tokens in rows(world)])
    assert seen == [
        [("long", 1), ("shares", 192)],
        [("long", 1), ("shares", 58)],
        [("alone", 50)],
        [("long", 1), ("shares too", 50)],
    ]


def test_where_no_long_decodes_an_exclusive_short_is_like_any_other():
    world = World()
    here(world, "a", 50, max_tokens=4)
    world.finish()
    here(world, "b", 50, max_tokens=4, exclusive=True)
    world.tell(run_prefill(spec("c", 50)))
    world.finish()
    assert rows(world) == [("a", 51, 1), ("b", 0, 50), ("c", 0, 50)]


def test_exclusive_and_decoding_here_prefills_alone_and_decodes_in_the_steps_of_the_long():
    world = with_decoding_long()
    here(world, "a", 50, exclusive=True)
    seen = []
    for _ in range(2):
        world.finish()
        seen.append(rows(world))
    assert seen == [[("a", 0, 50)], [("a", 50, 1), ("long", 601, 1)]]
    world.settle()
    world.require_empty()
