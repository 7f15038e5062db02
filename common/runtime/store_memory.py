"""The store inside one process: a dict with times to live on the event loop's clock.

One object is shared by every role of an in-process cluster, as they would share one Redis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from common.runtime import keys
from common.runtime.store import Delete, Put, StoreError, Touch, Write


class MemoryStore:
    """Implements `Store`. While `down`, every call fails, as an unreachable Redis does."""

    def __init__(self) -> None:
        self.down = False
        self.commits = 0
        """Calls of `commit` so far."""
        self._values: dict[str, tuple[bytes, float | None]] = {}
        self._terms: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"MemoryStore(keys={len(self._values)}, down={self.down})"

    async def commit(self, writes: Sequence[Write]) -> None:
        """See `Store`."""
        now_s = self._enter()
        self.commits += 1
        for write in writes:
            match write:
                case Put(key=key, value=value, ttl_s=ttl_s):
                    self._values[key] = (bytes(value), None if ttl_s is None else now_s + ttl_s)
                case Delete(key=key):
                    self._values.pop(key, None)
                case Touch(key=key, ttl_s=ttl_s):
                    self._touch(key, now_s, ttl_s)

    async def get(self, key: str) -> bytes | None:
        """See `Store`."""
        return self._live(key, self._enter())

    async def scan(self, prefix: str) -> dict[str, bytes]:
        """See `Store`."""
        now_s = self._enter()
        found = {key: self._live(key, now_s) for key in list(self._values) if key.startswith(prefix)}
        return {key: value for key, value in found.items() if value is not None}

    async def acquire_lease(self, key: str, owner: str, ttl_s: float) -> int | None:
        """See `Store`."""
        now_s = self._enter()
        holder = self._live(key, now_s)
        if holder is not None and holder != owner.encode():
            return None
        if holder is None:
            self._terms[key] = self._terms.get(key, 0) + 1
            self._values[keys.term(key)] = (str(self._terms[key]).encode(), None)
        self._values[key] = (owner.encode(), now_s + ttl_s)
        return self._terms[key]

    async def renew_lease(self, key: str, owner: str, ttl_s: float) -> bool:
        """See `Store`."""
        now_s = self._enter()
        return self._live(key, now_s) == owner.encode() and self._touch(key, now_s, ttl_s)

    async def release_lease(self, key: str, owner: str) -> None:
        """See `Store`."""
        if self._live(key, self._enter()) == owner.encode():
            del self._values[key]

    async def ping(self) -> None:
        """See `Store`."""
        self._enter()

    async def close(self) -> None:
        """Nothing to do: others may share this store."""

    def _enter(self) -> float:
        if self.down:
            raise StoreError("the store is down")
        return asyncio.get_running_loop().time()

    def _live(self, key: str, now_s: float) -> bytes | None:
        value, expires_s = self._values.get(key, (None, None))
        if expires_s is not None and expires_s <= now_s:
            del self._values[key]
            return None
        return value

    def _touch(self, key: str, now_s: float, ttl_s: float) -> bool:
        value = self._live(key, now_s)
        if value is None:
            return False
        self._values[key] = (value, now_s + ttl_s)
        return True
