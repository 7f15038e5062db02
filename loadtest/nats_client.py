"""The client's twin over NATS: the same questions, asked as `pecsched.v1.generate`.

One connection and one subscription for all requests: an answer's subject ends in the number of its request. The time
of a token is taken when its message is handed over, before it is parsed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from common.errors import PecSchedError
from common.runtime import subjects
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.bus_nats import connect_nats
from loadtest.client import ERROR_CHARS_MAX, Answer, ClientError
from loadtest.workload import Ask

CONNECT_S = 2.0
DESCRIBED_S = 10.0
SUBJECTS = {"/v1/models": subjects.MODELS, "/cluster": subjects.CLUSTER}
"""Of what the router tells over HTTP under this path."""


class Door(Protocol):
    """A way into a cluster: `Client` over HTTP, `NatsClient` over NATS."""

    async def complete(self, ask: Ask, request_id: str) -> Answer:
        """Send one request and take in its stream. Never raises for what the server does: see `Answer.error`."""
        ...

    async def get(self, path: str) -> Any:
        """What the router tells there, as builtins. Raises: ClientError."""
        ...

    async def close(self) -> None: ...


class _Part(msgspec.Struct):
    """One message of an answer, as far as it is of interest."""

    token_ids: Sequence[int] = ()
    finish_reason: str | None = None
    done: bool = False
    error: Any = None


_decode_part = msgspec.json.Decoder(_Part).decode


class _Exchange:
    """One request, and what of its answer has arrived."""

    def __init__(self, sent_s: float) -> None:
        self.answer = Answer(sent_s)
        self.ended = asyncio.Event()

    def on_message(self, delivery: Delivery, now_s: float) -> None:
        answer = self.answer
        if delivery.headers.get("Status") == "503":
            self.fail(f"no router serves {subjects.GENERATE}")
            return
        part = _decode_part(delivery.data)
        if part.error is not None:
            self.fail(str(part.error)[:ERROR_CHARS_MAX])
            return
        if part.token_ids:
            answer.first_s = now_s if answer.first_s is None else answer.first_s
            answer.last_s = now_s
            answer.tokens += len(part.token_ids)
        answer.finish_reason = part.finish_reason or answer.finish_reason
        if part.done:
            answer.done = True
            self.ended.set()

    def fail(self, reason: str) -> None:
        self.answer.error = reason
        self.ended.set()


class NatsClient:
    """Made by `connect`, or `on` a bus. `timeout_s` bounds a whole answer."""

    def __init__(self, bus: Bus, timeout_s: float) -> None:
        self._bus = bus
        self._timeout_s = timeout_s
        self._inbox = bus.new_inbox()
        self._waiting: dict[str, _Exchange] = {}
        self._serial = 0

    @classmethod
    async def connect(cls, url: str, *, timeout_s: float) -> NatsClient:
        """Raises: ClientError."""
        try:
            return await cls.on(
                await connect_nats(url, "pecsched-loadtest-client", patience_s=CONNECT_S), timeout_s=timeout_s
            )
        except BusError as error:
            raise ClientError(str(error)) from error

    @classmethod
    async def on(cls, bus: Bus, *, timeout_s: float) -> NatsClient:
        """Takes the bus over. Raises: BusError."""
        client = cls(bus, timeout_s)
        await bus.subscribe(f"{client._inbox}.*", client._hear)
        return client

    async def complete(self, ask: Ask, request_id: str) -> Answer:
        """See `Door`. The ask's body is one made for NATS (`workload.nats_body`), its request's id in it."""
        self._serial += 1
        name = str(self._serial)
        exchange = self._waiting[name] = _Exchange(asyncio.get_running_loop().time())
        try:
            await self._bus.publish(subjects.GENERATE, ask.body, reply=f"{self._inbox}.{name}")
            async with asyncio.timeout(self._timeout_s):
                await exchange.ended.wait()
        except TimeoutError:
            exchange.fail(f"no whole answer within {self._timeout_s:g} s")
            await self._cancel(request_id)
        except PecSchedError as error:
            exchange.fail(str(error))
        except asyncio.CancelledError:
            await self._cancel(request_id)
            raise
        finally:
            del self._waiting[name]
        return exchange.answer

    async def get(self, path: str) -> Any:
        """See `Door`."""
        try:
            delivery = await self._bus.request(SUBJECTS[path], b"{}", timeout_s=DESCRIBED_S)
        except BusError as error:
            raise ClientError(f"{error}: does a router run there?") from error
        told = msgspec.json.decode(delivery.data)
        if isinstance(told, dict) and told.get("error"):
            raise ClientError(f"{SUBJECTS[path]}: {str(told['error'])[:ERROR_CHARS_MAX]}")
        return told

    async def close(self) -> None:
        await self._bus.close()

    async def _hear(self, delivery: Delivery) -> None:
        now_s = asyncio.get_running_loop().time()
        exchange = self._waiting.get(delivery.subject.rpartition(".")[2])
        if exchange is None:
            return  # it was given up
        try:
            exchange.on_message(delivery, now_s)
        except msgspec.MsgspecError as error:
            exchange.fail(f"unreadable answer: {error}")

    async def _cancel(self, request_id: str) -> None:
        """Nobody waits for it any more. What the router says to that is of no interest."""
        try:
            body = msgspec.json.encode({"request_id": request_id})
            await self._bus.publish(subjects.CANCEL, body, reply=f"{self._inbox}.cancelled")
        except BusError:
            return  # the bus is away: the router will miss its client by itself
