"""A router that is told to stop loses nobody: on a real socket, by a client's eyes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from common.errors import StartupError
from common.runtime import subjects
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.supervisor import Supervisor
from common.settings import RouterSettings
from services.router.main import listening, serve
from services.router.service import Router
from tests.services.router_world import FakeCluster, tiny_text

ANSWER = "Paris, on the Seine."
BODY = {"prompt": "the", "stream": True}


class Leaving:
    """A router that serves on a port, and a client that keeps its connections."""

    def __init__(self, url: str, cluster: FakeCluster, http: httpx.AsyncClient, stop: asyncio.Event) -> None:
        self.url = url
        self.cluster = cluster
        self.http = http
        self.stop = stop

    async def ask(self) -> httpx.Response:
        return await self.http.post(f"{self.url}/v1/completions", json=BODY)

    async def until_refused(self) -> None:
        """Until nobody takes a new connection."""
        async with asyncio.timeout(5), httpx.AsyncClient(trust_env=False) as another:
            with suppress(httpx.ConnectError):
                while True:
                    await another.get(f"{self.url}/live", headers={"Connection": "close"})


@asynccontextmanager
async def leaving_world(**settings: Any) -> AsyncIterator[Leaving]:
    broker, stop = MemoryBroker(), asyncio.Event()
    buses = [MemoryBus(broker, "router"), MemoryBus(broker, "cluster")]
    cluster = FakeCluster(buses[1], MemoryStore(), ANSWER)
    router = Router(RouterSettings(**{"drain_s": 5.0, **settings}), buses[0], cluster.store, tiny_text())
    with listening("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with Supervisor() as tasks, httpx.AsyncClient(timeout=10, trust_env=False) as http:
            await cluster.serve(tasks)
            serving = tasks.spawn(serve(router, listener, stop), name="serve")
            await router.started()
            yield Leaving(url, cluster, http, stop)
            stop.set()
            await serving
    for bus in buses:
        await bus.close()


def text_of(answer: httpx.Response) -> str:
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


async def test_an_answer_on_its_way_is_finished_and_its_connection_closed() -> None:
    async with leaving_world() as w:
        w.cluster.hold, w.cluster.hold_after = asyncio.Event(), 2
        asking = asyncio.create_task(w.ask())
        await w.cluster.until(lambda: w.cluster.submitted)
        w.stop.set()
        await w.until_refused()
        w.cluster.hold.set()
        assert text_of(await asking) == ANSWER
        with pytest.raises(httpx.ConnectError):  # and not an error on a connection that was kept
            await w.ask()


async def test_a_request_on_an_open_connection_is_still_taken() -> None:
    async with leaving_world(late_s=1.0) as w:
        assert "connection" not in (await w.ask()).headers
        w.stop.set()
        await w.until_refused()
        late = await w.ask()
        assert (text_of(late), late.headers["connection"]) == (ANSWER, "close")
        with pytest.raises(httpx.ConnectError):
            await w.ask()


async def test_a_proxy_that_asks_hears_that_it_leaves() -> None:
    async with leaving_world(late_s=1.0) as w:
        assert (await w.http.get(f"{w.url}/health")).json()["status"] == "ok"
        w.stop.set()
        await w.until_refused()
        answer = await w.http.get(f"{w.url}/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "leaving")


async def test_a_connection_on_which_nobody_asks_is_closed() -> None:
    async with leaving_world(late_s=0.2, drain_s=30.0) as w:
        w.cluster.hold = asyncio.Event()
        await w.http.get(f"{w.url}/live")
        asking = asyncio.create_task(w.ask())  # keeps the router from ending
        await w.cluster.until(lambda: w.cluster.submitted)
        reader, writer = await asyncio.open_connection(*w.url.removeprefix("http://").split(":"))
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"}")
        w.stop.set()
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        assert not asking.done()
        w.cluster.hold.set()
        assert text_of(await asking) == ANSWER
        writer.close()


async def test_a_request_over_nats_that_is_on_its_way_is_served() -> None:
    async with leaving_world() as w:
        bus, inbox = w.cluster.bus, w.cluster.bus.new_inbox()
        last: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def hear(delivery: Any) -> None:
            message = json.loads(delivery.data)
            if message.get("done"):
                last.set_result(message)

        await bus.subscribe(inbox, hear)
        body = json.dumps({"prompt": "the", "stream": False}).encode()
        await bus.publish(subjects.GENERATE, body, reply=inbox)
        w.stop.set()
        async with asyncio.timeout(5):
            assert (await last)["choices"][0]["text"] == ANSWER


async def test_two_routers_share_a_port_if_both_say_so() -> None:
    with listening("127.0.0.1", 0, reuse_port=True) as first:
        port = first.getsockname()[1]
        with listening("127.0.0.1", port, reuse_port=True) as second:
            assert second.getsockname() == first.getsockname()
        with pytest.raises(StartupError, match="choose another"), listening("127.0.0.1", port):
            pass
