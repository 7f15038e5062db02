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

    Add, discard: O(1). Best, largest: O(workers per node), whatever the number of nodes.
    """

    def __init__(self) -> None:
        self._node_of: dict[WorkerId, str] = {}
        self._workers: dict[str, dict[WorkerId, None]] = {}
        self._of_size: list[dict[str, None]] = [{}]
        """Nodes by the number of their workers. (Dictionaries for their order: the same events, the same groups.)"""

    def add(self, worker_id: WorkerId, node: str) -> bool:
        """Whether it was not here yet."""
        if worker_id in self._node_of:
            return False
        self._node_of[worker_id] = node
        workers = self._workers.setdefault(node, {})
        self._of_size[len(workers)].pop(node, None)
        workers[worker_id] = None
        if len(self._of_size) == len(workers):
            self._of_size.append({})
        self._of_size[len(workers)][node] = None
        return True

    def discard(self, worker_id: WorkerId) -> bool:
        """Whether it was here."""
        node = self._node_of.pop(worker_id, None)
        if node is None:
            return False
        workers = self._workers[node]
        del self._of_size[len(workers)][node]
        del workers[worker_id]
        if workers:
            self._of_size[len(workers)][node] = None
        else:
            del self._workers[node]
        return True

    def best(self, count: int) -> str | None:
        """The node that has `count` workers and the fewest more."""
        for nodes in self._of_size[count:]:
            for node in nodes:
                return node
        return None

    def largest(self, count: int = CANDIDATES_MAX) -> list[tuple[int, str]]:
        """The `count` nodes with the most workers: (workers, node)."""
        sizes = range(len(self._of_size) - 1, 0, -1)
        return list(islice(((size, node) for size in sizes for node in self._of_size[size]), count))

    def of(self, node: str, count: int) -> list[WorkerId]:
        """At most `count` workers of the node."""
        return list(islice(self._workers.get(node, ()), count))

    def __len__(self) -> int:
        return len(self._node_of)

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._node_of
