"""Being the only one: a role of which one process is active and any number stand by.

The store keeps the lease; its term rises with every holder and is the epoch of the holder's orders, so
that orders of one who lost the lease without noticing are refused by whoever has heard its successor.
"""

from __future__ import annotations

import asyncio

from common.errors import PecSchedError
from common.logs import get_logger
from common.runtime.store import Store, StoreError

log = get_logger(__name__)

RENEWALS_PER_TTL = 3
TRIES_PER_TTL = 8


class LeaseLost(PecSchedError):
    """Somebody else may hold the lease now; the process must not go on giving orders."""


class Lease:
    """Take it with `acquire`, run `keep` beside the work, give it up with `release`."""

    def __init__(self, store: Store, key: str, owner: str, ttl_s: float) -> None:
        self._store = store
        self._key = key
        self._owner = owner
        self._ttl_s = ttl_s
        self._renewed_s = 0.0
        self._held = False

    async def acquire(self) -> int:
        """Wait until the lease is ours, however long another holds it or the store is away. Returns the term."""
        loop = asyncio.get_running_loop()
        waiting_for = ""
        while True:
            try:
                asked_s = loop.time()
                term = await self._store.acquire_lease(self._key, self._owner, self._ttl_s)
                reason = "another process holds it"
            except StoreError as error:
                term, reason = None, str(error)
            if term is not None:
                self._renewed_s, self._held = asked_s, True
                return term
            if reason != waiting_for:
                log.info("standing by for the lease", key=self._key, reason=reason)
                waiting_for = reason
            await asyncio.sleep(self._ttl_s / TRIES_PER_TTL)

    async def keep(self) -> None:
        """Renew until cancelled. While the store is away nobody else can take the lease from it, so the work
        goes on. Raises: LeaseLost."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._ttl_s / RENEWALS_PER_TTL)
            asked_s = loop.time()
            try:
                held = await self._store.renew_lease(self._key, self._owner, self._ttl_s)
                held = held or await self._retake(asked_s)
            except StoreError as error:
                log.warning("the lease could not be renewed", key=self._key, error=str(error))
                continue
            if not held:
                self._held = False
                raise LeaseLost(f"the lease {self._key} is no longer ours: another process is active")
            self._renewed_s = asked_s

    async def _retake(self, asked_s: float) -> bool:
        """The store forgot the lease (it restarted without its data). Had it not, ours would not have expired
        yet: if it is free now, nobody else held it, and we go on under the old term."""
        if asked_s - self._renewed_s >= self._ttl_s:
            return False
        return await self._store.acquire_lease(self._key, self._owner, self._ttl_s) is not None

    async def release(self) -> None:
        """Give it up at once, so that a standby need not wait for it to expire."""
        if not self._held:
            return
        self._held = False
        try:
            await self._store.release_lease(self._key, self._owner)
        except StoreError as error:
            log.warning("the lease will expire by itself", key=self._key, error=str(error))
