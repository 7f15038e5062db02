"""A group of two loses a member in each of its states: nothing is lost, nothing stays held. (The state machine comes
to these too, but not in every run of some hundred examples.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.policy.cluster import SchedulerConfig
from common.policy.lifecycle import RequestState
from tests.policy.fake_world import World


def forming(world: World) -> None:
    world.deliver("r")


def running(world: World) -> None:
    world.deliver_all()


def pausing(world: World) -> None:
    running(world)
    world.submit("s", 100, 16)
    world.deliver("r")


def paused(world: World) -> None:
    pausing(world)
    world.deliver_all()


def resuming(world: World) -> None:
    paused(world)
    world.progress(("s", 0))
    for sender in [s for s in world.senders() if s != "c"]:
        while world.to_scheduler[sender]:
            world.deliver(sender)


def decoding(world: World) -> None:
    running(world)
    world.progress(("L", 0))
    world.deliver_all()


@pytest.mark.parametrize("member", ["p0", "p1"])
@pytest.mark.parametrize("reach", [forming, running, pausing, paused, resuming, decoding])
@pytest.mark.parametrize("told_by", ["c", "worker"])
def test_a_group_loses_a_member(reach: Callable[[World], None], member: str, told_by: str):
    world = World(SchedulerConfig(group_max=2), prefill=2, decode=1)
    world.submit("L", 12_000, 16)
    reach(world)
    long = world.scheduler.cluster.requests["L"]
    assert long.members == ("p0", "p1")
    assert long.state is RequestState[reach.__name__.upper()]
    world.leave(member)
    if told_by == "c":
        while world.to_scheduler["c"]:
            world.deliver("c")
    else:
        world.deliver(member)
    assert world.seen[f"member lost while {reach.__name__}"] == 1
    assert long.state in (RequestState.INTERRUPTED, RequestState.QUEUED)
    world.settle()
    assert {r.ended for r in world.requests.values()} == {"finished"}
    assert world.requests["L"].attempt == 1
    assert not any(worker.held for worker in world.scheduler.cluster.workers())


def test_a_paused_group_keeps_its_kv_on_every_member():
    world = World(SchedulerConfig(group_max=2), prefill=2, decode=1)
    world.submit("L", 12_000, 17)
    paused(world)
    for name in ("p0", "p1"):
        assert world.scheduler.cluster.replicas[name].held["L", 0].tokens == 6_009, "half of 12,017, rounded up"
        assert ("L", 0) in world.workers[name].holds
