"""Every subject on the bus, named once. The table in ARCHITECTURE.md says who sends what where."""

from __future__ import annotations

from common.units import RouterId, WorkerId

ROOT = "pecsched.v1"

# Requests that people make: a NATS micro service of the router, JSON or msgpack by header.
GENERATE = f"{ROOT}.generate"
CANCEL = f"{ROOT}.cancel"
MODELS = f"{ROOT}.models"
CLUSTER = f"{ROOT}.cluster"

# Between the roles: msgpack only.
SCHEDULER = f"{ROOT}.scheduler.inbox"
"""Everything the active scheduler hears: routers, workers, coordinator."""
SCHEDULER_QUERY = f"{ROOT}.scheduler.query"
"""Request/reply: a snapshot of the cluster, the story of a request."""
COORDINATOR = f"{ROOT}.sp.inbox"
"""Everything the SP coordinator hears: scheduler and members."""
ROUTERS_CANCEL = f"{ROOT}.routers.cancel"
"""Asked by one router of all: who has this request (its id, UTF-8) cancels it and answers `cancelled`."""

WORKERS = f"{ROOT}.worker.*.inbox"
"""The orders to all workers, for who only listens."""


def worker(worker_id: WorkerId) -> str:
    """Orders to one worker, from the scheduler or the coordinator."""
    return f"{ROOT}.worker.{worker_id}.inbox"


def router(router_id: RouterId) -> str:
    """Tokens from workers and verdicts from the scheduler, to the router that owns the request."""
    return f"{ROOT}.router.{router_id}.inbox"
