"""The live page's door: its files, which lie in this package, and the stream of what happens.

The page holds no secret and is open; what it shows is not: `/activity` asks for the API key like everything else. A
browser's `EventSource` cannot send one, so the page reads the stream by `fetch`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from services.router.activity_feed import ActivityFeed
from services.router.api_errors import ApiError

FILES_PATH = "/page/"
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""By a file's last suffix; others are not served."""
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]

Guard = Callable[[Receive, Send, Callable[[Send], Coroutine[Any, Any, None]]], Awaitable[None]]
"""Runs a stream until it ends, its client goes, or its client stops reading for too long."""


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """By path within the page's folder."""
    found: dict[str, PageFile] = {}
    folder = resources.files("services.router") / "page"
    for entry in (*folder.iterdir(), *(folder / "vendor").iterdir()):
        media_type = MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
            found[entry.name] = PageFile(content, media_type, etag)
    return found


def page_routes(feed: ActivityFeed, guard: Guard) -> list[Route]:
    async def index(request: Request) -> Response:
        return _file(request, "index.html")

    async def file(request: Request) -> Response:
        return _file(request, request.path_params["name"])

    async def activity(request: Request) -> Response:
        return ActivityStream(feed, guard)

    return [Route("/", index), Route(FILES_PATH + "{name}", file), Route("/activity", activity)]


def is_page_file(path: str) -> bool:
    """Whether this path is answered without an API key."""
    return path == "/" or path.startswith(FILES_PATH)


def _file(request: Request, name: str) -> Response:
    found = page_files().get(name)
    if found is None:
        raise ApiError(404, "not_found", f"the live page has no file {name!r}")
    headers = {
        "etag": found.etag,
        "cache-control": "no-cache",  # kept, and asked about: a router that was upgraded has another page
        "content-security-policy": CONTENT_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)


class ActivityStream(Response):
    def __init__(self, feed: ActivityFeed, guard: Guard) -> None:
        super().__init__()
        self._feed = feed
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(receive, send, self._stream)

    async def _stream(self, send: Send) -> None:
        async with self._feed.watch() as page:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            async for chunk in page.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
