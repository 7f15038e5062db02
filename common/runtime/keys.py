"""The one table of key names in the store. Nothing else spells a key.

| key                                    | writer          | readers                          | time to live |
|----------------------------------------|-----------------|----------------------------------|--------------|
| `pecsched:v1:lease:scheduler`          | schedulers      | schedulers, `pecsched status`    | lease        |
| `pecsched:v1:lease:scheduler:term`     | the lease script| the lease script                 | none         |
| `pecsched:v1:lease:coordinator`        | coordinators    | coordinators, people             | lease        |
| `pecsched:v1:lease:worker:<worker>`    | that worker     | scheduler, `pecsched status`     | lease        |
| `pecsched:v1:lease:router:<router>`    | that router     | scheduler, `pecsched status`     | lease        |
| `pecsched:v1:request:<request>`        | scheduler       | a scheduler that takes over      | an hour      |
| `pecsched:v1:kv:<request>:<worker>`    | holder of the KV| workers, scheduler, people       | renewed      |
| `pecsched:v1:prompt:<request>:<attempt>` | router        | workers                          | renewed      |

Ids never contain a colon: `part` refuses one, so that two requests cannot meet in one key.
"""

from __future__ import annotations

import re

from common.units import Attempt, RequestId, RouterId, WorkerId

ROOT = "pecsched:v1"
_NOT_IN_A_PART = re.compile(r"[:\s]")
TERM_SUFFIX = ":term"
"""Where a lease's last term is counted: beside the lease, without a time to live."""


def scheduler_lease() -> str:
    """Who schedules. Writer: whichever scheduler holds it, its owner name; taken with `acquire_lease`, so
    that the term (the epoch of its orders) rises with every holder. Readers: standbys, people. TTL: the lease."""
    return f"{ROOT}:lease:scheduler"


def coordinator_lease() -> str:
    """Who forms groups: of two coordinators that hear the same orders, only the holder obeys. Writer:
    whichever holds it, its owner name. Readers: standbys, people. TTL: the lease."""
    return f"{ROOT}:lease:coordinator"


def term(lease_key: str) -> str:
    """The last term given out for a lease. Writer and reader: the lease scripts of the store. No TTL."""
    return f"{lease_key}{TERM_SUFFIX}"


def worker_lease(worker_id: WorkerId) -> str:
    """A `WorkerLease`. Writer: the worker, at each heartbeat. Readers: a scheduler that takes over, people.
    TTL: the lease time."""
    return f"{worker_leases()}{part(worker_id)}"


def worker_leases() -> str:
    """Prefix of every `worker_lease`, for `Store.scan`."""
    return f"{ROOT}:lease:worker:"


def router_lease(router_id: RouterId) -> str:
    """A `RouterLease`. Writer: the router, at each heartbeat. Readers: the scheduler, people. TTL: the lease time."""
    return f"{router_leases()}{part(router_id)}"


def router_leases() -> str:
    """Prefix of every `router_lease`, for `Store.scan`."""
    return f"{ROOT}:lease:router:"


def request(request_id: RequestId) -> str:
    """A `RequestRecord`. Writer: the active scheduler, before the commands that depend on it are sent;
    deleted when the request ends. Reader: a scheduler that takes over. TTL: bounded, so that nothing
    outlives its cluster."""
    return f"{requests()}{part(request_id)}"


def requests() -> str:
    """Prefix of every `request`, for `Store.scan`."""
    return f"{ROOT}:request:"


def kv(request_id: RequestId, worker_id: WorkerId) -> str:
    """A `KvLocation`. Writer: the worker that holds the KV, off the critical path; deleted when it is freed.
    Readers: whoever fetches, frees or accounts for it, and people. TTL: renewed while held, so that the KV of
    a dead worker is forgotten."""
    return f"{kv_of(request_id)}{part(worker_id)}"


def kv_of(request_id: RequestId) -> str:
    """Prefix of every `kv` of one request, for `Store.scan`."""
    return f"{kv_all()}{part(request_id)}:"


def kv_all() -> str:
    """Prefix of every `kv`, for `Store.scan`."""
    return f"{ROOT}:kv:"


def prompt(request_id: RequestId, attempt: Attempt) -> str:
    """Little-endian int32 token ids of a prompt too long for the bus. Writer: the router that owns the
    request; deleted by it at the end. Readers: the workers that prefill it. TTL: renewed by the router while
    the request lives. Each attempt has its own: a later one also holds the tokens generated before."""
    return f"{ROOT}:prompt:{part(request_id)}:{attempt}"


def part(identifier: str) -> str:
    """An id as part of a key. Raises: ValueError, if it is empty or has a colon or white space."""
    if not identifier or _NOT_IN_A_PART.search(identifier):
        raise ValueError(f"an id must not be empty nor contain a colon or white space: {identifier[:80]!r}")
    return identifier
