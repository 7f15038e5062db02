"""Tokens of quick steps share a message, none waits longer than the gathering, and an end leaves at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.messages.requests import TokenChunk, TokenLogprob, TokensGenerated
from services.decode_worker.outbox import TokenOutbox

GATHER_S = 0.005


def tokens(index: int, *, request: str = "a", router: str = "r", attempt: int = 0, end: bool = False, **fields):
    chunk = TokenChunk(
        request_id=request,
        attempt=attempt,
        index=index,
        token_ids=(100 + index,),
        finish_reason="length" if end else None,
        **fields,
    )
    return TokensGenerated(worker_id="d", router_id=router, chunks=(chunk,), cause=f"d#{index}")


def test_steps_slower_than_the_gathering_never_wait():
    outbox = TokenOutbox(GATHER_S)
    for index in range(5):
        assert outbox.put(tokens(index), index * GATHER_S) == tokens(index)
        assert outbox.next_deadline_s() is None


def test_quick_steps_share_a_message():
    outbox = TokenOutbox(GATHER_S)
    assert outbox.put(tokens(1), 0.0) == tokens(1)
    logprob = TokenLogprob(logprob=-0.5)
    assert outbox.put(tokens(2, logprobs=(logprob,)), 0.001) is None
    assert outbox.put(tokens(3, logprobs=(logprob,)), 0.002) is None
    assert outbox.next_deadline_s() == GATHER_S
    assert outbox.take_due(0.004) == []
    (message,) = outbox.take_due(GATHER_S)
    (chunk,) = message.chunks
    assert (chunk.index, chunk.token_ids, chunk.logprobs) == (2, (102, 103), (logprob, logprob))
    assert message.cause == "d#3", "the last step's"
    assert outbox.next_deadline_s() is None
    assert outbox.put(tokens(4), GATHER_S + 0.001) is None, "the next message is due after another gathering"


def test_an_end_leaves_at_once_with_all_that_waited():
    outbox = TokenOutbox(GATHER_S)
    outbox.put(tokens(1), 0.0)
    outbox.put(tokens(1, request="b"), 0.001)
    ready = outbox.put(tokens(2, end=True), 0.002)
    assert [(chunk.request_id, chunk.finish_reason) for chunk in ready.chunks] == [("b", None), ("a", "length")]


def test_a_first_token_that_another_worker_sent_counts_as_a_message():
    outbox = TokenOutbox(GATHER_S)
    outbox.sent_elsewhere("r", 0.0)
    assert outbox.put(tokens(1), 0.001) is None
    assert outbox.next_deadline_s() == GATHER_S
    outbox.sent_elsewhere("r", 0.004)
    assert outbox.next_deadline_s() == GATHER_S, "what waits is not put off by others' first tokens"
    assert outbox.put(tokens(2, end=True), 0.004) is not None


def test_routers_wait_apart_and_attempts_are_not_mixed():
    outbox = TokenOutbox(GATHER_S)
    outbox.put(tokens(1), 0.0)
    assert outbox.put(tokens(1, router="other"), 0.001) is not None
    outbox.put(tokens(2), 0.001)
    outbox.put(tokens(3, attempt=1), 0.002)
    outbox.put(tokens(9), 0.003)
    (message,) = outbox.take_due(GATHER_S)
    assert [(chunk.attempt, chunk.index) for chunk in message.chunks] == [(0, 2), (1, 3), (0, 9)]


def test_without_gathering_every_step_is_a_message():
    outbox = TokenOutbox(0.0)
    assert all(outbox.put(tokens(index), 0.0) == tokens(index) for index in range(3))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=60))
def test_every_token_leaves_once_in_order_and_in_time(steps):
    """Steps of one row each: (request, milliseconds since the last step, whether the request ends)."""
    outbox, now_s, sent, put = TokenOutbox(GATHER_S), 0.0, [], []
    counts, waits_since = dict.fromkeys("abc", 0), None

    def took(message):
        sent.extend((c.request_id, c.index + i) for c in message.chunks for i in range(len(c.token_ids)))

    for request, after_ms, end in steps:
        now_s += after_ms / 1e3
        for message in outbox.take_due(now_s):
            took(message)
        waits_since = None if outbox.next_deadline_s() is None else waits_since
        counts[request] += 1
        put.append((request, counts[request]))
        ready = outbox.put(tokens(counts[request], request=request, end=end), now_s)
        if ready is not None:
            took(ready)
            waits_since = None
        elif waits_since is None:
            waits_since = now_s
        if waits_since is not None:
            assert now_s - waits_since < GATHER_S + 1e-9
            assert outbox.next_deadline_s() <= waits_since + GATHER_S
    for message in outbox.take_due(now_s + GATHER_S):
        took(message)
    assert sorted(sent) == sorted(put)
    for request in "abc":
        assert [index for name, index in sent if name == request] == list(range(1, counts[request] + 1))
