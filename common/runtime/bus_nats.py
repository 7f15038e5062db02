"""The bus on NATS.

The client reconnects for ever: a process keeps what it runs while the server is away, what it publishes
meanwhile waits in a bounded buffer, and `on_reconnect` callbacks let it reconcile afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from nats import errors as nats_errors
from nats import micro
from nats.aio.client import Client

from common.logs import get_logger
from common.runtime.bus import BusError, BusTimeout, Delivery, Endpoint, Handler, NoResponders, Subscription, check_size
from common.runtime.urls import redacted

RECONNECT_WAIT_S = 0.1
PING_INTERVAL_S = 2
PINGS_UNANSWERED_MAX = 2
"""A connection that is silent for longer than two intervals counts as lost, and is made anew."""
OUTAGE_BUFFER_BYTES_MAX = 4 * 1024 * 1024
SUBSCRIPTION_PENDING_MAX = 65_536
SUBSCRIPTION_PENDING_BYTES_MAX = 64 * 1024 * 1024
CLOSE_S = 5.0

log = get_logger(__name__)


async def connect_nats(
    url: str, name: str, *, patience_s: float = 5.0, on_closed: Callable[[], None] | None = None
) -> NatsBus:
    """Connect, trying for at most `patience_s`.

    `url`: one server or several, separated by commas. `on_closed` is called if the client gives up for
    good without having been asked to (the server refused it): the process should end. Raises: BusError.
    """
    bus = NatsBus(url, name, on_closed)
    await bus._connect(patience_s)
    return bus


class NatsBus:
    """Implements `Bus`. Made by `connect_nats`."""

    def __init__(self, url: str, name: str, on_closed: Callable[[], None] | None = None) -> None:
        self._url = url
        self._name = name
        self._client = Client()
        self._callbacks: list[Callable[[], None]] = []
        self._on_closed = on_closed
        self._closing = False
        self._last_error = ""
        self.errors = 0
        """Calls that the server did not take, or not in time; and messages that came too fast."""
        self.disconnects = 0

    @property
    def is_connected(self) -> bool:
        return bool(self._client.is_connected)

    def __repr__(self) -> str:
        state = "connected" if self._client.is_connected else "closed" if self._client.is_closed else "reconnecting"
        return f"NatsBus({self._name!r}, {redacted(self._url)}, {state})"

    async def _connect(self, patience_s: float) -> None:
        connecting = self._client.connect(
            servers=self._url.split(","),
            name=self._name,
            error_cb=self._failed,
            disconnected_cb=self._disconnected,
            reconnected_cb=self._reconnected,
            closed_cb=self._closed,
            connect_timeout=2,
            reconnect_time_wait=RECONNECT_WAIT_S,
            max_reconnect_attempts=-1,
            ping_interval=PING_INTERVAL_S,
            max_outstanding_pings=PINGS_UNANSWERED_MAX,
            pending_size=OUTAGE_BUFFER_BYTES_MAX,
            flush_timeout=2.0,
            drain_timeout=CLOSE_S,
        )
        try:
            async with asyncio.timeout(patience_s):
                await connecting
        except (TimeoutError, OSError, ValueError, nats_errors.Error) as error:
            reason = self._last_error or str(error) or "no answer"
            await self._abandon()
            raise BusError(f"cannot reach NATS at {redacted(self._url)}: {reason}") from error

    async def publish(
        self, subject: str, data: bytes, *, reply: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """See `Bus`."""
        check_size(subject, data, headers, self.max_payload)
        # Not `_as_bus_errors`: a context manager costs a third of what publishing does.
        try:
            await self._client.publish(subject, data, reply=reply or "", headers=dict(headers) if headers else None)
        except (nats_errors.Error, OSError) as error:
            raise self._bus_error(error, subject) from error

    async def subscribe(self, subject: str, handler: Handler, *, queue: str | None = None) -> Subscription:
        """See `Bus`. When it returns, the server knows of the subscription (unless disconnected: then it
        learns of it at reconnection)."""

        async def receive(msg: Any) -> None:
            try:
                await handler(_delivery(msg))
            except Exception:
                log.exception("a bus handler failed", bus=self._name, subject=msg.subject)

        async with self._as_bus_errors(subject):
            subscription = await self._client.subscribe(
                subject,
                queue=queue or "",
                cb=receive,
                pending_msgs_limit=SUBSCRIPTION_PENDING_MAX,
                pending_bytes_limit=SUBSCRIPTION_PENDING_BYTES_MAX,
            )
        await self._settle()
        return _NatsSubscription(subscription)

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Delivery:
        """See `Bus`."""
        check_size(subject, data, headers, self.max_payload)
        try:
            async with self._as_bus_errors(subject):
                msg = await self._client.request(
                    subject, data, timeout=timeout_s, headers=dict(headers) if headers else None
                )
        except BusTimeout:
            raise BusTimeout(f"no answer on {subject} within {timeout_s} s") from None
        return _delivery(msg)

    async def serve(self, name: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> Subscription:
        """See `Bus`. Raises: BusError; ValueError for a name, version or subject that NATS does not allow."""
        async with self._as_bus_errors(name):
            service = await micro.add_service(self._client, name=name, version=version, description=description)
            for endpoint in endpoints:
                await service.add_endpoint(
                    name=endpoint.name,
                    subject=endpoint.subject,
                    handler=self._answering(endpoint.handler),
                    metadata=dict(endpoint.metadata),
                )
        await self._settle()
        return _NatsService(service)

    def _answering(self, handler: Handler) -> Callable[[Any], Any]:
        async def handle(request: Any) -> None:
            try:
                # The public Request hides the reply subject; streaming answers need it.
                await handler(_delivery(request._msg))
            except Exception:
                log.exception("a service handler failed", bus=self._name, subject=request.subject)
                raise  # nats.micro answers with an error header, so that the caller does not wait

        return handle

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """See `Bus`."""
        self._callbacks.append(callback)

    def new_inbox(self) -> str:
        """See `Bus`."""
        return str(self._client.new_inbox())

    @property
    def max_payload(self) -> int:
        """See `Bus`: what the server announced."""
        return int(self._client.max_payload)

    async def flush(self, timeout_s: float = 2.0) -> None:
        """See `Bus`. Raises: BusError, BusTimeout."""
        if self._client.is_reconnecting:
            raise BusTimeout("disconnected from NATS; nothing can be flushed")
        async with self._as_bus_errors("flush"):
            # Twice: the client writes a PING straight to the socket, ahead of what waits for its flusher task.
            # The first round trip lets the flusher run; the second PING is then behind all that was said before.
            await self._client.flush(timeout=timeout_s)
            await self._client.flush(timeout=timeout_s)

    async def close(self) -> None:
        """See `Bus`. Bounded; what cannot be delivered by then is lost."""
        if self._closing:
            return
        self._closing = True
        try:
            async with asyncio.timeout(CLOSE_S + 1.0):
                await self._client.drain()
        except (nats_errors.Error, TimeoutError, OSError) as error:
            log.debug("closed without draining", bus=self._name, reason=str(error))
            await self._abandon()

    async def _abandon(self) -> None:
        self._closing = True
        with contextlib.suppress(nats_errors.Error, TimeoutError, OSError, AssertionError):
            # AssertionError: closed before the first connection got as far as its queues.
            async with asyncio.timeout(1.0):
                await self._client.close()

    async def _settle(self) -> None:
        with contextlib.suppress(BusError):
            await self.flush()

    async def _failed(self, error: Exception) -> None:
        self._last_error = _reason(error)
        if isinstance(error, nats_errors.SlowConsumerError):
            self.errors += 1
            log.warning("slow subscriber: message dropped", bus=self._name, subject=error.subject)
        else:
            log.debug("NATS client error", bus=self._name, reason=self._last_error)

    async def _disconnected(self) -> None:
        if not self._closing:
            self.disconnects += 1
            log.warning("NATS connection lost; reconnecting", bus=self._name, url=redacted(self._url))

    async def _reconnected(self) -> None:
        log.info("NATS connection is back", bus=self._name)
        for callback in self._callbacks:
            callback()

    async def _closed(self) -> None:
        if self._closing:
            return
        self._closing = True
        log.error("NATS refused this client for good", bus=self._name, reason=self._last_error)
        if self._on_closed is not None:
            self._on_closed()

    @contextlib.asynccontextmanager
    async def _as_bus_errors(self, subject: str) -> AsyncIterator[None]:
        try:
            yield
        except (nats_errors.Error, OSError) as error:  # TimeoutError is an OSError
            raise self._bus_error(error, subject) from error

    def _bus_error(self, error: Exception, subject: str) -> BusError:
        """As our own; all but the lack of a responder, which is an answer, are counted."""
        if isinstance(error, nats_errors.NoRespondersError):
            return NoResponders(f"nobody serves {subject}")
        self.errors += 1
        match error:
            case nats_errors.OutboundBufferLimitError():
                return BusError(f"disconnected, and the outgoing buffer is full; {subject} not sent")
            case nats_errors.TimeoutError() | TimeoutError():
                return BusTimeout(f"NATS did not answer in time ({subject})")
            case _:
                return BusError(f"{_reason(error)} ({subject})")


class _NatsSubscription:
    def __init__(self, subscription: Any) -> None:
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        with contextlib.suppress(nats_errors.Error):  # closed or draining: it ends anyway
            await self._subscription.unsubscribe()


class _NatsService:
    def __init__(self, service: Any) -> None:
        self._service = service

    async def unsubscribe(self) -> None:
        # Not `stop()`: it throws away what is on its way, and whoever asked would wait until their time is up.
        subscriptions = [endpoint._subscription for endpoint in self._service._endpoints]
        with contextlib.suppress(nats_errors.Error, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                for subscription in (*subscriptions, *self._service._subscriptions.values()):
                    await subscription.drain()


def _delivery(msg: Any) -> Delivery:
    return Delivery(subject=msg.subject, data=msg.data, reply=msg.reply or None, headers=msg.headers or {})


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error).removeprefix("nats: ") or type(error).__name__
