"""Tokens of quick steps share a message, none waits longer than the gathering, and an end leaves at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.messages.requests import TokenChunk, TokenLogprob, TokensGenerated
from services.decode_worker.outbox import GATHER_MAX_S, ROW_S, TokenOutbox

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
        assert outbox.put(tokens(index), index * GATHER_S, rows=1) == tokens(index)
        assert outbox.next_deadline_s() is None


def test_quick_steps_share_a_message():
    outbox = TokenOutbox(GATHER_S)
    assert outbox.put(tokens(1), 0.0, rows=1) == tokens(1)
    logprob = TokenLogprob(logprob=-0.5)
    assert outbox.put(tokens(2, logprobs=(logprob,)), 0.001, rows=1) is None
    assert outbox.put(tokens(3, logprobs=(logprob,)), 0.002, rows=1) is None
    assert outbox.next_deadline_s() == GATHER_S
    assert outbox.take_due(0.004, rows=1) == []
    (message,) = outbox.take_due(GATHER_S, rows=1)
    (chunk,) = message.chunks
    assert (chunk.index, chunk.token_ids, chunk.logprobs) == (2, (102, 103), (logprob, logprob))
    assert message.cause == "d#3", "the last step's"
    assert outbox.next_deadline_s() is None
    assert outbox.put(tokens(4), GATHER_S + 0.001, rows=1) is None, "the next message is due after another gathering"


def test_an_end_leaves_at_once_with_all_that_waited_of_its_request():
    outbox = TokenOutbox(GATHER_S)
    outbox.put(tokens(1), 0.0, rows=2)
    outbox.put(tokens(1, request="b"), 0.001, rows=2)
    outbox.put(tokens(2), 0.001, rows=2)
    ready = outbox.put(tokens(3, end=True), 0.002, rows=2)
    (chunk,) = ready.chunks
    assert (chunk.request_id, chunk.index, chunk.token_ids, chunk.finish_reason) == ("a", 2, (102, 103), "length")
    (message,) = outbox.take_due(2 * ROW_S, rows=1)
    assert [chunk.request_id for chunk in message.chunks] == ["b"], "the other waits no longer, and no shorter"


def test_a_crowded_batch_gathers_longer_up_to_a_bound():
    for rows, window_s in ((1, GATHER_S), (4, 4 * ROW_S), (500, GATHER_MAX_S)):
        outbox = TokenOutbox(GATHER_S)
        outbox.put(tokens(1), 0.0, rows=rows)
        assert outbox.put(tokens(2), 0.001, rows=rows) is None
        assert outbox.next_deadline_s() == window_s
        assert outbox.take_due(window_s, rows=rows) != []
        assert outbox.put(tokens(3), window_s + 0.001, rows=rows) is None
        assert outbox.next_deadline_s() == 2 * window_s


def test_a_first_token_that_another_worker_sent_counts_as_a_message():
    outbox = TokenOutbox(GATHER_S)
    outbox.sent_elsewhere("r", 0.0)
    assert outbox.put(tokens(1), 0.001, rows=1) is None
    assert outbox.next_deadline_s() == GATHER_S
    outbox.sent_elsewhere("r", 0.004)
    assert outbox.next_deadline_s() == GATHER_S, "what waits is not put off by others' first tokens"
    assert outbox.put(tokens(2, end=True), 0.004, rows=1) is not None


def test_routers_wait_apart_and_attempts_are_not_mixed():
    outbox = TokenOutbox(GATHER_S)
    outbox.put(tokens(1), 0.0, rows=1)
    assert outbox.put(tokens(1, router="other"), 0.001, rows=1) is not None
    outbox.put(tokens(2), 0.001, rows=1)
    outbox.put(tokens(3, attempt=1), 0.002, rows=1)
    outbox.put(tokens(9), 0.003, rows=1)
    (message,) = outbox.take_due(GATHER_S, rows=1)
    assert [(chunk.attempt, chunk.index) for chunk in message.chunks] == [(0, 2), (1, 3), (0, 9)]


def test_without_gathering_every_step_is_a_message():
    outbox = TokenOutbox(0.0)
    assert all(outbox.put(tokens(index), 0.0, rows=1) == tokens(index) for index in range(3))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=60))
def test_every_token_leaves_once_in_order_and_in_time(steps):
    """Steps of one row each: (request, milliseconds since the last step, whether the request ends)."""
    outbox, now_s = TokenOutbox(GATHER_S), 0.0
    counts = dict.fromkeys("abc", 0)
    put_s: dict[tuple[str, int], float] = {}
    left: list[tuple[str, int]] = []

    def leaves(message, at_s):
        for chunk in message.chunks:
            for index in range(chunk.index, chunk.index + len(chunk.token_ids)):
                left.append((chunk.request_id, index))
                assert at_s - put_s[left[-1]] <= GATHER_S + 1e-9

    for request, after_ms, end in steps:
        now_s += after_ms / 1e3
        while (due_s := outbox.next_deadline_s()) is not None and due_s <= now_s:
            for message in outbox.take_due(due_s, rows=1):
                leaves(message, due_s)
        counts[request] += 1
        put_s[request, counts[request]] = now_s
        ready = outbox.put(tokens(counts[request], request=request, end=end), now_s, rows=1)
        if ready is not None:
            leaves(ready, now_s)
        assert not end or (request, counts[request]) in left
    for message in outbox.take_due(now_s + GATHER_S, rows=1):
        leaves(message, now_s)
    assert sorted(left) == sorted(put_s)
    for request in "abc":
        assert [index for name, index in left if name == request] == list(range(1, counts[request] + 1))
