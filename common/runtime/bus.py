"""The Bus port: messages between processes, at most once. NATS (`bus_nats.py`) and an in-memory twin
(`bus_memory.py`) pass one contract suite (`tests/runtime/test_bus_contract.py`).

Subjects are dot-separated; a subscription may use `*` (one token) and `>` (the rest). Delivery to one
subscription is in order per publisher. Handlers of one subscription run one after another, so a
handler must not wait long: it hands the message to a mailbox.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import PecSchedError


class BusError(PecSchedError):
    """The bus could not take the message (not connected, payload too large, buffer full)."""


class NoResponders(BusError):
    """Nobody serves the subject of a request."""


class BusTimeout(BusError):
    """No answer to a request within its bound."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One received message."""

    subject: str
    data: bytes
    reply: str | None = None
    """Where an answer is expected; None: nowhere."""
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Delivery], Awaitable[None]]


class Subscription(Protocol):
    async def unsubscribe(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One subject of a discoverable service."""

    name: str
    subject: str
    handler: Handler
    metadata: Mapping[str, str] = field(default_factory=dict)


class Bus(Protocol):
    async def publish(
        self, subject: str, data: bytes, *, reply: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Hand over one message; while disconnected, buffer within a bound. Raises: BusError."""
        ...

    async def subscribe(self, subject: str, handler: Handler, *, queue: str | None = None) -> Subscription:
        """Receive messages; among subscribers with the same `queue`, each message goes to one."""
        ...

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Delivery:
        """Publish and wait for the first answer. Raises: NoResponders, BusTimeout, BusError."""
        ...

    async def serve(self, name: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> Subscription:
        """Offer endpoints as a discoverable micro service (NATS: ping, info, stats for free); instances of
        the same name share the load. Its `unsubscribe` takes no new requests, and returns when each that was on its
        way here has been handled: nobody asks in vain because an instance ends."""
        ...

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call back after the connection was lost and is there again: messages may be missing."""
        ...

    def new_inbox(self) -> str:
        """A unique subject to receive answers on."""
        ...

    @property
    def max_payload(self) -> int:
        """Largest message in bytes."""
        ...

    async def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until everything published has reached the broker."""
        ...

    async def close(self) -> None:
        """Deliver what is pending, then disconnect."""
        ...


HEADER_OVERHEAD_BYTES = 16
"""`NATS/1.0` and the line ends around the headers."""


def check_size(subject: str, data: bytes, headers: Mapping[str, str] | None, bytes_max: int) -> None:
    """Refuse what the server would: it counts headers too, and cuts off whoever sends more. Raises: BusError."""
    size = len(data)
    if headers:
        size += HEADER_OVERHEAD_BYTES + sum(len(k.encode()) + len(v.encode()) + 4 for k, v in headers.items())
    if size > bytes_max:
        raise BusError(f"message of {size} bytes on {subject}; the server takes at most {bytes_max}")
