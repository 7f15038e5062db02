"""The Store port: cluster state that outlives a process and that others read. Redis (`store_redis.py`)
and an in-memory twin (`store_memory.py`) pass one contract suite. Keys: `keys.py` names every one.

Nothing in a decision waits for the store: it is written before the commands that depend on it are
sent, and read at recovery and by other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import PecSchedError


class StoreError(PecSchedError):
    """The store did not answer within its bound, or refused."""


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    ttl_s: float | None = None
    """None: until deleted."""


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class Touch:
    """Renew the time to live of a key, if it is there."""

    key: str
    ttl_s: float


Write = Put | Delete | Touch


class Store(Protocol):
    async def commit(self, writes: Sequence[Write]) -> None:
        """All of them or none, in one round trip; retried within a bound over a lost connection (every
        write is idempotent). Raises: StoreError."""
        ...

    async def get(self, key: str) -> bytes | None: ...

    async def scan(self, prefix: str) -> dict[str, bytes]:
        """Every key with this prefix and its value. For recovery and people, not for decisions."""
        ...

    async def acquire_lease(self, key: str, owner: str, ttl_s: float) -> int | None:
        """Take the lease if it is free (or already this owner's): its term, higher than that of every
        earlier holder; None: somebody else holds it."""
        ...

    async def renew_lease(self, key: str, owner: str, ttl_s: float) -> bool:
        """False: lost."""
        ...

    async def release_lease(self, key: str, owner: str) -> None:
        """Give it up, if it is this owner's."""
        ...

    async def ping(self) -> None:
        """Raises: StoreError."""
        ...

    async def close(self) -> None: ...
