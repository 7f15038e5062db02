"""The bus inside one process: a broker that several `MemoryBus`es share, with faults on demand.

It keeps what NATS keeps and no more: order per publisher and subscription, at most once, one member of
a queue group per message, a bound on what waits. A bus can be cut off (`MemoryBroker.cut`): like a NATS
client it then buffers what it publishes, within a bound, misses what others say, and calls back when
it is there again. Runs on real or virtual time; with a seed, the same way every time.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from common.logs import get_logger
from common.runtime.bus import BusError, BusTimeout, Delivery, Endpoint, Handler, NoResponders, Subscription, check_size

MAX_PAYLOAD = 1024 * 1024
SUBSCRIPTION_PENDING_MAX = 65_536
"""Messages that wait for one subscription's handler; more are dropped, as NATS drops those of a slow consumer."""
OUTAGE_BUFFER_BYTES_MAX = 2 * 1024 * 1024
QUEUE_OF_SERVICES = "q"
SERVICE_END_S = 5.0

log = get_logger(__name__)


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to `pattern` (with `*` for one token, `>` for the rest) receives `subject`."""
    wanted, got = pattern.split("."), subject.split(".")
    for position, token in enumerate(wanted):
        if token == ">":
            return len(got) > position
        if position >= len(got) or token not in ("*", got[position]):
            return False
    return len(wanted) == len(got)


@dataclass(slots=True)
class Faults:
    """What goes wrong between publisher and subscriber. Changed at any time."""

    drop_share: float = 0.0
    """This share of deliveries is lost."""
    delay_s: tuple[float, float] = (0.0, 0.0)
    """Every delivery takes a time drawn evenly from here; order per publisher and subscription stays."""
    drop_if: Callable[[str, Delivery], bool] | None = None
    """Called with the publisher's name and the message; True: lost, for every receiver."""


@dataclass(slots=True, eq=False)
class MemoryBroker:
    """What the buses of one process share. `seed` decides drops, delays and choices within queue groups."""

    seed: int = 0
    max_payload: int = MAX_PAYLOAD
    faults: Faults = field(default_factory=Faults)
    published: int = 0
    """Messages routed so far."""
    _subscriptions: list[_MemorySubscription] = field(default_factory=list)
    _buses: list[MemoryBus] = field(default_factory=list)
    _random: random.Random = field(init=False)
    _names: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def cut(self, name: str | None = None) -> None:
        """Cut the bus of this name off (None: all of them, as when the broker is down)."""
        for bus in self._named(name):
            bus._connected = False

    def heal(self, name: str | None = None) -> None:
        """Connect again what `cut` cut off: buffered messages go out, then `on_reconnect` callbacks run."""
        for bus in self._named(name):
            bus._reconnect()

    def _named(self, name: str | None) -> list[MemoryBus]:
        found = [bus for bus in self._buses if name in (None, bus.name)]
        if name is not None and not found:
            raise KeyError(name)
        return found

    def _route(self, sender: MemoryBus, delivery: Delivery) -> bool:
        """Hand the message to whoever subscribes. False: nobody does."""
        self.published += 1
        receivers = self._receivers(delivery.subject)
        if self.faults.drop_if is not None and self.faults.drop_if(sender.name, delivery):
            return bool(receivers)
        for subscription in receivers:
            if not self.faults.drop_share or self._random.random() >= self.faults.drop_share:
                subscription._send(sender, delivery, self._random.uniform(*self.faults.delay_s))
        return bool(receivers)

    def _receivers(self, subject: str) -> list[_MemorySubscription]:
        receivers: list[_MemorySubscription] = []
        groups: dict[tuple[str, str], list[_MemorySubscription]] = {}
        for subscription in self._subscriptions:
            if not subscription.bus._connected or not matches(subscription.pattern, subject):
                continue
            if subscription.queue is None:
                receivers.append(subscription)
            else:
                groups.setdefault((subscription.pattern, subscription.queue), []).append(subscription)
        return receivers + [self._random.choice(members) for members in groups.values()]


