"""Indexes by load: what makes choosing a worker, or a node for a group of them, O(log n)."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Generic, TypeVar

from common.units import WorkerId

KeyT = TypeVar("KeyT", bound=str)

CANDIDATES_MAX = 8
"""How many of the least loaded are looked at before giving up: when these have no room for a
request, the cluster is as good as full, and a decision stays O(log n)."""


STALE_MAX = 32
"""Entries beside one per worker that a small index may keep before it is cleared of stale ones."""


class LoadIndex(Generic[KeyT]):
    """Ids (of workers, of groups) ordered by load, then by id. Insert, move, discard and first: O(log n), amortized.

    A heap in which former loads stay until they come up: loads change at every event, and hardly more than the
    lightest worker is ever asked for.
    """

    def __init__(self) -> None:
        self._load: dict[KeyT, int] = {}
        self._heap: list[tuple[int, KeyT]] = []
        """An entry is stale unless it says the load. One may stand there twice."""

    def set(self, key: KeyT, load: int) -> None:
        if self._load.get(key) == load:
            return
        self._load[key] = load
        heap = self._heap
        heappush(heap, (load, key))
        if len(heap) > 2 * len(self._load) + STALE_MAX:
            heap[:] = [(load, key) for key, load in self._load.items()]
            heapify(heap)

    def set_all(self, entries: list[tuple[int, KeyT]]) -> None:
        """Several at once, as (load, id)."""
        loads, heap = self._load, self._heap
        if len(entries) < len(heap):
            for load, key in entries:
                self.set(key, load)
            return
        for load, key in entries:
            loads[key] = load
        heap += entries
        heapify(heap)

    def discard(self, key: KeyT) -> None:
        self._load.pop(key, None)

    def load_of(self, key: KeyT) -> int | None:
        """None: it is not here."""
        return self._load.get(key)

    def lightest(self) -> tuple[int, KeyT] | None:
        """The first, with its load."""
        heap, loads = self._heap, self._load
        while heap:
            first = heap[0]
            if loads.get(first[1]) == first[0]:
                return first
            heappop(heap)
        return None

    def least(self, count: int = CANDIDATES_MAX) -> Iterator[KeyT]:
        """The `count` least loaded, lightest first. Nothing may change meanwhile."""
        last = self.lightest()
        if last is None or count < 1:
            return
        yield last[1]
        # Hardly anybody asks on. The heap is walked as it stands, from its root: a parent comes before its children.
        heap, loads = self._heap, self._load
        walk, place = list[tuple[tuple[int, KeyT], int]](), 0
        while count > 1:
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(walk, (heap[child], child))
            if not walk:
                return
            entry, place = heappop(walk)
            if entry != last and loads.get(entry[1]) == entry[0]:
                last = entry
                count -= 1
                yield entry[1]

    def ids(self) -> Iterator[KeyT]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._load


class NodeIndex:
    """Workers by node, nodes by how many workers they have here: where a group of k finds its place.

    Add, discard: O(1). Best, largest: O(workers per node), whatever the number of nodes. Who is here is the caller's to
    know: nobody is added twice, nobody discarded who is not here.
    """

    def __init__(self) -> None:
        self._workers: dict[str, dict[WorkerId, None]] = {}
        self._of_size: list[dict[str, None]] = [{}]
        """Nodes by the number of their workers. (Dictionaries for their order: the same events, the same groups.)"""
        self._count = 0

    def add(self, worker_id: WorkerId, node: str) -> None:
        self._add_to(node, [worker_id])

    def add_all(self, coming: list[tuple[str, WorkerId]]) -> None:
        """As (node, worker). A node that gets many changes its place among the nodes once."""
        for node, workers in _by_node(coming).items():
            self._add_to(node, workers)

    def _add_to(self, node: str, coming: list[WorkerId]) -> None:
        workers = self._workers.get(node)
        if workers is None:
            workers = self._workers[node] = {}
        else:
            del self._of_size[len(workers)][node]
        for worker_id in coming:
            workers[worker_id] = None
        while len(self._of_size) <= len(workers):
            self._of_size.append({})
        self._of_size[len(workers)][node] = None
        self._count += len(coming)

    def discard(self, worker_id: WorkerId, node: str) -> None:
        self._take_from(node, [worker_id])

    def discard_all(self, leaving: list[tuple[str, WorkerId]]) -> None:
        """As (node, worker). A node that loses many changes its place among the nodes once."""
        for node, workers in _by_node(leaving).items():
            self._take_from(node, workers)

    def _take_from(self, node: str, leaving: list[WorkerId]) -> None:
        workers = self._workers[node]
        del self._of_size[len(workers)][node]
        if len(leaving) == len(workers):
            del self._workers[node]
        else:
            for worker_id in leaving:
                del workers[worker_id]
            self._of_size[len(workers)][node] = None
        self._count -= len(leaving)

    def best(self, count: int) -> str | None:
        """The node that has `count` workers and the fewest more."""
        for nodes in self._of_size[count:]:
            for node in nodes:
                return node
        return None

    def largest(self, count: int = CANDIDATES_MAX) -> list[tuple[int, str]]:
        """The `count` nodes with the most workers: (workers, node)."""
        found: list[tuple[int, str]] = []
        for size in range(len(self._of_size) - 1, 0, -1):
            for node in self._of_size[size]:
                if len(found) >= count:
                    return found
                found.append((size, node))
        return found

    def of(self, node: str, count: int) -> list[WorkerId]:
        """At most `count` workers of the node."""
        workers = self._workers.get(node)
        if workers is None:
            return []
        return list(workers) if count >= len(workers) else list(islice(workers, count))

    def __len__(self) -> int:
        return self._count


def _by_node(pairs: list[tuple[str, WorkerId]]) -> dict[str, list[WorkerId]]:
    found: dict[str, list[WorkerId]] = {}
    for node, worker_id in pairs:
        workers = found.get(node)
        if workers is None:
            found[node] = [worker_id]
        else:
            workers.append(worker_id)
    return found
