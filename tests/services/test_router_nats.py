"""The NATS door: JSON and MessagePack, streams and single answers, cancel, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgpack
import pytest

from common.runtime import subjects
from common.runtime.bus import Bus, Delivery
from common.runtime.bus_memory import MemoryBus
from common.runtime.bus_nats import connect_nats
from common.runtime.store_memory import MemoryStore
from common.runtime.supervisor import Supervisor
from common.settings import RouterSettings
from loadtest import nats_example
from services.embedded import EmbeddedServer
from services.router.service import Router
from tests.services.router_world import CONTEXT, NAME, FakeCluster, ids_of, tiny_text, world

ANSWER = "Paris, on the Seine."
CODECS: dict[str, Any] = {
    "application/json": (lambda body: json.dumps(body).encode(), json.loads),
    "application/msgpack": (msgpack.packb, msgpack.unpackb),
}


async def ask(bus: Bus, subject: str, data: bytes, headers: dict[str, str] | None = None) -> list[Delivery]:
    """Every answer, up to the one that is marked as the last."""
    answers: list[Delivery] = []
    done = asyncio.Event()

    async def take(delivery: Delivery) -> None:
        answers.append(delivery)
        if delivery.headers.get("Pecsched-Done") == "true":
            done.set()

    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, take)
    await bus.publish(subject, data, reply=inbox, headers=headers)
    await asyncio.wait_for(done.wait(), 10)
    await subscription.unsubscribe()
    return answers


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("content_type", list(CODECS))
async def test_generate_streams_in_the_clients_encoding(content_type: str, named: bool):
    encode, decode = CODECS[content_type]
    async with world() as w:
        client = MemoryBus(w.broker, "client")
        headers = {"Content-Type": content_type} if named else None
        request = {"prompt": "the capital of France is", "request_id": "mine", "temperature": 0}
        answers = await ask(client, subjects.GENERATE, encode(request), headers)
        assert {a.headers["Content-Type"] for a in answers} == {content_type}
        *parts, last = [decode(a.data) for a in answers]
        assert "".join(p["text"] for p in parts) == ANSWER
        assert [i for p in parts for i in p["token_ids"]] == w.cluster.answer_ids
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["stop"]
        assert {p["request_id"] for p in parts} == {"mine"}
        assert last["done"] is True
        assert last["usage"]["completion_tokens"] == len(w.cluster.answer_ids)
        assert w.cluster.submitted[0].reply_inbox is not None
        await client.close()


async def test_generate_as_a_single_answer_with_messages_choices_and_logprobs():
    async with world() as w:
        client = MemoryBus(w.broker, "client")
        messages = [{"role": "user", "content": "what is the capital?"}]
        request = {"messages": messages, "stream": False, "n": 2, "logprobs": 1}
        (answer,) = await ask(client, subjects.GENERATE, json.dumps(request).encode())
        body = json.loads(answer.data)
        assert [c["text"] for c in body["choices"]] == [ANSWER] * 2
        assert len(body["choices"][0]["logprobs"]) == len(w.cluster.answer_ids)
        assert body["done"] is True
        assert body["model"] == NAME

        by_ids = {"prompt_token_ids": ids_of("the capital"), "stream": False}
        await ask(client, subjects.GENERATE, json.dumps(by_ids).encode())
        assert w.cluster.prompts[-1] == ids_of("the capital")
        await client.close()


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", None, 400, "malformed_body"),
        (b"", None, 400, "malformed_body"),
        (b"\xc1", None, 400, "malformed_body"),
        (b"\x81\xa6prompt", {"Content-Type": "application/msgpack"}, 400, "malformed_body"),
        (b"{}", {"Content-Type": "text/html"}, 415, "unsupported_content_type"),
        (b"{}", None, 400, "invalid_value"),
        (b'{"prompt": "a", "prompt_token_ids": [1]}', None, 400, "invalid_value"),
        (b'{"prompt": ""}', None, 400, "empty_prompt"),
        (b'{"prompt": ["a"]}', None, 400, "invalid_type"),
        (b'{"prompt": "a", "wings": 2}', None, 400, "unknown_parameter"),
        (b'{"prompt": "a", "request_id": "a:b"}', None, 400, "invalid_value"),
        (b'{"prompt": "a", "model": "gpt-4"}', None, 404, "model_not_found"),
        (b'{"prompt": "a", "max_tokens": %d}' % CONTEXT, None, 400, "context_length_exceeded"),
        (msgpack.packb({"prompt": "a", "temperature": float("nan")}), None, 400, "invalid_value"),
        (msgpack.packb({"prompt": "a", "top_p": float("inf")}), None, 400, "invalid_value"),
        (b'{"prompt": "' + b"a" * 3_000 + b'"}', None, 413, "body_too_large"),
    ],
)
async def test_every_bad_request_is_one_error_marked_as_the_end(body: bytes, headers: Any, status: int, code: str):
    async with world(body_bytes_max=2_000) as w:
        client = MemoryBus(w.broker, "client")
        (answer,) = await ask(client, subjects.GENERATE, body, headers)
        decode = CODECS[answer.headers["Content-Type"]][1]
        error = decode(answer.data)
        assert error["error"]["code"] == code
        assert error["done"] is True
        assert answer.headers["Nats-Service-Error-Code"] == str(status)
        assert w.cluster.submitted == []
        await client.close()


async def test_cancel_ends_a_request_of_any_router_and_an_unknown_one_is_404():
    async with world() as w:
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 1
        other_bus = MemoryBus(w.broker, "other")
        other = Router(RouterSettings(drain_s=0.01), other_bus, MemoryStore(), tiny_text())
        async with Supervisor() as tasks:
            running = tasks.spawn(other.run(), name="other")
            await other.started()
            client = MemoryBus(w.broker, "client")
            for number in range(4):  # either router may get the request, and either the cancel
                request = json.dumps({"prompt": "the", "request_id": f"r{number}"}).encode()
                asking = asyncio.ensure_future(ask(client, subjects.GENERATE, request))
                await w.cluster.until(lambda wanted=number + 1: len(w.cluster.submitted) == wanted)
                cancel = json.dumps({"request_id": f"r{number}"}).encode()
                (answer,) = await ask(client, subjects.CANCEL, cancel)
                assert json.loads(answer.data)["cancelled"] is True
                last = json.loads((await asking)[-1].data)
                assert (last["error"]["code"], last["done"]) == ("request_cancelled", True)
                await w.cluster.until(lambda name=f"r{number}": name in w.cluster.cancelled)
            (answer,) = await ask(client, subjects.CANCEL, b'{"request_id": "nobody"}')
            assert json.loads(answer.data)["error"]["code"] == "request_not_found"
            await client.close()
            other.stop()
            await running
        await other_bus.close()


async def test_models_and_cluster():
    async with world() as w:
        client = MemoryBus(w.broker, "client")
        (models,) = await ask(client, subjects.MODELS, b"")
        assert json.loads(models.data)["data"][0]["id"] == NAME
        (view,) = await ask(client, subjects.CLUSTER, b"", {"Content-Type": "application/msgpack"})
        assert [v["profile"]["role"] for v in msgpack.unpackb(view.data)["workers"]] == ["prefill", "decode"]
        w.broker.cut("cluster")
        (error,) = await ask(client, subjects.CLUSTER, b"")
        assert json.loads(error.data)["error"]["code"] == "no_scheduler"
        await client.close()


async def test_the_example_client_on_a_real_nats(capsys: pytest.CaptureFixture[str]):
    async with EmbeddedServer.nats() as server, Supervisor() as tasks:
        buses = [await connect_nats(server.url, name) for name in ("router", "cluster")]
        store = MemoryStore()
        cluster = FakeCluster(buses[1], store, ANSWER)
        await cluster.serve(tasks)
        await buses[1].flush()
        router = Router(RouterSettings(drain_s=0.1), buses[0], store, tiny_text())
        running = tasks.spawn(router.run(), name="router")
        await router.started()
        await buses[0].flush()

        assert await nats_example.main("hello", nats_url=server.url, max_tokens=50) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(ANSWER + "\n")
        assert await nats_example.main("hello", nats_url=server.url, max_tokens=10_000) == 1
        assert "the context holds" in capsys.readouterr().err

        cluster.hold, cluster.hold_after = asyncio.Event(), 1
        client = await nats_example.nats.connect(server.url)
        parts = nats_example.generate(client, {"prompt": "the"})
        assert (await anext(parts))["text"]
        await parts.aclose()
        await cluster.until(lambda: cluster.cancelled == [cluster.submitted[-1].request_id])
        await client.close()

        router.stop()
        await running
        for bus in buses:
            await bus.close()
