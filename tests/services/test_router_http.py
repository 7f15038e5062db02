"""The HTTP door over the in-memory bus: answers, streams, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.services.router_world import CONTEXT, NAME, events_of, ids_of, world

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "what is the capital of France?"}]}
TEXT = {"model": NAME, "prompt": "the capital of France is"}
ANSWER = "Paris, on the Seine."


async def test_chat_answers_with_text_usage_and_finish_reason():
    async with world() as w:
        answer = await w.post("/v1/chat/completions", CHAT)
        body = answer.json()
        assert answer.status_code == 200
        assert body["object"] == "chat.completion"
        assert body["id"] == answer.headers["x-request-id"]
        choice = body["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
        assert choice["finish_reason"] == "stop"
        spec = w.cluster.submitted[0]
        generated = len(w.cluster.answer_ids)
        assert body["usage"] == {
            "prompt_tokens": spec.prompt.tokens,
            "completion_tokens": generated,
            "total_tokens": spec.prompt.tokens + generated,
        }
        rendered = "<|im_start|>user\nwhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        assert w.cluster.prompts[0] == ids_of(rendered)


async def test_chat_stream_has_role_deltas_finish_usage():
    async with world() as w:
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        answer = await w.post("/v1/chat/completions", body)
        events = events_of(answer.text)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        deltas = [e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]]
        assert "".join(deltas) == ANSWER
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == len(w.cluster.answer_ids)
        assert all(e["usage"] is None for e in events[:-1])


async def test_completions_take_text_texts_ids_and_lists_of_ids():
    prompts: list[Any] = [
        "the capital",
        ["the capital", "of France"],
        ids_of("of France"),
        [ids_of("is"), ids_of("the")],
    ]
    expected = [["the capital"], ["the capital", "of France"], ["of France"], ["is", "the"]]
    async with world() as w:
        for prompt, texts in zip(prompts, expected, strict=True):
            w.cluster.prompts.clear()
            body = (await w.post("/v1/completions", {**TEXT, "prompt": prompt})).json()
            assert [c["text"] for c in body["choices"]] == [ANSWER] * len(texts)
            assert w.cluster.prompts == [ids_of(text) for text in texts]
            assert body["usage"]["prompt_tokens"] == sum(len(ids_of(text)) for text in texts)


async def test_n_makes_choices_with_seeds_of_their_own_and_counts_the_prompt_once():
    async with world() as w:
        body = (await w.post("/v1/completions", {**TEXT, "n": 3, "seed": 7})).json()
        assert [c["index"] for c in body["choices"]] == [0, 1, 2]
        assert body["usage"]["prompt_tokens"] == len(ids_of(TEXT["prompt"]))
        assert [s.sampling.seed for s in w.cluster.submitted] == [7, 8, 9]
        assert len({s.request_id for s in w.cluster.submitted}) == 3


async def test_sampling_reaches_the_worker_and_a_seed_is_drawn_where_none_is_given():
    async with world() as w:
        asked = {"temperature": 0, "top_p": 0.5, "top_k": 3, "max_tokens": 2}
        body = (await w.post("/v1/completions", {**TEXT, **asked})).json()
        await w.post("/v1/completions", TEXT)
        spec, other = w.cluster.submitted
        assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.top_k) == (0.0, 0.5, 3)
        assert spec.max_tokens == 2
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2
        assert spec.sampling.seed != other.sampling.seed


async def test_ignore_eos_goes_on_to_max_tokens():
    async with world() as w:
        w.cluster.endless = True
        body = (await w.post("/v1/completions", {**TEXT, "ignore_eos": True, "max_tokens": 40})).json()
        assert body["usage"]["completion_tokens"] == 40
        assert body["choices"][0]["text"].startswith(ANSWER + ANSWER)
        assert w.cluster.submitted[0].stop_token_ids == ()


async def test_a_deadline_reaches_the_scheduler_and_one_that_is_none_is_refused():
    async with world() as w:
        assert (await w.post("/v1/completions", {**TEXT, "deadline_s": 0.5})).status_code == 200
        assert w.cluster.submitted[0].deadline_s == 0.5
        refused = await w.post("/v1/completions", {**TEXT, "deadline_s": -1})
        assert refused.status_code == 400
        assert "deadline_s must be between" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_ends_the_answer_before_it_and_cancels(stream: bool):
    async with world() as w:
        w.cluster.endless = True
        body = {**TEXT, "stop": [" on the", "never"], "stream": stream, "max_tokens": 50}
        answer = await w.post("/v1/completions", body)
        parts = events_of(answer.text) if stream else [answer.json()]
        choices = [part["choices"][0] for part in parts]
        assert "".join(c["text"] for c in choices) == "Paris,"
        assert choices[-1]["finish_reason"] == "stop"
        await w.cluster.until(lambda: w.cluster.cancelled == [w.cluster.submitted[0].request_id])


async def test_logprobs_of_chat_and_completions():
    async with world() as w:
        chat = (await w.post("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})).json()
        content = chat["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == ANSWER
        assert {len(entry["top_logprobs"]) for entry in content} == {2}
        assert content[0]["logprob"] == -0.5

        text = (await w.post("/v1/completions", {**TEXT, "logprobs": 3})).json()
        found = text["choices"][0]["logprobs"]
        assert "".join(found["tokens"][:-1]) == ANSWER
        assert found["text_offset"][:2] == [0, len(found["tokens"][0])]
        assert {len(top) for top in found["top_logprobs"]} == {3}

        plain = (await w.post("/v1/completions", TEXT)).json()
        assert plain["choices"][0]["logprobs"] is None


async def test_parameters_without_effect_are_accepted():
    harmless = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "user": "somebody",
        "metadata": {"team": "a"},
        "seed": None,
        "service_tier": "auto",
        "n": 1,
    }
    async with world() as w:
        parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "the capital of France?"}]
        body = {**CHAT, **harmless, "messages": [{"role": "developer", "content": parts, "name": "me"}]}
        assert (await w.post("/v1/chat/completions", body)).status_code == 200
        assert w.cluster.prompts[0] == ids_of(
            "<|im_start|>system\nwhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        )
        body = {**TEXT, "echo": False, "best_of": 1, "suffix": None, "logit_bias": None}
        assert (await w.post("/v1/completions", body)).status_code == 200


BAD_TEXT: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": ""}, 400, "empty_prompt", "prompt"),
    ({"prompt": []}, 400, "empty_prompt", "prompt"),
    ({"prompt": [[]]}, 400, "empty_prompt", "prompt"),
    ({"prompt": ["a", ""]}, 400, "empty_prompt", "prompt"),
    ({"prompt": None}, 400, "invalid_type", "prompt"),
    ({"prompt": {"a": 1}}, 400, "invalid_type", "prompt"),
    ({"prompt": [1, "a"]}, 400, "invalid_type", "prompt"),
    ({"prompt": ["a", 1]}, 400, "invalid_type", "prompt"),
    ({"prompt": [True]}, 400, "invalid_type", "prompt"),
    ({"prompt": [-1]}, 400, "invalid_type", "prompt"),
    ({"prompt": [10_000]}, 400, "invalid_value", "prompt"),
    ({"prompt": ["a"] * 129}, 400, "invalid_value", "n"),
    ({"max_tokens": CONTEXT}, 400, "context_length_exceeded", "max_tokens"),
    ({"prompt": [5] * CONTEXT}, 400, "context_length_exceeded", "prompt"),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": "5"}, 400, "invalid_type", "max_tokens"),
    ({"max_tokens": 1.5}, 400, "invalid_type", "max_tokens"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"temperature": -0.1}, 400, "invalid_value", "temperature"),
    ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
    ({"temperature": "hot"}, 400, "invalid_type", "temperature"),
    ({"top_p": 0}, 400, "invalid_value", "top_p"),
    ({"top_p": 1.1}, 400, "invalid_value", "top_p"),
    ({"top_k": -1}, 400, "invalid_value", "top_k"),
    ({"seed": -1}, 400, "invalid_value", "seed"),
    ({"seed": 2**63}, 400, "invalid_value", "seed"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": 17}, 400, "invalid_value", "n"),
    ({"logprobs": 6}, 400, "invalid_value", "logprobs"),
    ({"logprobs": True}, 400, "invalid_type", "logprobs"),
    ({"stop": ["a"] * 5}, 400, "invalid_value", "stop"),
    ({"stop": ""}, 400, "invalid_value", "stop"),
    ({"stop": 3}, 400, "invalid_type", "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    ({"echo": True}, 400, "unsupported_parameter", "echo"),
    ({"best_of": 2}, 400, "unsupported_parameter", "best_of"),
    ({"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
    ({"presence_penalty": 0.5}, 400, "unsupported_parameter", "presence_penalty"),
    ({"frequency_penalty": True}, 400, "unsupported_parameter", "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, 400, "unsupported_parameter", "logit_bias"),
    ({"colour": "red"}, 400, "unknown_parameter", "colour"),
]

BAD_CHAT: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"messages": []}, 400, "empty_prompt", "messages"),
    ({"messages": "hello"}, 400, "invalid_type", "messages"),
    ({"messages": [{"role": "user"}]}, 400, "missing_parameter", "messages[0].content"),
    ({"messages": [{"content": "x"}]}, 400, "missing_parameter", "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, 400, "unknown_parameter", "mood"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        400,
        "invalid_value",
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": "no"}]}, 400, "invalid_value", "messages"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "invalid_value", "max_completion_tokens"),
    ({"max_completion_tokens": CONTEXT}, 400, "context_length_exceeded", "max_tokens"),
]


@pytest.mark.parametrize(
    ("path", "base", "cases"),
    [("/v1/completions", TEXT, BAD_TEXT), ("/v1/chat/completions", CHAT, BAD_CHAT)],
    ids=["completions", "chat"],
)
async def test_every_bad_input_is_one_clear_error_and_disturbs_nothing(path: str, base: Any, cases: Any):
    async with world() as w:
        for change, status, code, param in cases:
            answer = await w.post(path, {**base, **change})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param), (change, error)
            assert error["type"] == "invalid_request_error"
            assert error["message"], change
        assert w.cluster.submitted == []
        assert (await w.post(path, base)).status_code == 200


async def test_the_context_error_has_the_numbers():
    async with world() as w:
        error = (await w.post("/v1/completions", {**TEXT, "prompt": [5] * 500, "max_tokens": 20})).json()["error"]
        numbers = "the context holds 512 tokens; prompt 500 + max_tokens 20 = 520"
        assert error["message"] == f"{numbers}: ask for 12 tokens at most, or shorten the prompt"
        error = (await w.post("/v1/completions", {**TEXT, "prompt": [5] * 513})).json()["error"]
        assert error["message"] == "the context holds 512 tokens; prompt 513: shorten the prompt"
        whole = await w.post("/v1/completions", {**TEXT, "prompt": [5] * 500})
        assert whole.status_code == 200
        assert w.cluster.submitted[0].max_tokens == 12


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'{"prompt": "\xff"}', b'"x"', b"[" * 100_000])
async def test_a_malformed_body_is_400(body: bytes):
    async with world() as w:
        answer = await w.http.post("/v1/completions", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] in ("malformed_body", "invalid_type")


async def test_a_body_over_the_limit_is_413_while_it_is_still_read():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 100

    async with world(body_bytes_max=1_000) as w:
        assert (await w.http.post("/v1/completions", content=endless())).status_code == 413
        assert sent < 20
        declared = await w.http.post("/v1/completions", content=b"x" * 2_000)
        assert declared.json()["error"]["code"] == "body_too_large"


async def test_request_id_is_taken_echoed_checked_and_unique():
    async with world() as w:
        named = await w.post("/v1/completions", TEXT, headers={"X-Request-Id": "mine-1"})
        assert named.headers["x-request-id"] == named.json()["id"] == "mine-1"
        assert w.cluster.submitted[0].request_id == "mine-1"
        assert (await w.post("/v1/completions", TEXT, headers={"X-Request-Id": "a b:c"})).status_code == 400
        assert (await w.post("/v1/completions", TEXT)).headers["x-request-id"].startswith("req-")

        w.cluster.hold = asyncio.Event()
        first = asyncio.ensure_future(w.post("/v1/completions", {**TEXT, "n": 2}, headers={"X-Request-Id": "twin"}))
        await w.cluster.until(lambda: len(w.cluster.submitted) == 4)
        for name in ("twin", "twin-1"):
            again = await w.post("/v1/completions", TEXT, headers={"X-Request-Id": name})
            assert again.status_code == 409
            assert again.json()["error"]["code"] == "duplicate_request_id"
        w.cluster.hold.set()
        assert (await first).status_code == 200


@pytest.mark.parametrize(
    ("code", "status", "api_code"),
    [
        ("too_long", 400, "context_length_exceeded"),
        ("queue_full", 429, "queue_full"),
        ("no_workers", 503, "no_workers"),
        ("duplicate_id", 409, "duplicate_request_id"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_scheduler_has_a_status_of_its_own(code: str, status: int, api_code: str, stream: bool):
    async with world() as w:
        w.cluster.refuse_code = code
        answer = await w.post("/v1/completions", {**TEXT, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, api_code)
        assert answer.headers.get("retry-after") == ("7" if status in (429, 503) else None)


async def test_too_many_requests_in_hand_is_429():
    async with world(requests_max=2) as w:
        w.cluster.hold = asyncio.Event()
        first = asyncio.ensure_future(w.post("/v1/completions", {**TEXT, "n": 2}))
        await w.cluster.until(lambda: len(w.cluster.submitted) == 2)
        answer = await w.post("/v1/completions", TEXT)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        w.cluster.hold.set()
        assert (await first).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(stream: bool):
    async with world() as w:
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 2
        client = asyncio.ensure_future(_leaving_client(w.router, {**TEXT, "stream": stream, "n": 2}, w.cluster))
        await client
        await w.cluster.until(lambda: len(w.cluster.cancelled) == 2)
        assert set(w.cluster.cancelled) == {s.request_id for s in w.cluster.submitted}
        assert w.router._tickets == {}


async def _leaving_client(router: Any, body: dict[str, Any], cluster: Any) -> None:
    """Plain ASGI: sends its body, then disconnects once the cluster generates."""
    from services.router.openai_http import create_app

    inputs = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if inputs:
            return inputs.pop()
        await cluster.until(lambda: len(cluster.submitted) == 2)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("router", 80),
    }
    await create_app(router)(scope, receive, send)


async def test_an_error_after_the_first_token_is_an_event_in_the_stream():
    async with world(drain_s=0.01) as w:
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 2
        asking = asyncio.ensure_future(w.post("/v1/completions", {**TEXT, "stream": True}))
        await w.cluster.until(lambda: w.cluster.submitted)
        # The router stops while the request runs: its client gets an error, not a cut connection.
        w.router.stop()
        events = events_of((await asking).text)
        assert events[-1]["error"]["code"] == "shutting_down"
        assert (await w.post("/v1/completions", TEXT)).status_code == 503


async def test_the_api_key_is_asked_everywhere_but_at_the_probes():
    async with world(api_key="secret") as w:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = await w.post("/v1/completions", TEXT, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert (await w.http.get("/cluster")).status_code == 401
        assert (await w.http.get("/live")).status_code == 200
        assert (await w.http.get("/health")).status_code == 200
        allowed = await w.post("/v1/completions", TEXT, headers={"Authorization": "Bearer secret"})
        assert allowed.status_code == 200


async def test_models_health_cluster_story_and_unknown_paths():
    async with world() as w:
        listed = (await w.http.get("/v1/models")).json()
        assert [m["id"] for m in listed["data"]] == [NAME]
        assert (await w.http.get(f"/v1/models/{NAME}")).json()["id"] == NAME
        assert (await w.http.get("/v1/models/other")).status_code == 404
        assert (await w.http.get("/cluster")).json()["counters"] == {"finished": 1}

        healthy = await w.http.get("/health")
        assert (healthy.status_code, healthy.json()["workers"]) == (200, {"prefill": 1, "decode": 1})
        w.cluster.profiles = ["prefill"]
        sick = await w.http.get("/health")
        assert (sick.status_code, sick.json()["missing"]) == (503, ["decode worker"])

        name = (await w.post("/v1/completions", {**TEXT, "n": 2})).json()["id"]
        story = (await w.http.get(f"/v1/requests/{name}/story")).json()
        assert story == {"request_id": name, "lines": ["submitted", "submitted"]}
        assert (await w.http.get("/v1/requests/nobody/story")).status_code == 404
        assert (await w.http.get("/nowhere")).json()["error"]["code"] == "not_found"
        assert (await w.http.get("/v1/completions")).status_code == 405


async def test_health_is_503_when_no_scheduler_is_there():
    async with world() as w:
        w.broker.cut("cluster")
        answer = await w.http.get("/health")
        assert (answer.status_code, answer.json()["missing"]) == (503, ["scheduler"])
        assert (await w.http.get("/live")).status_code == 200
