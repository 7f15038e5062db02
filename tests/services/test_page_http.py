"""The live page's door: its files, the stream of what happens, and what it costs when nobody looks."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.messages.base import Message
from common.messages.sp import SegmentPaused, SegmentRunning
from common.runtime import subjects, wire
from services.router import activity_feed, page_http
from services.router.activity_feed import CHUNKS_MAX, Page
from services.router.api_errors import ApiError
from services.router.openai_http import create_app
from tests.services.router_world import NAME, World, world

WHO = {"worker_id": "prefill-0", "request_id": "L", "attempt": 0}
RUNNING = SegmentRunning(**WHO)
PAUSED = SegmentPaused(**WHO, step=1, prefilled_tokens=9, pause_latency_s=0.0)


class Stream:
    """`GET /activity` in plain ASGI: what arrives, event by event; it may stop reading, and leave."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._left = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def get(self, within_s: float = 5.0) -> tuple[str, Any]:
        async with asyncio.timeout(within_s):
            return await self._events.get()

    async def until(self, *kinds: str) -> list[Any]:
        """Read until the last of these kinds of segment came: all rows read so far."""
        rows: list[Any] = []
        while not set(kinds) <= {row[2] for row in rows}:
            name, data = await self.get()
            rows += data["segments"] if name == "change" else []
        return rows

    def leave(self) -> None:
        self._left.set()
        self.reads.set()

    async def receive(self) -> Any:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        for part in message["body"].decode().split("\n\n"):
            if found := re.fullmatch(r"event: (\w+)\ndata: (.*)", part):
                self._events.put_nowait((found[1], json.loads(found[2])))
            elif part:
                self._events.put_nowait(("body", json.loads(part)))


@asynccontextmanager
async def looking(w: World, key: str = "") -> AsyncIterator[Stream]:
    stream = Stream()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/activity",
        "raw_path": b"/activity",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode())],
        "server": ("router", 80),
    }
    serving = asyncio.ensure_future(create_app(w.router)(scope, stream.receive, stream.send))
    try:
        yield stream
    finally:
        stream.leave()
        async with asyncio.timeout(5.0):
            await serving


async def say(w: World, *messages: Message) -> None:
    for message in messages:
        await w.cluster.bus.publish(subjects.COORDINATOR, wire.encode(message))


def ears(w: World) -> int:
    """Subscriptions to the members' inbox: the router has one while it listens, nobody else in this world."""
    return sum(s.pattern == subjects.COORDINATOR for s in w.broker._subscriptions)


# --- files ---------------------------------------------------------------------------------------


async def test_the_page_and_all_it_names_are_served_with_a_policy_and_without_a_key():
    async with world(api_key="secret") as w:
        page = await w.http.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert not re.search(r"<script(?![^>]* src=)|\son\w+=|style=", page.text), "inline script, handler or style"
        named = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text))
        assert {"/page/main.js", "/page/page.css"} <= named
        asked: set[str] = set()
        while named - asked:
            path = min(named - asked)
            answer = await w.http.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["x-content-type-options"] == "nosniff"
            asked.add(path)
            named |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)}
        assert "/page/uPlot.esm.js" in named
        assert (await w.http.get("/activity")).status_code == 401


async def test_nothing_on_the_page_is_fetched_from_elsewhere():
    for name, found in page_http.page_files().items():
        text = re.sub(r"^\s*(//|\*).*$|/\*.*?\*/|// http.*$", "", found.content.decode(), flags=re.MULTILINE)
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, name


async def test_a_file_that_is_known_is_not_sent_again():
    async with world() as w:
        first = await w.http.get("/page/main.js")
        again = await w.http.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = await w.http.get("/page/main.js", headers={"If-None-Match": '"older"'})
        assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize("name", ["nothing.js", "LICENSE.uPlot", "..%2Fservice.py", "%2E%2E/service.py"])
async def test_what_is_no_file_of_the_page_is_404(name: str):
    async with world() as w:
        assert (await w.http.get(f"/page/{name}")).status_code == 404


async def test_without_pages_there_is_no_page():
    async with world(pages_max=0) as w:
        for path in ("/", "/page/main.js", "/activity"):
            assert (await w.http.get(path)).status_code == 404


# --- the stream ----------------------------------------------------------------------------------


