"""What the router does when the cluster loses, doubles, refuses or says nothing. In virtual time."""

from __future__ import annotations

import asyncio

import pytest

from common.messages.requests import TokensGenerated
from common.runtime import keys, subjects, wire
from common.runtime.virtual_time import virtual
from services.router import tickets
from services.router.api_errors import ApiError
from services.router.api_types import CompletionRequest
from services.router.openai_http import SEND_S, create_app
from services.router.validate import parse, plan_completion
from tests.services.router_world import ids_of, world

TEXT = {"prompt": "the capital of France is"}
ANSWER = "Paris, on the Seine."
PROMPT = ids_of(TEXT["prompt"])


@virtual
async def test_an_interrupted_request_is_served_again_and_delivers_each_token_once():
    async with world() as w:
        w.cluster.interrupt_at = {0: 3, 1: 5}
        body = (await w.post("/v1/completions", {**TEXT, "seed": 11})).json()
        assert body["choices"][0]["text"] == ANSWER
        assert body["usage"]["completion_tokens"] == len(w.cluster.answer_ids)
        assert body["usage"]["prompt_tokens"] == len(PROMPT)
        assert [s.generated_before for s in w.cluster.submitted] == [0, 3, 5]
        assert w.cluster.prompts[2] == PROMPT + w.cluster.answer_ids[:5]
        assert {s.sampling.seed for s in w.cluster.submitted} == {11}


@virtual
async def test_a_gap_in_the_tokens_is_noticed_and_filled():
    async with world() as w:
        w.cluster.lose = lambda attempt, index: (attempt, index) in {(0, 2), (1, 4)}
        body = (await w.post("/v1/completions", TEXT)).json()
        assert body["choices"][0]["text"] == ANSWER
        assert [s.attempt for s in w.cluster.submitted] == [0, 1, 2]


@virtual
async def test_a_lost_last_token_is_made_good_when_the_scheduler_knows_no_more_of_it():
    async with world() as w:
        last = len(w.cluster.answer_ids) - 1
        w.cluster.lose = lambda attempt, index: (attempt, index) == (0, last)
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT))
        await w.cluster.until(lambda: any(beat.waiting for beat in w.cluster.beats), timeout_s=30)
        await w.cluster._tell(w.cluster.submitted[0], w.cluster.interruption(w.cluster.submitted[0]))
        assert (await asking).json()["choices"][0] == {
            "index": 0,
            "text": ANSWER,
            "logprobs": None,
            "finish_reason": "stop",
        }


@virtual
async def test_without_a_scheduler_a_request_is_503_after_the_patience():
    async with world(submit_patience_s=8.0) as w:
        w.cluster.deaf = True
        started_s = asyncio.get_running_loop().time()
        answer = await w.post("/v1/completions", TEXT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_scheduler")
        assert asyncio.get_running_loop().time() - started_s == pytest.approx(8.0, abs=0.1)


@virtual
async def test_a_scheduler_that_comes_back_in_time_serves_what_waited():
    async with world(submit_patience_s=8.0) as w:
        w.cluster.deaf = True
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT))
        await asyncio.sleep(5)
        w.cluster.deaf = False
        assert (await asking).json()["choices"][0]["text"] == ANSWER
        assert w.cluster.submitted[0].attempt == 0


@virtual
async def test_an_accepted_request_ends_in_an_error_when_the_scheduler_is_gone_for_good():
    async with world(submit_patience_s=8.0) as w:
        w.cluster.hold = asyncio.Event()
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT))
        await w.cluster.until(lambda: w.cluster.submitted)
        await asyncio.sleep(60)
        assert not asking.done(), "it may wait long while the scheduler answers"
        w.cluster.deaf = True
        started_s = asyncio.get_running_loop().time()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_scheduler")
        assert asyncio.get_running_loop().time() - started_s <= 12.0
        w.cluster.hold.set()


@virtual
async def test_the_bus_is_away_for_a_while():
    async with world(submit_patience_s=8.0) as w:
        w.broker.cut("router")
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT))
        await asyncio.sleep(3)
        w.broker.heal("router")
        assert (await asking).json()["choices"][0]["text"] == ANSWER
        beats = len(w.cluster.beats)
        w.broker.cut("router")
        w.broker.heal("router")
        await asyncio.sleep(0.01)
        assert len(w.cluster.beats) == beats + 1, "a sign of life at once after a reconnect"


