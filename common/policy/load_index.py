"""An index by load: what makes choosing a worker O(log n)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from sortedcontainers import SortedList

from common.units import WorkerId

CANDIDATES_MAX = 8
"""How many of the least loaded are looked at before giving up: when these have no room for a
request, the cluster is as good as full, and a decision stays O(log n)."""


class LoadIndex:
    """Worker ids ordered by load, then by id. Insert, move, discard and first: O(log n)."""

    def __init__(self) -> None:
        self._load: dict[WorkerId, int] = {}
        self._order: SortedList = SortedList()

    def set(self, worker_id: WorkerId, load: int) -> None:
        known = self._load.get(worker_id)
        if known == load:
            return
        if known is not None:
            self._order.remove((known, worker_id))
        self._load[worker_id] = load
        self._order.add((load, worker_id))

    def discard(self, worker_id: WorkerId) -> None:
        load = self._load.pop(worker_id, None)
        if load is not None:
            self._order.remove((load, worker_id))

    def least(self, count: int = CANDIDATES_MAX) -> Iterator[WorkerId]:
        """The `count` least loaded, lightest first."""
        for _, worker_id in islice(self._order, count):
            yield worker_id

    def ids(self) -> Iterator[WorkerId]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._load
