"""The pool against a plain search through all replicas."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.cluster import Replica
from common.policy.replica_pool import ReplicaPool, Spread
from tests.policy.scenario import profile

NODES = 5
SIZE = 4


def replica(number: int, *, kv: int = 1_000, decodes: bool = False) -> Replica:
    made = Replica(profile=profile(f"p{number:04}", kv=kv, node=f"n{number // SIZE:03}"), heard_s=0.0)
    if decodes:
        made.decoding.add("long")
    return made


def pool_of(loads: dict[int, int], decoding: frozenset[int] = frozenset()) -> tuple[ReplicaPool, dict[str, Replica]]:
    pool, replicas = ReplicaPool(), {}
    for number, load in loads.items():
        one = replica(number, decodes=number in decoding)
        replicas[one.worker_id] = one
        pool.set(one, load)
    return pool, replicas


numbers = st.integers(0, NODES * SIZE - 1)
loads_of_replicas = st.dictionaries(numbers, st.integers(0, 3))
changes = st.lists(st.tuples(numbers, st.one_of(st.none(), st.integers(0, 5)), st.booleans()), max_size=60)


@settings(max_examples=100, deadline=None)
@given(changes)
def test_after_any_changes_it_knows_what_was_last_said(history: list[tuple[int, int | None, bool]]) -> None:
    pool, known = ReplicaPool(), {}
    for number, load, decodes in history:
        one = replica(number, decodes=decodes)
        if load is None:
            pool.discard(one.worker_id)
            known.pop(one.worker_id, None)
        else:
            pool.set(one, load)
            known[one.worker_id] = (load, decodes, one.profile.node)
    assert set(pool.ids()) == set(known)
    assert len(pool) == len(known)
    assert all(pool.load(worker_id) == load for worker_id, (load, _, _) in known.items())
    expected = min(((load, decodes, worker_id) for worker_id, (load, decodes, _) in known.items()), default=None)
    assert pool.least(lambda _: True) == (expected[2] if expected else None)
    sizes: dict[str, int] = {}
    for _, _, node in known.values():
        sizes[node] = sizes.get(node, 0) + 1
    asked = []
    pool.spread(lambda by_node, kv: asked.append((list(by_node), kv)) or 0, 1_000)
    assert asked == ([(sorted(sizes.values(), reverse=True), 1_000)] if known else [])


@settings(max_examples=200, deadline=None)
@given(loads_of_replicas, st.frozensets(numbers), st.integers(1, 12), st.frozensets(numbers))
def test_a_group_takes_the_fewest_nodes_and_of_these_the_lightest(
    loads: dict[int, int], decoding: frozenset[int], degree: int, unfit: frozenset[int]
) -> None:
    pool, replicas = pool_of(loads, decoding)
    fit = {f"p{n:04}": load for n, load in loads.items() if n not in unfit}
    by_node: dict[str, list[int]] = {}
    for worker_id, load in fit.items():
        by_node.setdefault(replicas[worker_id].profile.node, []).append(load)
    members = pool.group(Spread(degree, 1_000), lambda worker_id: worker_id in fit)
    if len(fit) < degree:
        assert members == ()
        return
    assert len(set(members)) == len(members) == degree
    assert set(members) <= set(fit)
    nodes = [replicas[worker_id].profile.node for worker_id in members]
    parts = [nodes.count(node) for node in dict.fromkeys(nodes)]
    assert nodes == [node for node in dict.fromkeys(nodes) for _ in range(nodes.count(node))], "node by node"
    assert parts == sorted(parts, reverse=True), "largest part first"
    room = list(accumulate(sorted(map(len, by_node.values()), reverse=True)))
    assert len(parts) == next(i for i, total in enumerate(room, 1) if total >= degree), "as few nodes as can be"
    if len(parts) == 1:
        lightest = min(sum(sorted(loads)[:degree]) for loads in by_node.values() if len(loads) >= degree)
        assert sum(fit[worker_id] for worker_id in members) == lightest


def test_of_equal_replicas_one_where_no_long_decodes_is_taken() -> None:
    pool, _ = pool_of({0: 5, 1: 5, 2: 5}, frozenset({0, 2}))
    assert pool.least(lambda _: True) == "p0001"


def test_a_group_that_fits_a_smaller_node_leaves_the_larger_one_whole() -> None:
    pool, _ = pool_of({0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0})
    assert pool.group(Spread(2)) == ("p0004", "p0005")


def test_where_capacities_differ_all_are_asked_for_before_the_larger_alone() -> None:
    pool = ReplicaPool()
    for number, kv in enumerate([100, 100, 300, 300, 300]):
        pool.set(replica(number, kv=kv), 0)
    asked = []

    def degree(sizes, kv_free):
        asked.append((list(sizes), kv_free))
        return 2 if kv_free * 2 >= 500 else 0

    spread = pool.spread(degree, group_max=4)
    assert asked == [([4], 100), ([2, 1], 300)]
    assert (spread.degree, spread.kv_capacity) == (2, 300)
    assert pool.group(spread) == ("p0002", "p0003"), "only those that can hold it"


def test_no_more_replicas_are_offered_than_a_group_may_have() -> None:
    pool, _ = pool_of(dict.fromkeys(range(12), 0))
    asked = []
    pool.spread(lambda sizes, _: asked.append(list(sizes)) or 0, group_max=6)
    assert asked == [[4, 2]]


def test_among_many_nodes_one_with_enough_idle_replicas_is_found() -> None:
    """Its total is the largest of all: by the totals of nodes alone it would not be looked at."""
    loads = dict.fromkeys(range(50 * SIZE), 10)
    loads |= {37 * SIZE: 0, 37 * SIZE + 1: 0, 37 * SIZE + 2: 1_000, 37 * SIZE + 3: 1_000}
    pool, _ = pool_of(loads)
    assert pool.group(Spread(2, 1_000)) == ("p0148", "p0149")