@virtual
async def test_a_long_prompt_lies_in_the_store_while_its_request_lives():
    async with world(inline_tokens_max=4) as w:
        w.cluster.interrupt_at = {0: 2}
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 4
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT, headers={"X-Request-Id": "long"}))
        await w.cluster.until(lambda: len(w.cluster.submitted) == 2)
        await asyncio.sleep(200)
        assert await w.cluster.store.get(keys.prompt("long", 1)) is not None, "renewed"
        assert await w.cluster.store.get(keys.prompt("long", 0)) is None, "of no use any more"
        w.cluster.hold.set()
        assert (await asking).json()["choices"][0]["text"] == ANSWER
        assert w.cluster.prompts[1] == PROMPT + w.cluster.answer_ids[:2]
        await asyncio.sleep(3)
        assert await w.cluster.store.scan("pecsched:v1:prompt:") == {}


@virtual
async def test_leaving_says_so_and_answers_everyone():
    async with world(drain_s=2.0, inline_tokens_max=4) as w:
        lease = keys.router_lease(w.router.router_id)
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 1
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT))
        await w.cluster.until(lambda: w.cluster.submitted)
        assert await w.cluster.store.get(lease) is not None
        w.router.stop()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        await w.cluster.until(lambda: w.cluster.left)
        assert w.cluster.cancelled == [w.cluster.submitted[0].request_id]
        await asyncio.sleep(1)
        assert await w.cluster.store.scan("pecsched:v1:") == {}


@virtual
async def test_draining_lets_running_requests_finish():
    async with world(drain_s=5.0) as w:
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 1
        asking = asyncio.ensure_future(w.post("/v1/completions", TEXT))
        await w.cluster.until(lambda: w.cluster.submitted)
        w.router.stop()
        await asyncio.sleep(1)
        w.cluster.hold.set()
        assert (await asking).json()["choices"][0]["text"] == ANSWER


@virtual
async def test_unreadable_messages_and_foreign_tokens_disturb_nothing():
    async with world() as w:
        inbox = subjects.router(w.router.router_id)
        await w.cluster.bus.publish(inbox, b"\xc1 garbage")
        stray = TokensGenerated(worker_id="w", router_id=w.router.router_id, chunks=())
        await w.cluster.bus.publish(inbox, wire.encode(stray))
        assert (await w.post("/v1/completions", TEXT)).status_code == 200


@virtual
async def test_a_client_that_reads_too_slowly_is_cancelled():
    async with world() as w:
        w.cluster.hold = asyncio.Event()
        body = b'{"prompt": "the", "max_tokens": 500, "ignore_eos": true}'
        plan = plan_completion(parse(body, CompletionRequest), w.router.text.facts)
        ticket = await w.router.open(plan, request_id="slow")
        await w.cluster.until(lambda: w.cluster.submitted)
        tickets_max, tickets.PIECES_MAX = tickets.PIECES_MAX, 3
        try:
            for i in range(5):
                await w.cluster.send_tokens(w.cluster.submitted[0], i, [70])
            await w.cluster.until(lambda: w.cluster.cancelled == ["slow"])
        finally:
            tickets.PIECES_MAX = tickets_max
        read = []
        with pytest.raises(ApiError, match="too slowly"):
            await _read_into(read, ticket)
        assert [len(piece.token_ids) for piece in read] == [3], "what waited is one piece"
        await w.router.close(ticket)
        w.cluster.hold.set()


async def _read_into(read, ticket):
    async for piece in ticket.pieces():
        read.append(piece)


@virtual
async def test_a_client_that_never_reads_is_let_go():
    async with world() as w:
        received = [{"type": "http.request", "body": b'{"prompt": "the", "stream": true}', "more_body": False}]

        async def receive():
            return received.pop() if received else await asyncio.Event().wait()

        async def send(message):
            await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await create_app(w.router)(scope, receive, send)
        assert asyncio.get_running_loop().time() >= SEND_S
        assert w.router._tickets == {}
