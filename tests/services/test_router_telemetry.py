"""What the router measures, tells and logs of its requests, at both doors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import structlog

from common import metrics as m
from common.metrics import CONTENT_TYPE
from common.runtime import subjects
from common.runtime.bus_memory import MemoryBus
from common.tracing import parse_traceparent
from tests.exposition import Scrape
from tests.services.router_world import NAME, World, ids_of, world
from tests.services.test_router_nats import ask
from tests.traces import SpanList

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "what is the capital of France?"}]}
TEXT = {"model": NAME, "prompt": "the capital of France is"}
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def scrape(w: World) -> Scrape:
    return Scrape((await w.http.get("/metrics")).text)


async def test_a_scraper_needs_no_key():
    async with world(api_key="secret") as w:
        answer = await w.http.get("/metrics")
        assert (answer.status_code, answer.headers["content-type"]) == (200, CONTENT_TYPE)
        assert Scrape(answer.text).value(m.ROLE_INFO, role="router") == 1


async def test_answers_are_counted_by_status_and_errors_by_code():
    async with world(requests_max=1) as w:
        assert (await w.post("/v1/completions", TEXT)).status_code == 200
        assert (await w.post("/v1/completions", {**TEXT, "n": 2})).status_code == 429
        assert (await w.post("/v1/completions", {**TEXT, "max_tokens": 10_000})).status_code == 400
        assert (await w.http.get("/nowhere")).status_code == 404
        assert (await w.http.get("/live", headers={"x-request-id": "no spaces"})).status_code == 400
        w.cluster.refuse_code = "queue_full"
        assert (await w.post("/v1/completions", TEXT)).status_code == 429
        found = await scrape(w)
        by_status = {s: found.value(m.RESPONSES, status=s) for s in ("200", "429", "400", "404")}
        assert by_status == {"200": 1, "429": 2, "400": 2, "404": 1}
        for code in ("too_many_requests", "context_length_exceeded", "queue_full"):
            assert found.value(m.FAILURE, code=code) == 1
        assert found.value(m.FAILURE) == 3
        assert found.value(m.SUCCESS, finished_reason="stop") == found.value(m.SUCCESS) == 1


async def test_choices_are_measured_one_by_one():
    async with world() as w:
        await w.post("/v1/completions", {**TEXT, "n": 3})
        found = await scrape(w)
        tokens = len(w.cluster.answer_ids)
        assert found.count(m.TTFT, length_class="short") == found.count(m.E2E, length_class="short") == 3
        assert found.value(m.GENERATION_TOKENS) == 3 * tokens
        assert found.count(m.ITL) == 3 * (tokens - 1)


async def test_a_request_whose_acceptance_was_not_heard_is_measured_apart():
    async with world() as w:
        w.router._note_class = lambda event: None
        await w.post("/v1/completions", TEXT)
        found = await scrape(w)
        assert found.count(m.TTFT, length_class="unknown") == found.count(m.TTFT) == 1


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_a_requests_span_speaks_opentelemetrys_words(path: str, body: dict[str, Any]):
    traces = SpanList()
    async with world(tracer=traces) as w:
        answer = await w.post(path, body, headers={"traceparent": CLIENT})
        operation = "chat" if body is CHAT else "text_completion"
        own, _ = traces.of(answer.json()["id"])
        assert (own.name, own.error, own.serves) == (f"{operation} {NAME}", "", True)
        usage = answer.json()["usage"]
        expected = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": NAME,
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "pecsched.length_class": "short",
        }
        assert expected.items() <= own.attributes.items()
        assert 0 <= own.attributes["pecsched.time_to_first_token_s"] <= own.end_s - own.start_s
        client, passed_on = parse_traceparent(CLIENT), parse_traceparent(w.cluster.submitted[0].traceparent)
        assert (own.context.trace_id, own.parent_id) == (client.trace_id, client.span_id)
        assert passed_on == own.context


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
async def test_a_trace_comes_in_over_nats_too(name: str):
    traces = SpanList()
    async with world(tracer=traces) as w:
        client = MemoryBus(w.broker, "client")
        body = {"prompt": "the capital of France is", "request_id": "mine"}
        await ask(client, subjects.GENERATE, json.dumps(body).encode(), {name: CLIENT})
        await client.close()
        own, _ = traces.of("mine")
        assert own.context.trace_id == parse_traceparent(CLIENT).trace_id
        assert parse_traceparent(w.cluster.submitted[0].traceparent) == own.context


async def test_without_a_tracer_the_clients_context_is_passed_on():
    async with world() as w:
        await w.post("/v1/completions", TEXT, headers={"traceparent": CLIENT})
        assert w.cluster.submitted[0].traceparent == CLIENT


async def test_an_error_is_the_spans_error():
    traces = SpanList()
    async with world(tracer=traces) as w:
        refused = await w.post("/v1/completions", {**TEXT, "max_tokens": 10_000})
        own, _ = traces.of(refused.headers["x-request-id"])
        assert own.error == "context_length_exceeded"
        w.cluster.refuse_code = "no_workers"
        late = await w.post("/v1/completions", TEXT)
        own, _ = traces.of(late.headers["x-request-id"])
        assert own.error == "no_workers"


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_prompts_are_logged_only_if_a_setting_asks(log_prompts: bool):
    with structlog.testing.capture_logs() as lines:
        async with world(log_prompts=log_prompts) as w:
            await w.post("/v1/chat/completions", CHAT, headers={"x-request-id": "mine"})
            await w.post("/v1/completions", TEXT)
            await w.post("/v1/completions", {**TEXT, "prompt": ids_of("of France")})
            w.cluster.refuse_code = "queue_full"
            await w.post("/v1/completions", TEXT)
    asked = [line for line in lines if line["event"] == "asked"]
    assert len(asked) == 4 * log_prompts
    assert ("capital" in repr(lines)) == log_prompts
    if log_prompts:
        assert asked[0]["request_id"] == "mine"
        (prompt,) = asked[0]["prompts"]
        assert [dict(message) for message in prompt["messages"]] == CHAT["messages"]
