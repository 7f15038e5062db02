"""The store on Redis.

Every call is idempotent and is tried again over a lost connection until `patience_s` has passed, so that
a restart of Redis is a pause for its callers and not an error. Leases are decided by scripts inside
Redis. A lease's term is also never below the server's clock in seconds: it rises even if Redis lost its data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common.logs import get_logger
from common.runtime import keys
from common.runtime.store import Delete, Put, StoreError, Touch, Write
from common.runtime.urls import redacted

CONNECTIONS_MAX = 16
CONNECT_S = 1.0
ANSWER_S = 2.0
"""Longest silence of Redis on one command."""
BACKOFF_S = (0.02, 0.25)
"""First and longest wait between two tries."""
SCAN_BATCH = 500

LOST = (
    redis_errors.ConnectionError,  # also: busy loading its file
    redis_errors.TimeoutError,
    OSError,
    TimeoutError,
)

ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return false end
local term = tonumber(redis.call('GET', KEYS[2]) or '0')
if not holder then
  term = math.max(redis.call('INCR', KEYS[2]), tonumber(redis.call('TIME')[1]))
  redis.call('SET', KEYS[2], string.format('%.0f', term))
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return term
"""
RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

T = TypeVar("T")
log = get_logger(__name__)


async def connect_redis(url: str, *, patience_s: float = 5.0) -> RedisStore:
    """Connect and ping, trying for at most `patience_s`, which is then also the bound of every call.

    Raises: StoreError.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=ANSWER_S,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=CONNECT_S,
            retry=Retry(NoBackoff(), 0),  # tried again here, where the bound is
            protocol=2,
        )
    except ValueError as error:
        raise StoreError(f"cannot reach Redis at {redacted(url)}: {error}") from error
    store = RedisStore(Redis.from_pool(pool), patience_s)
    try:
        await store.ping()
    except StoreError as error:
        await store.close()
        raise StoreError(f"cannot reach Redis at {redacted(url)}: {error}") from error
    return store


class RedisStore:
    """Implements `Store`. Made by `connect_redis`."""

    def __init__(self, client: Any, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s
        self.errors = 0
        """Tries without an answer, or with an error for one."""
        self._acquire = client.register_script(ACQUIRE)
        self._renew = client.register_script(RENEW)
        self._release = client.register_script(RELEASE)

    async def commit(self, writes: Sequence[Write]) -> None:
        """See `Store`."""
        if not writes:
            return

        async def once() -> None:
            if len(writes) == 1:  # one command is a transaction by itself, and half the work on both sides
                await _issue(self._client, writes[0])
                return
            # Left on any error: the connection is dropped with it, and nothing half-sent stays behind.
            async with self._client.pipeline(transaction=True) as pipeline:
                for write in writes:
                    _issue(pipeline, write)
                await pipeline.execute()

        await self._patiently(once)

    async def get(self, key: str) -> bytes | None:
        """See `Store`."""
        value: bytes | None = await self._patiently(lambda: self._client.get(key))
        return value

    async def scan(self, prefix: str) -> dict[str, bytes]:
        """See `Store`. Values that are no strings are left out."""

        async def once() -> dict[str, bytes]:
            found: dict[str, bytes] = {}
            cursor = 0
            while True:
                cursor, names = await self._client.scan(cursor, match=f"{_literal(prefix)}*", count=SCAN_BATCH)
                values = await self._client.mget(names) if names else []
                found.update({n.decode(): v for n, v in zip(names, values, strict=True) if v is not None})
                if not cursor:
                    return found

        return await self._patiently(once)

    async def acquire_lease(self, key: str, owner: str, ttl_s: float) -> int | None:
        """See `Store`."""
        lease = [key, keys.term(key)]
        term = await self._patiently(lambda: self._acquire(keys=lease, args=[owner, _ms(ttl_s)]))
        return None if term is None else int(term)

    async def renew_lease(self, key: str, owner: str, ttl_s: float) -> bool:
        """See `Store`."""
        return bool(await self._patiently(lambda: self._renew(keys=[key], args=[owner, _ms(ttl_s)])))

    async def release_lease(self, key: str, owner: str) -> None:
        """See `Store`."""
        await self._patiently(lambda: self._release(keys=[key], args=[owner]))

    async def ping(self) -> None:
        """See `Store`."""
        await self._patiently(lambda: self._client.ping())

    async def close(self) -> None:
        """See `Store`."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _patiently(self, operation: Callable[[], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s
        wait_s, longest_s = BACKOFF_S
        while True:
            try:
                return await operation()
            except LOST as error:
                self.errors += 1
                if loop.time() + wait_s > give_up_s:
                    raise StoreError(_reason(error)) from error
                log.debug("Redis does not answer; trying again", reason=_reason(error))
            except redis_errors.RedisError as error:
                self.errors += 1
                raise StoreError(_reason(error)) from error
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, longest_s)


def _issue(client: Any, write: Write) -> Any:
    """On a client: to be awaited; on a pipeline: queued."""
    match write:
        case Put(key=key, value=value, ttl_s=ttl_s):
            return client.set(key, value, px=None if ttl_s is None else _ms(ttl_s))
        case Delete(key=key):
            return client.delete(key)
        case Touch(key=key, ttl_s=ttl_s):
            return client.pexpire(key, _ms(ttl_s))


def _ms(duration_s: float) -> int:
    return max(1, round(duration_s * 1000))


def _literal(prefix: str) -> str:
    return "".join(f"\\{c}" if c in "*?[]\\^" else c for c in prefix)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(error, ConnectionRefusedError) or isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    return str(error) or type(error).__name__
