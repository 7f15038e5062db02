"""Writes to the store that nothing waits for: what a process says of itself and of what it holds.

The last word per key counts; it is retried until the store has it, and said again well before its time
to live ends, so that a store that came back empty is whole again soon, and the words of a dead process lapse.
Each word waits for a moment, and what is taken back within it was never said: a short that lives some tens of
milliseconds costs the store nothing, and its word is not even encoded.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

from common.logs import get_logger
from common.runtime.store import Delete, Put, Store, StoreError, Write

ValueT = TypeVar("ValueT")
log = get_logger(__name__)

RENEWALS_PER_TTL = 3
WRITES_PER_COMMIT_MAX = 256
GATHER_S = 0.2
"""How long a word waits before it is written, with those that came meanwhile."""


class WriteBehind(Generic[ValueT]):
    """Keeps a set of keys in the store as long as `run` runs. Its size is bounded by what its owner holds.

    `encode`: a value as the store has it; called when it is written, so values must not change."""

    def __init__(self, store: Store, *, ttl_s: float, encode: Callable[[ValueT], bytes]) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._encode = encode
        self._kept: dict[str, ValueT] = {}
        self._dirty: dict[str, float] = {}
        """Keys whose word has not reached the store, and when it is due there. In order, but for those to be renewed:
        they wait for the ones before them, `GATHER_S` at most."""
        self._said: set[str] = set()
        """Keys that the store may know of."""
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        return f"WriteBehind(kept={len(self._kept)}, behind={len(self._dirty)})"

    def put(self, key: str, value: ValueT) -> None:
        self._kept[key] = value
        self._note(key)

    def delete(self, key: str) -> None:
        self._kept.pop(key, None)
        if key in self._said:
            self._note(key)
        else:
            self._dirty.pop(key, None)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        period_s = self._ttl_s / RENEWALS_PER_TTL
        renew_s = loop.time() + period_s
        while True:
            now_s = loop.time()
            if now_s >= renew_s:
                for key in self._kept:
                    self._dirty.setdefault(key, now_s)
                renew_s = now_s + period_s
            self._wake.clear()
            due_s = next(iter(self._dirty.values()), renew_s)
            if due_s > now_s or not self._dirty:
                await self._wait_until(min(due_s, renew_s))
            elif not await self._write_some(now_s):
                await asyncio.sleep(period_s)

    async def close(self) -> None:
        """Take everything back, as far as the store answers. After `run` has ended."""
        for key in list(self._kept):
            self.delete(key)
        while self._dirty and await self._write_some(math.inf):
            continue

    def _note(self, key: str) -> None:
        if not self._dirty:
            self._wake.set()  # else the first one's time is waited for already
        self._dirty.setdefault(key, asyncio.get_running_loop().time() + GATHER_S)

    async def _write_some(self, now_s: float) -> bool:
        """What is due by then."""
        due = (key for key, due_s in self._dirty.items() if due_s <= now_s)
        keys = list(islice(due, WRITES_PER_COMMIT_MAX))
        words = {key: self._kept.get(key) for key in keys}
        writes: list[Write] = [
            Delete(key) if value is None else Put(key, self._encode(value), ttl_s=self._ttl_s)
            for key, value in words.items()
        ]
        self._said.update(keys)
        try:
            await self._store.commit(writes)
        except StoreError as error:
            log.warning("the store lags behind", writes=len(self._dirty), error=str(error))
            return False
        for key, value in words.items():
            if self._kept.get(key) is value:  # else a newer word came meanwhile
                self._dirty.pop(key, None)
                if value is None:
                    self._said.discard(key)
        return True

    async def _wait_until(self, at_s: float) -> None:
        timer = asyncio.get_running_loop().call_at(at_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
