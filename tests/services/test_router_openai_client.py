"""The official `openai` client against uvicorn on a real socket; and the router's own process."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.supervisor import Supervisor
from common.settings import RouterSettings
from services.embedded import EmbeddedServer
from services.router.main import listening, serve
from services.router.service import Router
from tests.services.router_world import NAME, FakeCluster, ids_of, tiny_text, tiny_tokenizer, write_folder

ANSWER = "Paris, on the Seine. 🙂"
MESSAGES: Any = [{"role": "user", "content": "what is the capital of France?"}]


@asynccontextmanager
async def openai_world(**settings: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeCluster]]:
    broker, store, stop = MemoryBroker(), MemoryStore(), asyncio.Event()
    buses = [MemoryBus(broker, "router"), MemoryBus(broker, "cluster")]
    cluster = FakeCluster(buses[1], store, ANSWER)
    router = Router(RouterSettings(**{"drain_s": 0.1, "late_s": 0.0, **settings}), buses[0], store, tiny_text())
    with listening("127.0.0.1", 0) as listener:
        async with Supervisor() as tasks:
            await cluster.serve(tasks)
            serving = tasks.spawn(serve(router, listener, stop), name="serve")
            await router.started()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0, timeout=10) as client:
                yield client, cluster
            stop.set()
            await serving
    for bus in buses:
        await bus.close()


async def test_chat_completions():
    async with openai_world(api_key="secret") as (client, cluster):
        whole = await client.chat.completions.create(model=NAME, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2)
        assert [c.message.content for c in whole.choices] == [ANSWER] * 2
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        assert whole.usage.completion_tokens == 2 * len(cluster.answer_ids)

        stream = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, n=2
        )
        texts, usage, ends = ["", ""], None, []
        async for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends += [choice.finish_reason] if choice.finish_reason else []
        assert texts == [ANSWER] * 2
        assert ends == ["stop"] * 2
        assert usage.completion_tokens == 2 * len(cluster.answer_ids)


async def test_completions_stop_seed_and_token_ids():
    async with openai_world() as (client, cluster):
        stopped = await client.completions.create(model=NAME, prompt=ids_of("the"), stop=[" on"], seed=3, logprobs=1)
        assert stopped.choices[0].text == "Paris,"
        assert stopped.choices[0].finish_reason == "stop"
        assert cluster.submitted[0].sampling.seed == 3
        stream = await client.completions.create(
            model=NAME, prompt="the", stream=True, max_tokens=4, extra_body={"ignore_eos": True, "top_k": 5}
        )
        parts = [chunk.choices[0] async for chunk in stream]
        assert parts[-1].finish_reason == "length"
        assert cluster.submitted[1].sampling.top_k == 5
        assert [m.id async for m in client.models.list()] == [NAME]


async def test_errors_have_the_clients_own_classes():
    async with openai_world(api_key="secret") as (client, cluster):
        with pytest.raises(openai.BadRequestError, match="max_tokens 10000 = "):
            await client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=10_000)
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            await client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            await client.chat.completions.create(
                model=NAME, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        cluster.refuse_code = "queue_full"
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model=NAME, messages=MESSAGES)
        cluster.refuse_code = "no_workers"
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=NAME, messages=MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_the_connection_cancels(stream: bool):
    async with openai_world() as (client, cluster):
        cluster.hold, cluster.hold_after = asyncio.Event(), 1
        asking = asyncio.ensure_future(_read_all(client, stream))
        await cluster.until(lambda: cluster.submitted)
        asking.cancel()
        await cluster.until(lambda: cluster.cancelled == [cluster.submitted[0].request_id])


async def _read_all(client: openai.AsyncOpenAI, stream: bool) -> None:
    answer: Any = await client.completions.create(model=NAME, prompt="the", stream=stream)
    if stream:
        async for _ in answer:
            pass


async def test_an_error_in_a_stream_reaches_the_client():
    async with openai_world(drain_s=0.05) as (client, cluster):
        cluster.hold, cluster.hold_after = asyncio.Event(), 2
        stream = await client.completions.create(model=NAME, prompt="the", stream=True)
        await anext(aiter(stream))
        for _ in range(40):  # interrupted beyond every bound
            await cluster._tell(cluster.submitted[-1], cluster.interruption(cluster.submitted[-1]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(openai.APIError, match="interrupted"):
            async for _ in stream:
                pass


# --- the process ----------------------------------------------------------------------------------


def command(folder: Path, port: int, nats_url: str, redis_url: str) -> list[str]:
    flags = f"{{'model': {str(folder)!r}, 'port': {port}, 'nats_url': {nats_url!r}, 'redis_url': {redis_url!r}}}"
    code = (
        "from common.settings import RouterSettings; from services.router.main import main; "
        f"raise SystemExit(main(RouterSettings(**{flags})))"
    )
    return [sys.executable, "-c", code]


async def test_the_process_serves_drains_at_sigterm_and_refuses_what_cannot_work(tmp_path: Path):
    folder = write_folder(tmp_path, tiny_tokenizer())
    async with EmbeddedServer.nats() as nats, EmbeddedServer.redis() as redis:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            refused = await _run(command(folder, port, nats.url, redis.url))
            missing = await _run(command(tmp_path / "none", 0, nats.url, redis.url))
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1 + refused.stderr.count('"message"'), refused.stderr
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused.stderr
        assert missing.returncode == 2
        assert "Traceback" not in refused.stderr + missing.stderr

        process = await asyncio.create_subprocess_exec(
            *command(folder, port, nats.url, redis.url), stderr=asyncio.subprocess.PIPE
        )
        try:
            await _live(port, process)
            async with httpx.AsyncClient() as http:
                health = await http.get(f"http://127.0.0.1:{port}/health")
            assert (health.status_code, health.json()["missing"]) == (503, ["scheduler"])
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 15) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(subprocess.run, line, capture_output=True, text=True, timeout=30)


async def _live(port: int, process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while b"listening" not in await process.stderr.readline():
            assert process.returncode is None
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://127.0.0.1:{port}/live")).status_code == 200
