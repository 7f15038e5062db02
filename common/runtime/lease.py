"""Being the only one: a role of which one process is active and any number stand by.

The store keeps the lease; its term rises with every holder and is the epoch of the holder's orders, so
that orders of one who lost the lease without noticing are refused by whoever has heard its successor.
"""

from __future__ import annotations

import asyncio

from common.errors import PecSchedError
from common.logs import get_logger
from common.runtime import keys
from common.runtime.store import Store, StoreError
from common.runtime.supervisor import Supervisor

log = get_logger(__name__)

RENEWALS_PER_TTL = 3
TRIES_PER_TTL = 8


class LeaseLost(PecSchedError):
    """Somebody else may hold the lease now; the process must not go on giving orders."""


class Lease:
    """`stand_by` for it, then work; give it up with `release`, always."""

    def __init__(self, store: Store, key: str, owner: str, ttl_s: float) -> None:
        self._store = store
        self._key = key
        self._owner = owner
        self._ttl_s = ttl_s
        self._term = 0
        self._held = False

    async def stand_by(self, tasks: Supervisor, stop: asyncio.Event) -> int | None:
        """Wait for the lease, and keep it by a task of `tasks`. Returns the term; None, if `stop` was set first."""
        taken = tasks.spawn(self.acquire(), name="lease")
        stopped = tasks.spawn(stop.wait(), name="stop")
        await asyncio.wait([taken, stopped], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return None
        tasks.spawn(self.keep(), name="lease renewal")
        return taken.result()

    async def acquire(self) -> int:
        """Wait until the lease is ours, however long another holds it or the store is away. Returns the term."""
        waiting_for = ""
        while True:
            try:
                term = await self._store.acquire_lease(self._key, self._owner, self._ttl_s)
                reason = "another process holds it"
            except StoreError as error:
                term, reason = None, str(error)
            if term is not None:
                self._term, self._held = term, True
                return term
            if reason != waiting_for:
                log.info("standing by for the lease", key=self._key, reason=reason)
                waiting_for = reason
            await asyncio.sleep(self._ttl_s / TRIES_PER_TTL)

    async def keep(self) -> None:
        """Renew until cancelled. While the store is away nobody else can take the lease from it, so the work
        goes on. Raises: LeaseLost."""
        while True:
            await asyncio.sleep(self._ttl_s / RENEWALS_PER_TTL)
            try:
                held = await self._store.renew_lease(self._key, self._owner, self._ttl_s)
                held = held or await self._retake()
            except StoreError as error:
                log.warning("the lease could not be renewed", key=self._key, error=str(error))
                continue
            if not held:
                self._held = False
                raise LeaseLost(f"the lease {self._key} is no longer ours: another process is active")

    async def _retake(self) -> bool:
        """The lease ran out while the store was away, or the store lost it. If its term is still ours (or lost
        too), nobody else held it since: take it again and go on under the old term, as if nothing had been."""
        last = await self._store.get(keys.term(self._key))
        if last is not None and int(last) != self._term:
            return False
        term = await self._store.acquire_lease(self._key, self._owner, self._ttl_s)
        if term is None:
            return False
        log.warning("the lease had run out and is ours again", key=self._key)
        self._term = term
        return True

    async def release(self) -> None:
        """Give it up at once, so that a standby need not wait for it to expire."""
        if not self._held:
            return
        self._held = False
        try:
            await self._store.release_lease(self._key, self._owner)
        except StoreError as error:
            log.warning("the lease will expire by itself", key=self._key, error=str(error))
