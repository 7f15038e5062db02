"""The NATS door: a micro service with the endpoints generate, cancel, models and cluster.

A body is JSON or MessagePack, as the header `Content-Type` says (`application/json`,
`application/msgpack`); without it, what begins like a JSON object is JSON. Answers come in the same encoding.

`generate` answers with many messages to the reply inbox (`"stream": true`, the default here):
`{"request_id", "index", "text", "token_ids", "finish_reason"}`, then one with `"done": true`, `"usage"` and
the header `Pecsched-Done: true`; or with a single message that has all of it (`"stream": false`). An error
is `{"error": {"message", "type", "param", "code"}, "done": true}`, with NATS's own service error headers.
From a shell: `nats request pecsched.v1.generate '{"prompt": "…", "stream": false}'`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from common.logs import get_logger
from common.runtime import subjects
from common.runtime.bus import Bus, BusError, Delivery, Endpoint, Subscription
from services.router import render
from services.router.api_errors import ApiError
from services.router.api_types import CancelRequest, GenerateRequest
from services.router.door import Door, new_request_id
from services.router.tickets import Piece, Ticket
from services.router.validate import Encoding, Plan, check_request_id, parse, plan_generate

SERVICE = "pecsched"
VERSION = "0.1.0"
DESCRIPTION = "LLM serving in which short requests pause a long prefill"

CONTENT_TYPE = "Content-Type"
DONE = "Pecsched-Done"
TRACEPARENT_CHARS_MAX = 128
ENCODINGS: dict[str, Encoding] = {
    "application/json": "json",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
}

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked, and how to write to them."""

    bus: Bus
    inbox: str
    encoding: Encoding

    async def send(self, body: dict[str, Any], *, done: bool = True, headers: dict[str, str] | None = None) -> None:
        """Raises: BusError, if the message is too large or the bus is away."""
        data = msgspec.json.encode(body) if self.encoding == "json" else msgspec.msgpack.encode(body)
        head = {CONTENT_TYPE: f"application/{self.encoding}", **(headers or {})}
        await self.bus.publish(self.inbox, data, headers={**head, DONE: "true"} if done else head)

    async def refuse(self, error: ApiError, request_id: str | None = None) -> None:
        named = {} if request_id is None else {"request_id": request_id}
        text = error.message.encode("ascii", "replace").decode().replace("\r", " ").replace("\n", " ")
        headers = {"Nats-Service-Error": text[:500], "Nats-Service-Error-Code": str(error.status)}
        await self.send({**named, **error.body(), "done": True}, headers=headers)


