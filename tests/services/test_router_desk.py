"""The desk of requests in hand: each token once, each request ended once, whatever is lost or doubled."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages.requests import SamplingParams, TokenChunk
from common.messages.scheduling import RequestAccepted, RequestFailed, RequestInterrupted, RequestRefused
from common.units import RequestId, RouterId
from services.router.requests import (
    ATTEMPTS_MAX,
    RESEND_S,
    Deliver,
    Desk,
    Draft,
    Fail,
    Submit,
    Withdraw,
    submission,
)

A, ROUTER = RequestId("a"), RouterId("r")
EOS = 99


def draft(max_tokens: int = 5) -> Draft:
    return Draft([1, 2, 3], max_tokens, SamplingParams(seed=7), stop_token_ids=(EOS,))


def desk_with(max_tokens: int = 5) -> Desk:
    desk = Desk(patience_s=8.0, stall_s=60.0)
    assert desk.open(A, draft(max_tokens), 0.0) == [Submit(A, 0)]
    return desk


def chunk(index: int, *ids: int, attempt: int = 0, finish=None) -> TokenChunk:
    return TokenChunk(request_id=A, attempt=attempt, index=index, token_ids=ids, finish_reason=finish)


def delivered(effects) -> list[int]:
    return [i for e in effects if isinstance(e, Deliver) for i in e.token_ids]


def interrupted(attempt: int = 0) -> RequestInterrupted:
    return RequestInterrupted(request_id=A, attempt=attempt, router_id=ROUTER, reason="its worker is lost")


def refused(code, attempt: int = 0) -> RequestRefused:
    return RequestRefused(request_id=A, attempt=attempt, router_id=ROUTER, code=code, message="m", retry_after_s=3.0)


def test_tokens_in_order_then_the_end():
    desk = desk_with()
    assert desk.tokens(chunk(0, 10, 11), 1.0) == [Deliver(A, (10, 11), (), None)]
    assert desk.tokens(chunk(2, EOS, finish="stop"), 1.0) == [Deliver(A, (EOS,), (), "stop")]
    assert A not in desk
    assert desk.tokens(chunk(3, 12), 1.0) == []


def test_doubled_tokens_are_delivered_once():
    desk = desk_with()
    desk.tokens(chunk(0, 10, 11), 1.0)
    assert desk.tokens(chunk(0, 10, 11), 1.0) == []
    assert delivered(desk.tokens(chunk(1, 11, 12), 1.0)) == [12]


def test_a_gap_submits_again_what_is_missing():
    desk = desk_with()
    desk.tokens(chunk(0, 10, 11), 1.0)
    assert desk.tokens(chunk(3, 13), 2.0) == [Submit(A, 1)]
    spec, stored = submission(desk.get(A), ROUTER, 100)
    assert stored is None
    assert array("i", spec.prompt.inline).tolist() == [1, 2, 3, 10, 11]
    assert (spec.attempt, spec.generated_before, spec.max_tokens, spec.sampling.seed) == (1, 2, 3, 7)
    assert desk.tokens(chunk(2, 12), 2.0) == [], "of the attempt before"
    assert delivered(desk.tokens(chunk(2, 12, attempt=1), 3.0)) == [12]


def test_the_end_is_known_by_the_tokens_should_the_word_be_lost():
    desk = desk_with(max_tokens=2)
    assert desk.tokens(chunk(0, 10, 11), 1.0)[0].finish_reason == "length"
    desk = desk_with()
    assert desk.tokens(chunk(0, EOS), 1.0)[0].finish_reason == "stop"


def test_interruptions_submit_again_within_a_bound():
    desk = desk_with()
    assert desk.interrupted(interrupted(), 1.0) == [Submit(A, 1)]
    assert desk.interrupted(interrupted(), 1.0) == [], "old news"
    for attempt in range(1, ATTEMPTS_MAX):
        assert desk.interrupted(interrupted(attempt), 1.0) == [Submit(A, attempt + 1)]
    withdraw, fail = desk.interrupted(interrupted(ATTEMPTS_MAX), 1.0)
    assert withdraw == Withdraw(A)
    assert isinstance(fail, Fail)
    assert fail.error.status == 503


def test_an_unanswered_submission_is_sent_again_until_patience_ends():
    desk = desk_with()
    sent, now_s = 0, 0.0
    while True:
        now_s = desk.next_deadline_s()
        effects = desk.time_passed(now_s)
        if effects != [Submit(A, 0)]:
            break
        sent += 1
    assert now_s == 8.0
    assert sent == round(8.0 / RESEND_S) - 1
    assert effects[0] == Withdraw(A)
    assert (effects[1].error.status, effects[1].error.code) == (503, "no_scheduler")
    assert desk.next_deadline_s() is None


def test_an_accepted_request_is_given_up_after_a_long_silence_only():
    desk = desk_with()
    desk.accepted(RequestAccepted(request_id=A, attempt=0, router_id=ROUTER), 1.0)
    assert desk.time_passed(30.0) == []
    desk.tokens(chunk(0, 10), 50.0)
    assert desk.time_passed(109.0) == []
    assert desk.time_passed(110.0)[1].error.code == "stalled"


def test_a_resubmission_during_a_long_silence_is_timed_anew():
    desk = desk_with()
    desk.accepted(RequestAccepted(request_id=A, attempt=0, router_id=ROUTER), 1.0)
    desk.time_passed(2.0)
    desk.interrupted(interrupted(), 10.0)
    assert desk.next_deadline_s() == 10.0 + RESEND_S
    assert desk.time_passed(10.0 + RESEND_S) == [Submit(A, 1)]


@pytest.mark.parametrize(
    ("code", "status"), [("too_long", 400), ("duplicate_id", 409), ("queue_full", 429), ("no_workers", 503)]
)
def test_a_refusal_ends_the_request(code, status):
    desk = desk_with()
    assert desk.refused(refused(code, attempt=1)) == [], "of another attempt"
    (fail,) = desk.refused(refused(code))
    assert fail.error.status == status
    assert A not in desk


def test_a_cancel_unknown_to_the_scheduler_is_no_refusal():
    desk = desk_with()
    assert desk.refused(refused("not_found")) == []
    assert A in desk


@pytest.mark.parametrize(("retryable", "status"), [(True, 503), (False, 500)])
def test_the_schedulers_last_word(retryable, status):
    desk = desk_with()
    event = RequestFailed(request_id=A, attempt=0, router_id=ROUTER, message="m", retryable=retryable)
    assert desk.failed(event)[0].error.status == status
    assert desk.failed(event) == []


def test_without_a_scheduler_the_silent_fail_and_the_running_go_on():
    desk = desk_with()
    desk.open(RequestId("b"), draft(), 0.0)
    for request_id in (A, RequestId("b")):
        desk.accepted(RequestAccepted(request_id=request_id, attempt=0, router_id=ROUTER), 1.0)
    desk.tokens(chunk(0, 10), 9.0)
    effects = desk.scheduler_lost(10.0)
    assert [e.request_id for e in effects if isinstance(e, Fail)] == ["b"]
    assert A in desk


def test_a_heartbeat_names_only_what_was_sent():
    desk = desk_with()
    assert desk.waiting() == ()
    desk.get(A).sent = True
    assert desk.waiting() == ((A, 0),)


def test_a_long_prompt_travels_by_reference_under_a_key_per_attempt():
    desk = desk_with()
    desk.tokens(chunk(0, 10), 1.0)
    desk.interrupted(interrupted(), 2.0)
    spec, stored = submission(desk.get(A), ROUTER, 3)
    assert spec.prompt.inline is None
    assert spec.prompt.key.endswith(":a:1")
    assert array("i", stored).tolist() == [1, 2, 3, 10]


@given(st.data())
def test_each_token_comes_once_and_in_order_whatever_is_lost_or_doubled(data):
    """Workers generate token 10 + i at output index i; messages are lost, doubled, late and cut anywhere."""
    desk, total = Desk(patience_s=8.0, stall_s=60.0), data.draw(st.integers(1, 12))
    truth = [10 + i for i in range(total - 1)] + [EOS]
    desk.open(A, draft(total + 5), 0.0)
    got: list[int] = []
    finishes = []
    while A in desk:
        generation = desk.get(A)
        attempt = generation.attempt
        if attempt > 6:  # from here on nothing is lost
            chunks = [chunk(len(generation.delivered), *truth[len(generation.delivered) :], attempt=attempt)]
        else:
            at = len(generation.delivered)
            edges = sorted({at, total, *data.draw(st.lists(st.integers(at, total), max_size=4))})
            chunks = [chunk(a, *truth[a:b], attempt=attempt) for a, b in itertools.pairwise(edges)]
            chunks = [c for c in chunks for _ in range(data.draw(st.sampled_from([1, 1, 1, 0, 2])))]
            chunks += data.draw(
                st.lists(
                    st.builds(lambda a, b: chunk(a, *truth[a:b], attempt=0), *[st.integers(0, total)] * 2), max_size=2
                )
            )
        for found in chunks:
            effects = desk.tokens(found, 1.0)
            got += delivered(effects)
            finishes += [e.finish_reason for e in effects if isinstance(e, Deliver) and e.finish_reason]
        if A in desk:
            desk.interrupted(interrupted(desk.get(A).attempt), 1.0)
    assert got == truth
    assert finishes == ["stop"]
