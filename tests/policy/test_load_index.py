"""The indexes of loads and of nodes and the queue of requests, against the plainest things that could do the same."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from common.messages.requests import Prompt, RequestSpec
from common.policy.cluster import Request
from common.policy.load_index import STALE_MAX, LoadIndex, NodeIndex
from common.policy.queues import RequestQueue
from common.units import RequestId, RouterId, WorkerId

WORKERS = [WorkerId(f"w{number:02d}") for number in range(40)]


@pytest.mark.parametrize("seed", range(20))
def test_the_least_loaded_come_first_whatever_happened_before(seed: int) -> None:
    rng = random.Random(seed)
    index, plain = LoadIndex[WorkerId](), dict[WorkerId, int]()
    workers = WORKERS[: rng.randint(1, len(WORKERS))]
    for _ in range(1_500):
        worker_id = rng.choice(workers)
        if rng.random() < 0.15:
            index.discard(worker_id)
            plain.pop(worker_id, None)
        elif rng.random() < 0.1:
            several = {w: rng.choice((0, 1, 300)) for w in rng.sample(workers, rng.randint(0, len(workers)))}
            plain |= several
            index.set_all([(load, w) for w, load in several.items()])
        else:
            plain[worker_id] = rng.choice((0, 0, 1, 2, 300, rng.randrange(1_000)))
            index.set(worker_id, plain[worker_id])
        count = rng.choice((0, 1, 3, 8, 100))
        expected = [w for _, w in sorted((load, w) for w, load in plain.items())][:count]
        assert list(index.least(count)) == expected
        assert index.lightest() == min(((load, w) for w, load in plain.items()), default=None)
        assert len(index) == len(plain)
        assert sorted(index.ids()) == sorted(plain)


def test_loads_that_go_to_and_fro_take_no_more_room() -> None:
    index = LoadIndex[WorkerId]()
    for turn in range(10_000):
        index.set(WORKERS[turn % 7], turn % 3)
    assert len(index._heap) <= 2 * 7 + STALE_MAX
    assert len(list(index.least(100))) == 7


@pytest.mark.parametrize("seed", range(20))
def test_nodes_are_known_by_how_many_workers_they_have(seed: int) -> None:
    rng = random.Random(seed)
    index, here = NodeIndex(), dict[WorkerId, str]()
    node_of = {worker_id: f"n{number % 7}" for number, worker_id in enumerate(WORKERS)}
    for _ in range(600):
        count = rng.choice((1, 1, 2, 9))
        coming = rng.random() < 0.5
        some = [worker_id for worker_id in WORKERS if (worker_id in here) != coming]
        which = rng.sample(some, min(count, len(some)))
        if len(which) == 1:
            (index.add if coming else index.discard)(which[0], node_of[which[0]])
        else:
            (index.add_all if coming else index.discard_all)([(node_of[w], w) for w in which])
        if coming:
            here |= {worker_id: node_of[worker_id] for worker_id in which}
        else:
            here = {worker_id: node for worker_id, node in here.items() if worker_id not in which}
        sizes = Counter(here.values())
        assert len(index) == len(here)
        assert [size for size, _ in index.largest(99)] == sorted(sizes.values(), reverse=True)
        assert {node: size for size, node in index.largest(99)} == sizes
        for node in sizes:
            assert set(index.of(node, 99)) == {worker_id for worker_id, its in here.items() if its == node}
            assert len(index.of(node, 2)) == min(2, sizes[node])
        for wanted in (1, 3, 6):
            fewest = min((size for size in sizes.values() if size >= wanted), default=None)
            best = index.best(wanted)
            assert fewest == (None if best is None else sizes[best])


def request(number: int, arrived_s: float) -> Request:
    spec = RequestSpec(
        request_id=RequestId(f"r{number}"),
        router_id=RouterId("r"),
        prompt=Prompt(tokens=1 + number % 5, key="p"),
        max_tokens=1,
    )
    return Request(spec=spec, length_class="short", order=number, arrived_s=arrived_s)


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_is_in_its_order_whoever_leaves(seed: int) -> None:
    rng = random.Random(seed)
    queue, plain = RequestQueue(lambda r: r.arrived_s), list[Request]()
    for number in range(400):
        if plain and rng.random() < 0.45:
            leaving = rng.choice(plain[:3]) if rng.random() < 0.7 else rng.choice(plain)
            plain.remove(leaving)
            queue.discard(leaving)
            queue.discard(leaving)
        else:
            coming = request(number, float(rng.randrange(6)))
            plain.append(coming)
            queue.push(coming)
        plain.sort(key=lambda r: (r.arrived_s, r.order))
        assert queue.head is (plain[0] if plain else None)
        assert list(queue.first(4)) == plain[:4]
        assert len(queue) == len(plain)
        assert queue.tokens == sum(r.tokens for r in plain)
        assert all(r in queue for r in plain)
