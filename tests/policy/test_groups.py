"""A group of two loses a member in each of its states, and a small load any one of its orders or messages: everything
ends, nothing stays held. (The state machine comes to these too, but not in every run of some hundred examples.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.policy.ledger import POLICIES
from common.policy.lifecycle import RequestState
from common.policy.scheduler_config import SchedulerConfig
from common.policy.scheduler_io import ForgetRequest, SaveRequest, SchedulerCommand
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
    world = World(SchedulerConfig(group_max=2, group_gathers=False), prefill=2, decode=1)
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


def mixed_load(config: SchedulerConfig, lost_order: int | None, lost_message: int | None) -> tuple[int, int]:
    """A group that is paused and resumed, and shorts, one of them cancelled; one order, or one message to the
    scheduler, vanishes. Returns how many there were of each until everything had settled."""
    world = CountingWorld(config, lost_order, lost_message)
    world.submit("L", 12_000, 16)
    world.deliver_all()
    for number in range(4):
        world.submit(f"s{number}", 100, 16)
        world.deliver_all()
    world.cancel("s3")
    for key in world.work():
        world.progress(key)
        world.deliver_all()
    world.settle()
    assert {world.requests[name].ended for name in ("L", "s0", "s1", "s2")} == {"finished"}
    assert not any(worker.held for worker in world.scheduler.cluster.workers())
    return world.orders, world.messages


class CountingWorld(World):
    def __init__(self, config: SchedulerConfig, lost_order: int | None, lost_message: int | None) -> None:
        self.orders = self.messages = -1
        self._lost = (lost_order, lost_message)
        super().__init__(config, prefill=2, decode=1)

    def _is_lost_on_the_way(self, command: SchedulerCommand) -> bool:
        if isinstance(command, SaveRequest | ForgetRequest):
            return False
        self.orders += 1
        return self.orders == self._lost[0]

    def deliver(self, sender: str) -> None:
        self.messages += 1
        if self.messages == self._lost[1]:
            self.lose_next(sender)
        else:
            super().deliver(sender)


@pytest.mark.parametrize("policy", POLICIES)
def test_any_one_order_or_message_may_be_lost(policy: str):
    config = SchedulerConfig(policy=policy, group_max=2)
    orders, messages = mixed_load(config, None, None)
    assert orders >= 15
    for number in range(orders):
        mixed_load(config, number, None)
    for number in range(messages):
        mixed_load(config, None, number)


def test_a_paused_group_keeps_its_kv_on_every_member():
    for gathers in (False, True):
        world = World(SchedulerConfig(group_max=2, group_gathers=gathers), prefill=2, decode=1)
        world.submit("L", 12_000, 17)
        paused(world)
        held = [world.scheduler.cluster.replicas[name].held["L", 0].tokens for name in ("p0", "p1")]
        assert held == [12_017 if gathers else 6_009, 6_009], "half of 12,017, rounded up; the first may gather it"
        assert all(("L", 0) in world.workers[name].holds for name in ("p0", "p1"))
