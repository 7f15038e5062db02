"""The cluster-wide queue. Its length is counted in tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

from sortedcontainers import SortedDict

from common.policy.cluster import Request
from common.units import RequestId

Rank = Callable[[Request], float]
"""The lowest comes first. It must not change while the request waits."""


def by_arrival(request: Request) -> float:
    """First come, first served: a request that comes back after an interruption keeps its place."""
    return request.order


class RequestQueue:
    """Ordered by `rank`, among equals by arrival. Push, pop, remove: O(log n).

    The head stands apart from the others: most shorts find a place in the very event that brings them, and
    never get into any order.
    """

    def __init__(self, rank: Rank = by_arrival) -> None:
        self._rank = rank
        self._behind: SortedDict = SortedDict()
        """All but the head."""
        self._rank_of: dict[RequestId, tuple[float, int]] = {}
        self.head: Request | None = None
        """The first: an attribute, for it is asked at every event. Set here alone."""
        self.tokens = 0

    def push(self, request: Request) -> None:
        place, head = (self._rank(request), request.order), self.head
        self._rank_of[request.request_id] = place
        self.tokens += request.tokens
        if head is None:
            self.head = request
            return
        head_place = self._rank_of[head.request_id]
        if place < head_place:
            self.head, request, place = request, head, head_place
        self._behind[place] = request

    def discard(self, request: Request) -> None:
        place = self._rank_of.pop(request.request_id, None)
        if place is None:
            return
        self.tokens -= request.tokens
        if self.head is not None and self.head.request_id == request.request_id:
            self.head = self._behind.popitem(0)[1] if self._behind else None
        else:
            del self._behind[place]

    def first(self, count: int) -> Iterator[Request]:
        return islice(chain(() if self.head is None else (self.head,), self._behind.values()), count)

    def __len__(self) -> int:
        return len(self._rank_of)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._rank_of
