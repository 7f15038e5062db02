"""Indexes by load: what makes choosing a worker, or a node for a group of them, O(log n)."""

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


class NodeIndex:
    """Workers by node, nodes by how many workers they have here: where a group of k finds its place.

    Set, discard, best: O(log n).
    """

    def __init__(self) -> None:
        self._at: dict[WorkerId, tuple[str, int]] = {}
        self._workers: dict[str, SortedList] = {}
        self._load: dict[str, int] = {}
        self._nodes: SortedList = SortedList()
        """(workers, their load in all, node)"""

    def set(self, worker_id: WorkerId, node: str, load: int) -> None:
        if self._at.get(worker_id) == (node, load):
            return
        self.discard(worker_id)
        self._take_off(node)
        self._at[worker_id] = (node, load)
        self._workers.setdefault(node, SortedList()).add((load, worker_id))
        self._load[node] = self._load.get(node, 0) + load
        self._put_on(node)

    def discard(self, worker_id: WorkerId) -> None:
        at = self._at.pop(worker_id, None)
        if at is None:
            return
        node, load = at
        self._take_off(node)
        self._workers[node].remove((load, worker_id))
        self._load[node] -= load
        self._put_on(node)

    def _take_off(self, node: str) -> None:
        workers = self._workers.get(node)
        if workers:
            self._nodes.remove((len(workers), self._load[node], node))

    def _put_on(self, node: str) -> None:
        workers = self._workers[node]
        if workers:
            self._nodes.add((len(workers), self._load[node], node))
        else:
            del self._workers[node], self._load[node]

    def best(self, count: int) -> str | None:
        """The node that has `count` workers and the fewest more; among equals, the least load."""
        place = self._nodes.bisect_left((count,))
        return self._nodes[place][2] if place < len(self._nodes) else None

    def largest(self, count: int = CANDIDATES_MAX) -> list[tuple[int, str]]:
        """The `count` nodes with the most workers: (workers, node)."""
        return [(size, node) for size, _, node in islice(reversed(self._nodes), count)]

    def least(self, node: str, count: int) -> list[WorkerId]:
        """The `count` least loaded workers of the node."""
        return [worker_id for _, worker_id in islice(self._workers.get(node, ()), count)]

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._at