async def test_a_page_begins_with_the_state_and_hears_what_happens():
    async with world() as w, looking(w) as stream:
        name, state = await stream.get()
        assert (name, state["model"], stream.status) == ("state", NAME, 200)
        assert stream.headers["content-type"].startswith("text/event-stream")
        name, change = await stream.get()
        assert [lane[1] for lane in change["summary"]["lanes"]] == ["prefill-0", "decode-1"]
        assert change["summary"]["scheduler_answers"]
        await say(w, RUNNING, PAUSED, RUNNING)
        rows = await stream.until("part", "pause")
        assert [row[2] for row in rows if row[5] is not None] == ["part", "pause"]
        async with looking(w) as second:  # it finds what the first has seen
            _, state = await second.get()
            assert [row[2] for row in state["change"]["segments"]] == ["part", "pause", "part"]
            assert state["change"]["requests"][0][1:3] == ["L", "long"]


async def test_with_a_key_the_stream_asks_for_it():
    async with world(api_key="secret") as w:
        async with looking(w, key="secret") as stream:
            assert (await stream.get())[0] == "state"
        async with looking(w, key="wrong") as stream:
            assert (await stream.get())[1]["error"]["code"] == "invalid_api_key"


async def test_the_router_listens_only_while_somebody_looks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activity_feed, "LINGER_S", 0.05)
    monkeypatch.setattr(activity_feed, "TICK_S", 0.01)
    async with world() as w:
        assert ears(w) == 0
        async with looking(w) as stream:
            await stream.get()
            await stream.get()
            assert ears(w) == 1
            async with looking(w) as second:
                await second.get()
                assert ears(w) == 1, "one feed serves all pages"
        for _ in range(500):  # nobody says when the last one has stopped listening
            await asyncio.sleep(0.01 if ears(w) else 0.0)
        assert ears(w) == 0
        assert not w.router.activity.is_listening
        async with looking(w) as stream:  # and anew
            await stream.get()
            await stream.get()
            assert ears(w) == 1


async def test_a_page_loaded_again_at_once_finds_what_it_had_shown():
    async with world() as w:
        async with looking(w) as stream:
            await stream.get()
            await stream.get()
            await say(w, RUNNING)
            await stream.until("part")
        async with looking(w) as stream:
            assert (await stream.get())[1]["change"]["segments"][0][2] == "part"


async def test_one_page_too_many_is_503():
    async with world(pages_max=1) as w, looking(w) as first:
        await first.get()
        async with looking(w) as second:
            _, body = await second.get()
            assert second.status == 503
            assert body["error"]["code"] == "too_many_pages"
            assert second.headers["retry-after"] == "5"


async def test_a_page_that_does_not_read_is_let_go_and_others_hear_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activity_feed, "TICK_S", 0.0)
    async with world() as w, looking(w) as slow, looking(w) as quick:
        await slow.get()
        slow.reads.clear()
        for _ in range(CHUNKS_MAX + 3):
            await say(w, RUNNING, PAUSED)
            await quick.until("part")
        slow.reads.set()
        names = []
        while "end" not in names:
            names.append((await slow.get())[0])
        assert len(names) <= 3, "what waited for it was not kept"


def test_a_pages_buffer_is_bounded_and_its_end_is_said_once():
    page = Page()
    for i in range(10 * CHUNKS_MAX):
        page.put(b"%d" % i)
    page.end("again")
    assert list(page._chunks) == [b'event: end\ndata: "this page reads too slowly"\n\n']


async def test_a_scheduler_that_is_lost_is_said_and_one_that_is_back_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activity_feed, "LOOK_S", 0.02)
    async with world() as w, looking(w) as stream:
        await stream.get()
        ask = w.router.activity._ask

        async def lost() -> Any:
            raise ApiError(503, "no_scheduler", "no scheduler answers")

        for answers, asked in ((True, ask), (False, lost), (True, ask)):
            w.router.activity._ask = asked
            heard = None
            while heard is None or heard["scheduler_answers"] is not answers:
                heard = (await stream.get())[1]["summary"]
            assert len(heard["lanes"]) == 2, "workers are shown all the same"
            assert (heard["sample"][1] is None) is not answers


async def test_what_is_unreadable_is_left_out_and_the_page_lives():
    async with world() as w, looking(w) as stream:
        await stream.get()
        await stream.get()
        await w.cluster.bus.publish(subjects.COORDINATOR, b"\x81\xa4type\xacSegmentPaused")
        await w.cluster.bus.publish(subjects.COORDINATOR, b"")
        await say(w, RUNNING)
        assert await stream.until("part")


async def test_a_router_that_stops_says_so_to_its_pages():
    async with world() as w, looking(w) as stream:
        await stream.get()
        w.router.stop()
        while (event := await stream.get())[0] != "end":
            pass
        assert event == ("end", "the router stops")
