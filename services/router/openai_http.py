"""The OpenAI-compatible HTTP door.

A stream's headers wait for its first piece, so that whatever goes wrong before has a status of its own;
what goes wrong later is an error event in the stream. A client that disconnects cancels its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from common.logs import get_logger
from common.metrics import CONTENT_TYPE, RESPONSES
from services.router import render
from services.router.api_errors import ApiError
from services.router.api_types import ChatRequest, CompletionRequest
from services.router.door import Door, new_request_id
from services.router.page_http import is_page_file, page_routes
from services.router.tickets import Piece, Ticket
from services.router.validate import ModelFacts, Plan, check_request_id, parse, plan_chat, plan_completion

T = TypeVar("T")
RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)
log = get_logger(__name__)

BODY_S = 30.0
"""How long a client may take to send its body."""
SEND_S = 60.0
"""How long a client may leave its connection's buffer full; its request was cancelled long before."""
OPEN_PATHS = ("/health", "/live", "/metrics")
"""Answered without an API key: probes and scrapers have none."""
TRACEPARENT_CHARS_MAX = 128
STATE_ID = "pecsched.request_id"


def is_open(path: str) -> bool:
    """Whether it is answered without an API key."""
    return path in OPEN_PATHS or is_page_file(path)


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def create_app(door: Door) -> ASGIApp:
    """The ASGI application. It starts nothing: the router runs beside it."""
    handlers = Handlers(door)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/v1/requests/{request_id}/story", handlers.story),
            Route("/cluster", handlers.cluster),
            Route("/health", handlers.health),
            Route("/live", handlers.live),
            Route("/metrics", handlers.metrics),
            *(page_routes(door.activity, guarded) if door.settings.pages_max else ()),
        ],
        middleware=[Middleware(Frontdesk, door=door)],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_client_gone,
            Exception: _on_bug,
        },
    )


