"""What HTTP and NATS ask of the router. `service.Router` is one; the two doors know only this."""

from __future__ import annotations

import secrets
from collections.abc import Coroutine
from typing import Any, Protocol

from common.messages.views import ClusterView, StoryTold
from common.metrics import Metrics
from common.settings import RouterSettings
from common.units import RequestId
from services.router.activity_feed import ActivityFeed
from services.router.model_text import ModelText
from services.router.tickets import Ticket
from services.router.validate import Plan


class Door(Protocol):
    settings: RouterSettings
    text: ModelText
    activity: ActivityFeed

    @property
    def leaving(self) -> bool:
        """It is to stop: connections should not be kept for another request."""
        ...

    metrics: Metrics

    async def open(
        self, plan: Plan, *, request_id: RequestId, reply_inbox: str | None = None, traceparent: str = ""
    ) -> Ticket:
        """Tokenize, check lengths, and submit. Raises: ApiError (400, 409, 429, 503)."""
        ...

    async def close(self, ticket: Ticket) -> None:
        """The client has all it wanted, or is gone: what still runs is cancelled."""
        ...

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request of this router, or of any other. False: unknown. Raises: ApiError 503."""
        ...

    async def cluster(self) -> ClusterView:
        """Raises: ApiError 503, if no scheduler answers."""
        ...

    async def story(self, request_id: str) -> StoryTold:
        """Raises: ApiError 503, if no scheduler answers."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a handler's work under the router's supervision; it must handle its own errors."""
        ...


def new_request_id() -> RequestId:
    """For a request whose client names none."""
    return RequestId(f"req-{secrets.token_hex(12)}")
