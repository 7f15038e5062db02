"""A set of replicas by load and by node: the least loaded one, and the place of a group.

A group stands on replicas of one node rather than of several, and among equal choices on those with the
smallest total queue (the paper's rule for longs). Looking through every node would make a decision
linear in the cluster; here a bounded number of nodes is looked at: as many of the largest, lightest
first, as the group needs and `CANDIDATES_MAX` more, and those where the least loaded replicas stand. In
a cluster of up to `CANDIDATES_MAX` nodes these are all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from sortedcontainers import SortedDict, SortedList

from common.policy.cluster import Replica
from common.policy.load_index import CANDIDATES_MAX
from common.policy.long_planner import up_to
from common.units import WorkerId

Entry = tuple[int, bool, WorkerId]
"""Load in tokens; whether a long decodes there, which comes after one where none does; id."""

Offer = tuple[int, list[Entry]]
"""Of a node: how many replicas of the pool it has; those that fit, least loaded first, at most a group's worth."""

Fits = Callable[[WorkerId], bool]


@dataclass(frozen=True, slots=True)
class Spread:
    """How a long may be spread over a pool."""

    degree: int
    """0: the pool is too small for its KV."""
    kv_capacity: int = 0
    """Each member can hold this many tokens of KV."""

    def within(self, degree_max: int) -> Spread:
        """The same over no more than so many."""
        return Spread(min(self.degree, degree_max), self.kv_capacity)


class ReplicaPool:
    """Set, discard, least: O(log n). Group of k: O(k log n)."""

    def __init__(self) -> None:
        self._at: dict[WorkerId, tuple[Entry, str, int]] = {}
        """Entry, node, KV capacity."""
        self._entries: SortedList = SortedList()
        self._by_node: dict[str, SortedList] = {}
        self._total: dict[str, int] = {}
        """Sum of the loads of a node."""
        self._nodes: SortedList = SortedList()
        """(-replicas, their total load, node): the largest first, of these the lightest."""
        self._capacities: SortedDict = SortedDict()
        """KV capacity: how many have it. One kind of processor, one capacity."""

    # --- changes ---------------------------------------------------------------------------------

    def set(self, replica: Replica, load: int) -> None:
        """Put it in, or move it to its new load."""
        worker_id, node = replica.worker_id, replica.node
        entry: Entry = (load, bool(replica.decoding), worker_id)
        known = self._at.get(worker_id)
        if known is None:
            capacity = replica.profile.kv_capacity_tokens
            self._capacities[capacity] = self._capacities.get(capacity, 0) + 1
            self._at[worker_id] = (entry, node, capacity)
            self._take_off(node)
            self._by_node.setdefault(node, SortedList())
            self._total.setdefault(node, 0)
        elif known[0] == entry:
            return
        else:
            self._at[worker_id] = (entry, node, known[2])
            self._take_off(node)
            self._drop_entry(known[0], node)
        self._entries.add(entry)
        self._by_node[node].add(entry)
        self._total[node] += load
        self._put_on(node)

    def discard(self, worker_id: WorkerId) -> None:
        known = self._at.pop(worker_id, None)
        if known is None:
            return
        entry, node, capacity = known
        self._take_off(node)
        self._drop_entry(entry, node)
        self._put_on(node)
        self._capacities[capacity] -= 1
        if not self._capacities[capacity]:
            del self._capacities[capacity]

    def _drop_entry(self, entry: Entry, node: str) -> None:
        self._entries.remove(entry)
        self._by_node[node].remove(entry)
        self._total[node] -= entry[0]

    def _take_off(self, node: str) -> None:
        if node in self._by_node:
            self._nodes.remove((-len(self._by_node[node]), self._total[node], node))

    def _put_on(self, node: str) -> None:
        if self._by_node[node]:
            self._nodes.add((-len(self._by_node[node]), self._total[node], node))
        else:
            del self._by_node[node], self._total[node]

    # --- questions -------------------------------------------------------------------------------

    def least(self, fits: Fits) -> WorkerId | None:
        """The least loaded one that fits. In a cluster of equals the first does, or none."""
        return next((worker_id for _, _, worker_id in self._entries if fits(worker_id)), None)

    def load(self, worker_id: WorkerId) -> int:
        """Raises: KeyError."""
        return self._at[worker_id][0][0]

    def spread(self, degree: Callable[[Sequence[int], int], int], group_max: int) -> Spread:
        """Ask `degree(replicas per node, largest first; KV capacity of each)`, with at most `group_max` replicas in
        all. Where capacities differ: with all replicas by the smallest one, then with the larger ones alone."""
        for capacity in self._capacities:
            answer = degree(up_to(self._node_sizes(capacity), group_max), capacity)
            if answer > 0:
                return Spread(answer, capacity)
        return Spread(0)

    def _node_sizes(self, capacity: int) -> Iterable[int]:
        if self._is_least(capacity):
            return (-size for size, _, _ in self._nodes)
        counts: dict[str, int] = {}
        for _, node, its_capacity in self._at.values():
            if its_capacity >= capacity:
                counts[node] = counts.get(node, 0) + 1
        return sorted(counts.values(), reverse=True)

    def _is_least(self, capacity: int) -> bool:
        return not self._capacities or capacity <= self._capacities.peekitem(0)[0]

    def group(self, spread: Spread, fits: Fits | None = None) -> tuple[WorkerId, ...]:
        """Members of a group in rank order, node by node, largest part first; (): no place for it."""
        if spread.degree <= 0:
            return ()
        every = self._is_least(spread.kv_capacity)

        def may(entry: Entry) -> bool:
            return (every or self._at[entry[2]][2] >= spread.kv_capacity) and (fits is None or fits(entry[2]))

        nodes = self._candidates(spread.degree) if every else list(self._by_node)
        offers = [
            (len(self._by_node[node]), list(islice(filter(may, self._by_node[node]), spread.degree))) for node in nodes
        ]
        return _choose([offer for offer in offers if offer[1]], spread.degree)

    def _candidates(self, degree: int) -> list[str]:
        nodes: dict[str, None] = {}
        wanted, more = degree, CANDIDATES_MAX
        for size, _, node in self._nodes:
            if wanted <= 0:
                more -= 1
            if more < 0:
                break
            nodes[node] = None
            wanted += size
        for _, _, worker_id in islice(self._entries, CANDIDATES_MAX):
            nodes[self._at[worker_id][1]] = None
        return list(nodes)

    def ids(self) -> Iterable[WorkerId]:
        return self._at.keys()

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._at


def _choose(offers: list[Offer], degree: int) -> tuple[WorkerId, ...]:
    members: list[WorkerId] = []
    while offers:
        left = degree - len(members)
        whole = [(size, found[:left]) for size, found in offers if len(found) >= left]
        if whole:
            return (*members, *_ids(min(whole, key=_queue)))
        part = min(offers, key=lambda offer: (-len(offer[1]), *_queue(offer)))
        offers.remove(part)
        members += _ids(part)
    return ()


def _queue(offer: Offer) -> tuple[int, int, int, WorkerId]:
    """Total load; replicas where a long decodes; the smaller node, so that larger ones stay whole; a name to break
    ties by."""
    size, found = offer
    return sum(load for load, _, _ in found), sum(shared for _, shared, _ in found), size, found[0][2]


def _ids(offer: Offer) -> list[WorkerId]:
    return sorted(worker_id for _, _, worker_id in offer[1])
