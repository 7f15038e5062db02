"""What a decision costs, in function calls (C's included): the same whatever the machine does meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import pytest

from common import compiled
from tests.policy.fake_world import World
from tests.policy.test_baselines import BASELINES, world

T = TypeVar("T")

pytestmark = pytest.mark.skipif(
    compiled.state() == "compiled",
    reason="compiled code's calls cannot be counted: test_compiled.py runs this from source",
)


def calls_of(work: Callable[..., T], *args: object) -> tuple[int, T]:
    count = 0

    def counted(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        result = work(*args)
    finally:
        sys.setprofile(None)
    return count, result


def cost(place: World, sender: str) -> int:
    """Of the dearest of the messages that this sender has under way."""
    dearest = 0
    while queue := place.to_scheduler.get(sender):
        calls, commands = calls_of(place.scheduler.handle, queue.popleft(), 0.0)
        dearest = max(dearest, calls)
        for command in commands:
            place._perform(command)
    return dearest


def costs_of(policy: str, replicas: int) -> dict[str, int]:
    """Calls in the scheduler per event, in a cluster where longs run on a part and shorts wait everywhere else."""
    place = world(policy, replicas, decoders=replicas // 2, reserved_long_tokens=5_000 * replicas, preemption=False)
    place.scheduler.check = lambda: None
    for i in range(replicas // 8):
        place.submit(f"l{i}", 15_000, 16)
    for i in range(2 * replicas):
        place.submit(f"w{i}", 700 + i % 7, 16)
    place.deliver_all()
    requests = place.scheduler.cluster.requests
    costs = {}
    place.submit("short", 100, 16)
    costs["short submitted"] = cost(place, "r")
    place.submit("long", 15_000, 16)
    costs["long submitted"] = cost(place, "r")
    replica, decoder = requests["w3"].workers
    place.progress(("w3", 0))
    costs["prefilled"] = cost(place, replica)
    cost(place, decoder)
    place.progress(("w3", 0))
    costs["decoded"] = cost(place, decoder)
    place.deliver_all()
    long = next(key for key, group in place.groups.items() if group.state == "running")
    place.progress(long)
    costs["long prefilled"] = cost(place, "c")
    place.progress(long)
    costs["long ended"] = cost(place, "c")
    place.cancel(f"w{2 * replicas - 1}")
    costs["cancelled"] = cost(place, "r")
    assert all(costs.values())
    return costs


@pytest.mark.parametrize("policy", ["pecsched", *BASELINES])
def test_the_cost_of_a_decision_does_not_grow_with_the_cluster(policy: str) -> None:
    small, large = costs_of(policy, 16), costs_of(policy, 256)
    for event, calls in large.items():
        assert calls <= 1.7 * small[event], f"{event}: {small[event]} calls with 16 replicas, {calls} with 256"


@pytest.mark.parametrize("policy", ["fifo", "reservation"])
def test_a_row_that_becomes_free_is_not_offered_to_every_line(policy: str) -> None:
    """All replicas wait for the one decode worker."""

    def decoded(replicas: int) -> int:
        place = world(policy, replicas, reserved_long_tokens=1)
        place.scheduler.check = lambda: None
        for i in range(2 * replicas):
            place.submit(f"w{i}", 700, 16)
        place.deliver_all()
        for _ in range(2):
            place.progress(("w0", 0))
            cost_of_last = cost(place, "d0") if place.to_scheduler.get("d0") else 0
        assert place.scheduler._policy.waiting_shorts() > replicas
        return cost_of_last

    small, large = decoded(30), decoded(240)
    assert 0 < large <= 1.5 * small