class NatsApi:
    """Offered by every router; NATS gives each request to one of them."""

    def __init__(self, door: Door, bus: Bus) -> None:
        self._door = door
        self._bus = bus

    async def serve(self) -> Subscription:
        """Start to serve. Unsubscribe to stop taking requests; those in hand go on."""
        endpoints = [
            Endpoint("generate", subjects.GENERATE, self._asked(self._generate)),
            Endpoint("cancel", subjects.CANCEL, self._asked(self._cancel)),
            Endpoint("models", subjects.MODELS, self._asked(self._models)),
            Endpoint("cluster", subjects.CLUSTER, self._asked(self._cluster)),
        ]
        return await self._bus.serve(SERVICE, VERSION, DESCRIPTION, endpoints)

    def _asked(self, answer: Callable[[Caller, Delivery], Awaitable[None]]) -> Callable[[Delivery], Awaitable[None]]:
        async def handle(delivery: Delivery) -> None:
            # Bus handlers run one after another, and an answer may take long.
            self._door.spawn(self._answer(answer, delivery), name=f"nats {delivery.subject}")

        return handle

    async def _answer(self, answer: Callable[[Caller, Delivery], Awaitable[None]], delivery: Delivery) -> None:
        if delivery.reply is None:
            log.warning("a request without a reply subject was dropped", subject=delivery.subject)
            return
        caller = Caller(self._bus, delivery.reply, "json")
        try:
            try:
                caller = Caller(self._bus, delivery.reply, encoding_of(delivery))
                if len(delivery.data) > self._door.settings.body_bytes_max:
                    limit = self._door.settings.body_bytes_max
                    raise ApiError(413, "body_too_large", f"the body is larger than {limit} bytes")
                await answer(caller, delivery)
            except ApiError as error:
                await caller.refuse(error)
        except BusError as error:
            log.warning("an answer was not sent", inbox=delivery.reply, error=str(error))
        except Exception:
            log.exception("a request failed unexpectedly", subject=delivery.subject)
            await self._refuse_after_bug(caller)

    @staticmethod
    async def _refuse_after_bug(caller: Caller) -> None:
        try:
            await caller.refuse(ApiError(500, "internal_error", "an internal error; the router's log has it"))
        except BusError as error:
            log.warning("an answer was not sent", inbox=caller.inbox, error=str(error))

    async def _generate(self, caller: Caller, delivery: Delivery) -> None:
        request = parse(delivery.data, GenerateRequest, caller.encoding)
        request_id = new_request_id() if request.request_id is None else check_request_id(request.request_id)
        try:
            plan = plan_generate(request, self._door.text.facts)
            traceparent = _header(delivery, "traceparent")[:TRACEPARENT_CHARS_MAX]
            ticket = await self._door.open(
                plan, request_id=request_id, reply_inbox=caller.inbox, traceparent=traceparent
            )
            try:
                await self._deliver(caller, ticket, plan)
            finally:
                await self._door.close(ticket)
        except ApiError as error:
            await caller.refuse(error, request_id)

    async def _deliver(self, caller: Caller, ticket: Ticket, plan: Plan) -> None:
        named = {"request_id": ticket.request_id}
        done = {**named, "done": True, "model": self._door.text.facts.name}
        logprobs = plan.sampling.logprobs is not None
        if plan.stream:
            async for piece in ticket.pieces():
                await caller.send({**named, **self._part(piece, logprobs)}, done=False)
            await caller.send({**done, "usage": ticket.usage.as_dict})
            return
        pieces = [piece async for piece in ticket.pieces()]
        choices = [self._part(piece, logprobs) for piece in render.merged(pieces, len(ticket.choices))]
        await caller.send({**done, "choices": choices, "usage": ticket.usage.as_dict})

    def _part(self, piece: Piece, logprobs: bool) -> dict[str, Any]:
        part: dict[str, Any] = {
            "index": piece.choice,
            "text": piece.text,
            "token_ids": piece.token_ids,
            "finish_reason": piece.finish_reason,
        }
        if logprobs:
            part["logprobs"] = render.chat_logprobs(piece, self._door.text.token_bytes)["content"]
        return part

    async def _cancel(self, caller: Caller, delivery: Delivery) -> None:
        request_id = parse(delivery.data, CancelRequest, caller.encoding).request_id
        if not await self._door.cancel(check_request_id(request_id)):
            raise ApiError(404, "request_not_found", f"no request {request_id!r} is running", param="request_id")
        await caller.send({"request_id": request_id, "cancelled": True, "done": True})

    async def _models(self, caller: Caller, delivery: Delivery) -> None:
        facts = self._door.text.facts
        await caller.send(render.models(facts.name, facts.context_tokens, 0))

    async def _cluster(self, caller: Caller, delivery: Delivery) -> None:
        await caller.send(msgspec.to_builtins(await self._door.cluster()))


def encoding_of(delivery: Delivery) -> Encoding:
    """By header, else by how the body begins. Raises: ApiError 415."""
    given = _header(delivery, "content-type")
    if not given:
        return "json" if not delivery.data.strip() or delivery.data.lstrip()[:1] in b"{[" else "msgpack"
    found = ENCODINGS.get(given.partition(";")[0].strip().lower())
    if found is None:
        raise ApiError(415, "unsupported_content_type", f"{CONTENT_TYPE} {given!r} is none of {', '.join(ENCODINGS)}")
    return found


def _header(delivery: Delivery, name: str) -> str:
    """NATS takes the case of names for part of them, people do not. Empty: not given."""
    return next((value for given, value in delivery.headers.items() if given.lower() == name), "")
