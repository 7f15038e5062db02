"""The cluster-wide queue. Its length is counted in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from sortedcontainers import SortedDict

from common.policy.cluster import Request


class RequestQueue:
    """First come, first served by `Request.order`: a request that comes back after an interruption keeps its
    place. Push, pop, remove: O(log n)."""

    def __init__(self) -> None:
        self._by_order: SortedDict = SortedDict()
        self.tokens = 0

    def push(self, request: Request) -> None:
        self._by_order[request.order] = request
        self.tokens += request.tokens

    def head(self) -> Request | None:
        if not self._by_order:
            return None
        request: Request = self._by_order.peekitem(0)[1]
        return request

    def discard(self, request: Request) -> None:
        if self._by_order.pop(request.order, None) is not None:
            self.tokens -= request.tokens

    def first(self, count: int) -> Iterator[Request]:
        return islice(self._by_order.values(), count)

    def __len__(self) -> int:
        return len(self._by_order)

    def __contains__(self, request: Request) -> bool:
        return self._by_order.get(request.order) is request
