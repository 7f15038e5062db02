"""Lanes out of messages: the life of a short, of a long with a pause, of a group."""

from __future__ import annotations

import pytest

from common.messages.base import Message
from common.messages.decode import DecodeFailed, DecodeFinished
from common.messages.prefill import PrefillFailed, PrefillFinished, RunPrefill
from common.messages.requests import Prompt, RequestSpec
from common.messages.sp import (
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    SegmentDropped,
    SegmentPaused,
    SegmentRunning,
)
from common.units import RequestId, RouterId, WorkerId
from loadtest import live_lanes
from loadtest.live_lanes import Lanes, life_of, shifted
from loadtest.simulator.result import Span

A, B, D = WorkerId("prefill-0"), WorkerId("prefill-1"), WorkerId("decode-0")
SHORT, LONG = RequestId("short"), RequestId("long")


def spec(name: RequestId) -> RequestSpec:
    prompt = Prompt(tokens=1, inline=b"\0\0\0\0")
    return RequestSpec(request_id=name, router_id=RouterId("r"), prompt=prompt, max_tokens=2)


def of(kind: type[Message], name: RequestId, **more: object) -> Message:
    return kind(request_id=name, attempt=0, **more)  # type: ignore[call-arg]


def prefilled(
    name: RequestId, worker_id: WorkerId, *, waited_s: float, in_worker_s: float, last: bool = False
) -> Message:
    return PrefillFinished(
        worker_id=worker_id,
        request_id=name,
        attempt=0,
        compute_s=0.1,
        last_layer_computed_s=0.0,
        waited_s=waited_s,
        in_worker_s=in_worker_s,
        finish_reason="length" if last else None,
    )


def ordered(name: RequestId, worker_id: WorkerId) -> Message:
    return RunPrefill(worker_id=worker_id, spec=spec(name), decode_worker_id=D, decode_address="")


def decoded(name: RequestId) -> Message:
    return of(DecodeFinished, name, worker_id=D, finish_reason="length", generated=2)


def paused(name: RequestId) -> Message:
    return of(GroupPaused, name, step=3, prefilled_tokens=512, pause_latency_s=0.01)


def heard(*told: tuple[float, Message], end_s: float = 100.0) -> Lanes:
    lanes = Lanes()
    for at_s, message in told:
        lanes.hear(at_s, message)
    lanes.close(end_s)
    return lanes


def test_a_short_prefills_after_it_waited_and_decodes_elsewhere() -> None:
    lanes = heard(
        (1.0, ordered(SHORT, A)), (1.6, prefilled(SHORT, A, waited_s=0.2, in_worker_s=0.55)), (2.5, decoded(SHORT))
    )
    assert lanes.spans == [
        Span(A, "short prefill", 1.2, 1.6, SHORT),
        Span(f"{D} decode", "short decode", 1.6, 2.5, SHORT),
    ]
    assert life_of(lanes.lives, SHORT).started_s == pytest.approx(1.2)


def test_a_short_whose_first_token_is_its_last_does_not_decode() -> None:
    lanes = heard((1.0, ordered(SHORT, A)), (1.5, prefilled(SHORT, A, waited_s=0.0, in_worker_s=0.5, last=True)))
    assert [span.kind for span in lanes.spans] == ["short prefill"]


def test_an_order_that_was_not_heard_is_reckoned_from_what_the_worker_says() -> None:
    lanes = heard((2.0, prefilled(SHORT, A, waited_s=0.1, in_worker_s=0.5)))
    assert lanes.spans == [Span(A, "short prefill", 1.6, 2.0, SHORT)]


def test_the_first_start_counts_and_a_failed_prefill_leaves_nothing_open() -> None:
    lanes = heard(
        (1.0, ordered(SHORT, A)),
        (1.1, of(PrefillFailed, SHORT, worker_id=A, reason="lost")),
        (2.0, ordered(SHORT, B)),
        (2.5, prefilled(SHORT, B, waited_s=0.1, in_worker_s=0.4)),
        (3.0, of(DecodeFailed, SHORT, worker_id=D, reason="lost")),
    )
    assert [(span.lane, span.begin_s, span.end_s) for span in lanes.spans] == [(B, 2.1, 2.5), (f"{D} decode", 2.5, 3.0)]
    assert not lanes.ordered_s


def test_a_long_is_paused_and_goes_on() -> None:
    lanes = heard(
        (0.9, FormGroup(spec=spec(LONG), members=(A,))),
        (1.0, of(SegmentRunning, LONG, worker_id=A)),
        (3.0, of(SegmentPaused, LONG, worker_id=A, step=3, prefilled_tokens=512, pause_latency_s=0.01)),
        (3.01, paused(LONG)),
        (3.5, of(SegmentRunning, LONG, worker_id=A)),
        (3.51, of(GroupResumed, LONG)),
        (6.0, of(GroupPrefillFinished, LONG, compute_s=4.0)),
        (7.0, of(GroupFinished, LONG, finish_reason="length", generated=2)),
        (7.1, of(SegmentDropped, LONG, worker_id=A)),
    )
    assert [(span.kind, span.begin_s, span.end_s) for span in lanes.spans] == [
        ("long prefill", 1.0, 3.0),
        ("paused", 3.0, 3.5),
        ("long prefill", 3.5, 6.0),
        ("long decode", 6.0, 7.0),
    ]
    life = life_of(lanes.lives, LONG)
    assert (life.started_s, life.pauses, life.members) == (1.0, 1, (A,))
    assert life.suspended_s == pytest.approx(0.5)


def test_a_group_has_begun_when_all_of_it_runs_and_ends_as_one() -> None:
    lanes = heard(
        (0.9, FormGroup(spec=spec(LONG), members=(A, B))),
        (1.0, of(SegmentRunning, LONG, worker_id=B)),
        (1.4, of(SegmentRunning, LONG, worker_id=A)),
        (2.0, of(GroupFailed, LONG, reason="rank 1 was lost")),
    )
    assert life_of(lanes.lives, LONG).started_s == 1.4
    assert sorted((span.lane, span.begin_s, span.end_s) for span in lanes.spans) == [(A, 1.4, 2.0), (B, 1.0, 2.0)]


def test_what_is_open_at_the_end_is_closed_then() -> None:
    lanes = heard(
        (1.0, of(SegmentRunning, LONG, worker_id=A)),
        (2.0, of(SegmentPaused, LONG, worker_id=A, step=3, prefilled_tokens=512, pause_latency_s=0.01)),
        (2.0, paused(LONG)),
        end_s=5.0,
    )
    assert [(span.kind, span.end_s) for span in lanes.spans] == [("long prefill", 2.0), ("paused", 5.0)]
    assert life_of(lanes.lives, LONG).suspended_s == 3.0


def test_times_count_from_time_zero_and_what_was_before_is_left_out() -> None:
    spans = [Span(A, "short prefill", 1.0, 2.0, "warm-up"), Span(A, "short prefill", 11.0, 12.5, "r")]
    assert shifted(spans, 10.0) == [Span(A, "short prefill", 1.0, 2.5, "r")]


def test_spans_beyond_the_limit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_lanes, "SPANS_MAX", 1)
    lanes = heard(*((float(at), prefilled(SHORT, A, waited_s=0.0, in_worker_s=0.1)) for at in range(1, 4)))
    assert (len(lanes.spans), lanes.dropped) == (1, 2)


def test_nothing_was_heard_of_it() -> None:
    assert life_of({}, "unknown").started_s is None