class Frontdesk:
    """Names the request, asks for the key, counts the answers, ends connections of a router that leaves. Plain ASGI, so
    that nothing stands between a stream and its client."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door
        api_key = door.settings.api_key
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        try:
            name = new_request_id() if given is None else check_request_id(given.decode("latin-1"))
        except ApiError as error:
            self._door.metrics.counter(RESPONSES, str(error.status)).inc()
            await _error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})[STATE_ID] = name

        async def send_named(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._door.metrics.counter(RESPONSES, str(message["status"])).inc()
                own = [(b"x-request-id", name.encode()), *([(b"connection", b"close")] if self._door.leaving else [])]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        if self._expected is not None and not is_open(scope["path"]):
            offered = headers.get(b"authorization", b"")
            if not hmac.compare_digest(offered, self._expected):
                refused = ApiError(401, "invalid_api_key", "a valid API key is needed: Authorization: Bearer <key>")
                await _error_response(refused)(scope, receive, send_named)
                return
        await self._app(scope, receive, send_named)


@dataclass(slots=True)
class Handlers:
    """One method per route."""

    door: Door

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, plan_chat, render.ChatShape)

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, plan_completion, render.CompletionShape)

    async def _generate(
        self,
        request: Request,
        kind: type[RequestT],
        make_plan: Callable[[RequestT, ModelFacts], Plan],
        make_shape: Callable[[render.Answer], render.Shape],
    ) -> Response:
        body = await read_body(request, self.door.settings.body_bytes_max)
        plan = make_plan(parse(body, kind), self.door.text.facts)
        name = getattr(request.state, STATE_ID)
        answer = render.Answer(
            request_id=name,
            model=self.door.text.facts.name,
            created=int(time.time()),
            token_bytes=self.door.text.token_bytes,
            logprobs=plan.sampling.logprobs is not None,
            include_usage=plan.include_usage,
        )
        traceparent = request.headers.get("traceparent", "")[:TRACEPARENT_CHARS_MAX]
        opening = partial(self.door.open, plan, request_id=name, traceparent=traceparent)
        return Generation(self.door, opening, make_shape(answer), plan)

    async def models(self, request: Request) -> Response:
        facts = self.door.text.facts
        return json_response(render.models(facts.name, facts.context_tokens, 0))

    async def model(self, request: Request) -> Response:
        facts, asked = self.door.text.facts, request.path_params["name"]
        if asked != facts.name:
            message = f"the model {asked!r} is not served here; {facts.name!r} is"
            raise ApiError(404, "model_not_found", message, param="model")
        return json_response(render.models(facts.name, facts.context_tokens, 0)["data"][0])

    async def story(self, request: Request) -> Response:
        told = await self.door.story(check_request_id(request.path_params["request_id"]))
        if not told.lines:
            message = f"nothing is known of a request {told.request_id!r}"
            raise ApiError(404, "request_not_found", message, param="request_id")
        return json_response({"request_id": told.request_id, "lines": told.lines})

    async def cluster(self, request: Request) -> Response:
        return json_response(msgspec.to_builtins(await self.door.cluster()))

    async def health(self, request: Request) -> Response:
        """200 when a scheduler answers and both kinds of workers are there; else 503, with what is missing. 503 too
        when this router is to stop, so that a proxy sends nothing more here."""
        detail: dict[str, Any] = {"status": "ok", "model": self.door.text.facts.name, "missing": []}
        if self.door.leaving:
            return json_response(detail | {"status": "leaving"}, status=503)
        try:
            view = await self.door.cluster()
        except ApiError as error:
            detail.update(missing=["scheduler"], reason=error.message)
        else:
            roles = [worker.profile.role for worker in view.workers]
            detail["workers"] = {role: roles.count(role) for role in ("prefill", "decode")}
            detail["missing"] = [f"{role} worker" for role in ("prefill", "decode") if role not in roles]
        if detail["missing"]:
            detail["status"] = "unavailable"
        return json_response(detail, status=503 if detail["missing"] else 200)

    async def live(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.door.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


class Generation(Response):
    """Answers a request from its ticket, whole or as a stream, and closes the ticket whatever happens."""

    def __init__(self, door: Door, opening: Callable[[], Awaitable[Ticket]], shape: render.Shape, plan: Plan) -> None:
        super().__init__()
        self._door = door
        self._opening = opening
        self._shape = shape
        self._plan = plan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._answer(scope, receive, bounded(send)))
        except ClientGone:
            log.info("the client left; its request is cancelled", request_id=scope["state"][STATE_ID])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket = await self._opening()
        try:
            if self._plan.stream:
                await self._stream(ticket, send)
            else:
                pieces = [piece async for piece in ticket.pieces()]
                body = self._shape.whole(render.merged(pieces, len(ticket.choices)), ticket.usage)
                await json_response(body)(scope, receive, send)
        finally:
            await self._door.close(ticket)

    async def _stream(self, ticket: Ticket, send: Send) -> None:
        """All that is there goes out in one write, the end mark with the last tokens."""
        started, opened = False, set[int]()
        try:
            async for pieces in ticket.batches():
                data = self._events(pieces, opened)
                if ticket.whole:
                    data += self._end(ticket)
                elif not data:
                    continue
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                    started = True
                await send({"type": "http.response.body", "body": data, "more_body": not ticket.whole})
        except ApiError as error:
            if not started:
                raise
            data = _event(error.body()) + render.STREAM_END
            await send({"type": "http.response.body", "body": data, "more_body": False})

    def _events(self, pieces: Sequence[Piece], opened: set[int]) -> bytes:
        """`opened`: choices whose first part has been said."""
        events: list[bytes] = []
        for piece in pieces:
            if piece.choice not in opened:
                opened.add(piece.choice)
                first = self._shape.first(piece.choice)
                if first is not None:
                    events.append(_event(first))
            if piece.text or piece.finish_reason or (self._plan.sampling.logprobs is not None):
                events.append(_event(self._shape.part(piece)))
        return b"".join(events)

    def _end(self, ticket: Ticket) -> bytes:
        usage = _event(self._shape.usage(ticket.usage)) if self._plan.include_usage else b""
        return usage + render.STREAM_END


STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Raises: ApiError 413 as soon as the limit is passed, 408 if the client dawdles; ClientDisconnect."""
    too_large = ApiError(413, "body_too_large", f"the body is larger than {bytes_max} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > bytes_max:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > bytes_max:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"the body did not arrive within {BODY_S:g} s") from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work; cancel it when the client goes. Raises: ClientGone, and whatever the work raises."""
    working = asyncio.current_task()
    assert working is not None
    gone = over = False

    def left(watching: asyncio.Task[None]) -> None:
        nonlocal gone
        if not over and not watching.cancelled():
            gone = True
            working.cancel()

    # Only the watcher is a task of its own: the work of most requests is done before a second one would have paid.
    watching = asyncio.ensure_future(_disconnected(receive))
    watching.add_done_callback(left)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and working.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        over = True
        watching.cancel()


def bounded(send: Send) -> Send:
    """Raises: ClientGone, from a send for which the client leaves its connection's buffer full too long."""

    async def bounded_send(message: Any) -> None:
        try:
            async with asyncio.timeout(SEND_S):
                await send(message)
        except TimeoutError:
            raise ClientGone from None

    return bounded_send


async def guarded(receive: Receive, send: Send, stream: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
    """Stream until the end, or until the client goes."""
    with contextlib.suppress(ClientGone):
        await unless_gone(receive, stream(bounded(send)))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_response(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _error_response(error: ApiError) -> Response:
    return json_response(error.body(), status=error.status, headers=error.headers())


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "http_error"
    text = f"{request.method} {request.url.path}: {error.detail}"
    return _error_response(ApiError(error.status_code, code, text))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; logs do


async def _on_bug(request: Request, error: Exception) -> Response:
    log.exception("a request failed unexpectedly", path=request.url.path, exc_info=error)
    return _error_response(ApiError(500, "internal_error", "an internal error; the router's log has it"))