class _MemorySubscription:
    """Messages on their way to one handler, and the task that hands them over one after another."""

    def __init__(self, bus: MemoryBus, pattern: str, handler: Handler, queue: str | None) -> None:
        self.bus = bus
        self.pattern = pattern
        self.queue = queue
        self._handler = handler
        self._links: dict[MemoryBus, deque[Delivery]] = {}
        self._due_s: dict[MemoryBus, float] = {}
        self._in_flight = 0
        self._inbox: asyncio.Queue[Delivery] = asyncio.Queue(SUBSCRIPTION_PENDING_MAX)
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=f"bus {bus.name} {pattern}")

    def _send(self, sender: MemoryBus, delivery: Delivery, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        link = self._links.setdefault(sender, deque())
        if not link and delay_s <= 0.0:
            self._arrive(delivery)
            return
        # Timers due at the same time fire in any order; the link keeps its own.
        self._due_s[sender] = due_s = max(loop.time() + delay_s, self._due_s.get(sender, 0.0))
        link.append(delivery)
        self._in_flight += 1
        loop.call_at(due_s, self._land, link)

    def _land(self, link: deque[Delivery]) -> None:
        self._in_flight -= 1
        self._arrive(link.popleft())

    def _arrive(self, delivery: Delivery) -> None:
        if not self.bus._connected or self._task.done():
            return
        try:
            self._inbox.put_nowait(delivery)
        except asyncio.QueueFull:
            log.warning("slow subscriber: message dropped", bus=self.bus.name, subject=delivery.subject)

    async def _serve(self) -> None:
        while True:
            delivery = await self._inbox.get()
            try:
                await self._handler(delivery)
            except Exception:
                log.exception("a bus handler failed", bus=self.bus.name, subject=delivery.subject)
            finally:
                self._inbox.task_done()

    async def unsubscribe(self) -> None:
        """Nothing that arrives from now on is handled; what waits is dropped."""
        self._leave()
        await self._end()

    async def drain(self, timeout_s: float) -> None:
        """Receive nothing new, handle what waits (for at most `timeout_s`), end."""
        self._leave()
        try:
            async with asyncio.timeout(timeout_s):
                await self._inbox.join()
        except TimeoutError:
            log.warning("messages unhandled at close", bus=self.bus.name, subject=self.pattern)
        await self._end()

    def _leave(self) -> None:
        if self in self.bus.broker._subscriptions:
            self.bus.broker._subscriptions.remove(self)

    async def _end(self) -> None:
        if self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.wait([self._task])


class MemoryBus:
    """One participant of a `MemoryBroker`; implements `Bus`."""

    def __init__(self, broker: MemoryBroker, name: str = "") -> None:
        self.broker = broker
        self.name = name or f"bus-{next(broker._names)}"
        self._connected = True
        self._closed = False
        self._subscriptions: list[_MemorySubscription] = []
        self._buffer: deque[Delivery] = deque()
        self._buffered_bytes = 0
        self._callbacks: list[Callable[[], None]] = []
        self._inboxes = itertools.count()
        broker._buses.append(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._connected else "cut off"
        return f"MemoryBus({self.name!r}, {state}, subscriptions={len(self._subscriptions)})"

    async def publish(
        self, subject: str, data: bytes, *, reply: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """See `Bus`."""
        self._publish(subject, data, reply, headers)

    def _publish(self, subject: str, data: bytes, reply: str | None, headers: Mapping[str, str] | None) -> bool:
        """False: nobody listens."""
        if self._closed:
            raise BusError(f"{self.name} is closed")
        if not subject or any(c in " \t\r\n*>" for c in subject) or "" in subject.split("."):
            raise BusError(f"not a subject to publish on: {subject!r}")
        check_size(subject, data, headers, self.max_payload)
        delivery = Delivery(subject=subject, data=bytes(data), reply=reply, headers=dict(headers or {}))
        if self._connected:
            return self.broker._route(self, delivery)
        if self._buffered_bytes + len(data) > OUTAGE_BUFFER_BYTES_MAX:
            raise BusError(f"disconnected, and {self._buffered_bytes} bytes wait already; {subject} not sent")
        self._buffered_bytes += len(data)
        self._buffer.append(delivery)
        return True

    async def subscribe(self, subject: str, handler: Handler, *, queue: str | None = None) -> Subscription:
        """See `Bus`."""
        return self._subscribe(subject, handler, queue)

    def _subscribe(self, subject: str, handler: Handler, queue: str | None = None) -> _MemorySubscription:
        if self._closed:
            raise BusError(f"{self.name} is closed")
        subscription = _MemorySubscription(self, subject, handler, queue)
        self._subscriptions.append(subscription)
        self.broker._subscriptions.append(subscription)
        return subscription

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Delivery:
        """See `Bus`."""
        answer: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()

        async def take(delivery: Delivery) -> None:
            if not answer.done():
                answer.set_result(delivery)

        inbox = self.new_inbox()
        subscription = self._subscribe(inbox, take)
        try:
            if not self._publish(subject, data, inbox, headers):
                raise NoResponders(f"nobody serves {subject}")
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise BusTimeout(f"no answer on {subject} within {timeout_s} s") from None
        finally:
            await subscription.unsubscribe()
            self._subscriptions.remove(subscription)

    async def serve(self, name: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> Subscription:
        """See `Bus`. There is nobody to discover it here."""
        return _MemoryService(
            [self._subscribe(e.subject, self._answering(e.handler), QUEUE_OF_SERVICES) for e in endpoints]
        )

    def _answering(self, handler: Handler) -> Handler:
        """As NATS's services do: a handler that fails answers with an error header, so that nobody waits."""

        async def handle(delivery: Delivery) -> None:
            try:
                await handler(delivery)
            except Exception as error:
                if delivery.reply:
                    headers = {"Nats-Service-Error": repr(error), "Nats-Service-Error-Code": "500"}
                    await self.publish(delivery.reply, b"", headers=headers)
                raise

        return handle

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """See `Bus`."""
        self._callbacks.append(callback)

    def new_inbox(self) -> str:
        """See `Bus`."""
        return f"_INBOX.{self.name}.{next(self._inboxes)}"

    @property
    def max_payload(self) -> int:
        """See `Bus`."""
        return self.broker.max_payload

    async def flush(self, timeout_s: float = 2.0) -> None:
        """See `Bus`."""
        if not self._connected:
            raise BusTimeout(f"{self.name} is cut off; nothing reached the broker")

    async def close(self) -> None:
        """See `Bus`."""
        if self._closed:
            return
        for subscription in list(self._subscriptions):
            await subscription.drain(timeout_s=5.0)
        self._closed = True
        self._subscriptions.clear()
        self.broker._buses.remove(self)

    def _reconnect(self) -> None:
        if self._connected:
            return
        self._connected = True
        while self._buffer:
            self.broker._route(self, self._buffer.popleft())
        self._buffered_bytes = 0
        for callback in self._callbacks:
            callback()


class _MemoryService:
    def __init__(self, endpoints: list[_MemorySubscription]) -> None:
        self._endpoints = endpoints

    async def unsubscribe(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.drain(SERVICE_END_S)
