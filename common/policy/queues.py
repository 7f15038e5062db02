"""The cluster-wide queue. Its length is counted in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from sortedcontainers import SortedDict

from common.policy.cluster import Request
from common.units import RequestId

Rank = Callable[[Request], float]
"""The lowest comes first. It must not change while the request waits."""


def by_arrival(request: Request) -> float:
    """First come, first served: a request that comes back after an interruption keeps its place."""
    return request.order


class RequestQueue:
    """Ordered by `rank`, among equals by arrival. Push, pop, remove: O(log n)."""

    def __init__(self, rank: Rank = by_arrival) -> None:
        self._rank = rank
        self._by_rank: SortedDict = SortedDict()
        self._rank_of: dict[RequestId, tuple[float, int]] = {}
        self._head: Request | None = None
        self.tokens = 0

    def push(self, request: Request) -> None:
        place = (self._rank(request), request.order)
        if self._head is None or place < self._rank_of[self._head.request_id]:
            self._head = request
        self._by_rank[place] = request
        self._rank_of[request.request_id] = place
        self.tokens += request.tokens

    def head(self) -> Request | None:
        """The first; O(1), for it is asked at every event."""
        return self._head

    def discard(self, request: Request) -> None:
        place = self._rank_of.pop(request.request_id, None)
        if place is not None:
            del self._by_rank[place]
            self.tokens -= request.tokens
            if self._head is not None and self._head.request_id == request.request_id:
                self._head = self._by_rank.peekitem(0)[1] if self._by_rank else None

    def first(self, count: int) -> Iterator[Request]:
        return islice(self._by_rank.values(), count)

    def __len__(self) -> int:
        return len(self._by_rank)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._rank_of
