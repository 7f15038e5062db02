"""A stream takes all that is there at once: one piece per choice, one write, the end mark with the last tokens."""

from __future__ import annotations

import asyncio
import json

import pytest

from common.messages.requests import TokenLogprob
from common.runtime.virtual_time import virtual
from services.router.api_errors import ApiError
from services.router.openai_http import create_app
from services.router.tickets import Piece, Ticket, make_ticket
from services.router.validate import CompletionRequest, drafts, parse, plan_completion
from tests.services.router_world import events_of, ids_of, tiny_text, world


def ticket_of(choices: int) -> Ticket:
    facts = tiny_text().facts
    body = json.dumps({"prompt": "the", "n": choices}).encode()
    plan = plan_completion(parse(body, CompletionRequest), facts)
    return make_ticket("t", drafts(plan, [ids_of("the")], facts, 1), tiny_text().decode, choices_per_prompt=choices)


def piece(choice: int, text: str, token_id: int, finish: str | None = None) -> Piece:
    return Piece(choice, text, (token_id,), (TokenLogprob(logprob=-float(token_id)),), finish)


async def test_pieces_of_a_choice_that_wait_become_one():
    ticket = ticket_of(2)
    for part in (piece(1, "a", 1), piece(0, "b", 2), piece(1, "c", 3), piece(1, "d", 4, "length")):
        ticket.put(part)
    batches = ticket.batches()
    first, second = await anext(batches)
    assert (first.choice, first.text, first.token_ids, first.finish_reason) == (1, "acd", (1, 3, 4), "length")
    assert [found.logprob for found in first.logprobs] == [-1.0, -3.0, -4.0]
    assert (second.choice, second.text, second.finish_reason) == (0, "b", None)
    waiting = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    assert not waiting.done()
    ticket.put(piece(0, "e", 5, "stop"))
    assert [part.text for part in await waiting] == ["e"]


async def test_a_ticket_is_whole_when_every_choice_has_ended_and_all_was_taken():
    ticket = ticket_of(2)
    ticket.put(piece(0, "a", 1, "stop"))
    ticket.choices[0].ended = True
    batches = ticket.batches()
    await anext(batches)
    assert not ticket.whole
    ticket.choices[1].ended = True
    ticket.put(piece(1, "b", 1, "stop"))
    assert not ticket.whole, "a piece waits"
    await anext(batches)
    assert ticket.whole
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


async def test_what_came_before_an_error_is_taken_before_it():
    ticket = ticket_of(1)
    ticket.put(piece(0, "a", 1))
    ticket.fail(ApiError(503, "interrupted", "lost"))
    batches = ticket.batches()
    assert [part.text for part in await anext(batches)] == ["a"]
    assert not ticket.whole
    with pytest.raises(ApiError, match="lost"):
        await anext(batches)


@virtual
async def test_tokens_that_come_together_are_one_write_with_the_end_mark():
    async with world() as w:
        w.cluster.hold = asyncio.Event()
        body = json.dumps({"prompt": "the", "max_tokens": 4, "ignore_eos": True, "stream": True}).encode()
        inputs = [{"type": "http.request", "body": body, "more_body": False}]
        sent = []

        async def receive():
            return inputs.pop() if inputs else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        answering = asyncio.ensure_future(create_app(w.router)(scope, receive, send))
        await w.cluster.until(lambda: w.cluster.submitted)
        ids = ids_of("Paris, on")[:4]
        await w.cluster.send_tokens(w.cluster.submitted[0], 0, ids[:1])
        await asyncio.sleep(0.01)
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        await w.cluster.send_tokens(w.cluster.submitted[0], 1, ids[1:], "length")
        await answering
        assert [message["more_body"] for message in sent[1:]] == [True, False]
        events = events_of(b"".join(message["body"] for message in sent[1:]).decode())
        assert "".join(event["choices"][0]["text"] for event in events) == tiny_text().decode(ids)
        assert len(events) == 2
        w.cluster.hold.set()
