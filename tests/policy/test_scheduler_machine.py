"""A state machine over the scheduler: any interleaving of requests, work, cancels, crashes, lost messages and
time. `Scheduler.check()` runs after every event; in the end everything has ended and nothing is held."""

from __future__ import annotations

import sys
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from common.policy.scheduler_config import SchedulerConfig
from tests.policy.fake_world import World


class SchedulerMachine(RuleBasedStateMachine):
    policy = "pecsched"

    seen: ClassVar[Counter[str]] = Counter()
    """What came about in all examples of this policy."""

    @initialize(
        prefill=st.integers(1, 6),
        decode=st.integers(1, 2),
        threshold=st.sampled_from([100, 2_048]),
        group_max=st.sampled_from([4, 1, 2]),
        longs=st.integers(0, 4),
        switches=st.fixed_dictionaries(
            {},
            optional={
                "preemption": st.just(False),
                "colocation": st.just(False),
                "disaggregation": st.just(False),
                "long_order": st.just("arrival"),
                "shorts_spare": st.just(1.5),
                "reserved_long_tokens": st.just(20_000),
                "batch_tokens_max": st.just(300),
                "pause_max_s": st.just(0.5),
                "pause_share_max": st.sampled_from([0.0, 0.2, 1.0]),
                "spill": st.sampled_from(["memory", "disk"]),
                "group_gathers": st.just(False),
            },
        ),
    )
    def start(
        self,
        prefill: int,
        decode: int,
        threshold: int,
        group_max: int,
        longs: int,
        switches: dict[str, object],
    ) -> None:
        """`longs`: so many prefill already."""
        settings = {"threshold_tokens": threshold, "attempts_max": 1_000, "group_max": group_max} | switches
        self._begin(SchedulerConfig(policy=self.policy, **settings), prefill, decode, [12_000] * longs)

    def _begin(self, config: SchedulerConfig, prefill: int, decode: int, longs: list[int]) -> None:
        self.world = World(config, prefill=prefill, decode=decode)
        self.serial = 0
        for tokens in longs:
            self.submit(tokens, 100)
        self.world.deliver_all()

    @rule(
        tokens=st.one_of(st.integers(1, 400), st.integers(3_000, 19_000), st.integers(19_000, 60_000)),
        max_tokens=st.integers(1, 500),
    )
    def submit(self, tokens: int, max_tokens: int) -> None:
        self.serial += 1
        self.world.submit(f"q{self.serial}", tokens, max_tokens)

    @rule(tokens=st.lists(st.integers(1, 400), min_size=2, max_size=8))
    def burst(self, tokens: list[int]) -> None:
        for each in tokens:
            self.submit(each, 16)
        self.world.deliver_all()

    @precondition(lambda self: self.world.senders())
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.world.deliver(data.draw(st.sampled_from(self.world.senders())))

    @rule()
    def deliver_all(self) -> None:
        self.world.deliver_all()

    @precondition(lambda self: self.world.work())
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        self.world.progress(data.draw(st.sampled_from(self.world.work())))

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.requests))))

    @rule(seconds=st.floats(0.001, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule()
    def heartbeats(self) -> None:
        self.world.heartbeats()

    @rule(
        data=st.data(),
        kind=st.sampled_from(
            ["crash", "crash_member", "retire", "leave", "restart", "coordinator", "fail_work", "disk"]
        ),
    )
    def fault(self, data: st.DataObject, kind: str) -> None:
        world = self.world
        if kind == "coordinator":
            data.draw(st.sampled_from([world.restart_coordinator, world.coordinator_leaves]))()
        elif kind == "disk":
            world.disk_full = not world.disk_full
        elif kind == "fail_work":
            if work := world.work():
                world.fail_work(data.draw(st.sampled_from(work)), retryable=data.draw(st.booleans()))
        elif kind == "crash_member":
            if world.groups:
                key = data.draw(st.sampled_from(sorted(world.groups)))
                world.crash(data.draw(st.sampled_from(sorted(world.groups[key].members))))
        else:
            getattr(world, kind)(data.draw(st.sampled_from(sorted(world.workers))))

    @rule(data=st.data(), orders=st.integers(0, 3))
    def lose(self, data: st.DataObject, orders: int) -> None:
        """The next orders of the scheduler, or a message to it."""
        if orders:
            self.world.orders_to_lose = orders
        elif senders := self.world.senders():
            self.world.lose_next(data.draw(st.sampled_from(senders)))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.settle()
        type(self).seen.update(world.seen)
        world.scheduler.check()
        assert {r.ended for r in world.requests.values()} <= {"finished", "cancelled", "failed"}
        assert not world.saved, "no record outlives its request"
        assert all(w.kv_reserved == 0 for w in world.scheduler.cluster.workers())


class SpillMachine(SchedulerMachine):
    """Longs fill every replica: shorts find room where they are moved out, or where they end."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        groups=st.integers(1, 3),
        group_max=st.integers(1, 2),
        decode=st.integers(1, 2),
        more=st.integers(0, 1),
        pause_max_s=st.sampled_from([10.0, 0.5]),
        pause_share_max=st.sampled_from([0.9, 1.0]),
    )
    def start(
        self, groups: int, group_max: int, decode: int, more: int, pause_max_s: float, pause_share_max: float
    ) -> None:
        config = SchedulerConfig(
            group_max=group_max,
            shorts_spare=0.0,
            attempts_max=1_000,
            pause_max_s=pause_max_s,
            pause_share_max=pause_share_max,
        )
        self._begin(config, groups * group_max, decode, [19_650 if group_max == 1 else 39_500] * (groups + more))

    @rule(tokens=st.lists(st.integers(251, 800), min_size=1, max_size=4))
    def shorts_that_need_room(self, tokens: list[int]) -> None:
        self.burst(tokens)


class FifoMachine(SchedulerMachine):
    policy = "fifo"
    seen: ClassVar[Counter[str]] = Counter()


class ReservationMachine(SchedulerMachine):
    policy = "reservation"
    seen: ClassVar[Counter[str]] = Counter()


class PriorityMachine(SchedulerMachine):
    policy = "priority"
    seen: ClassVar[Counter[str]] = Counter()


EVERYWHERE = ["group of 2", "gathered"]
NIGHTLY = [
    "group over two nodes",
    "group of 3",
    *(f"member lost while {state}" for state in ("forming", "running", "decoding")),
    *(f"{order} lost" for order in ("FormGroup", "RunPrefill", "ExpectKv", "DropRequest", "DissolveGroup")),
]
WITH_PAUSES = ["group of several paused"]
WITH_PAUSES_NIGHTLY = [
    *(f"member lost while {state}" for state in ("pausing", "paused")),
    *("PauseGroup lost", "ResumeGroup lost", "PartGroup lost", "parted"),
]
WITH_SPILLS = ["spilled", "restored", "group of several spilled"]
WITH_SPILLS_NIGHTLY = [
    *(f"member lost while {state}" for state in ("spilling", "spilled", "restoring")),
    *("SpillGroup lost", "RestoreGroup lost", "spill refused"),
]
"""What the examples must have brought about, or the machine proves less than it says. (A group of 3: of 3 or more. Not
each run of some hundred examples comes to every one of these: test_groups.py does.)"""


@pytest.mark.parametrize("machine", [SchedulerMachine, SpillMachine, FifoMachine, ReservationMachine, PriorityMachine])
def test_any_interleaving(machine: type[SchedulerMachine], request: pytest.FixtureRequest) -> None:
    nightly = request.config.getoption("--nightly")
    machine.seen.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10_000 if nightly else 100,
            stateful_step_count=60 if nightly else 40,
            deadline=None,
            derandomize=not nightly,
            suppress_health_check=list(HealthCheck),
            print_blob="pytest" in sys.modules,
        ),
    )
    wanted = EVERYWHERE + NIGHTLY * nightly
    if machine.policy == "pecsched":
        wanted += WITH_PAUSES + WITH_PAUSES_NIGHTLY * nightly
    if machine is SpillMachine:
        wanted += WITH_SPILLS + WITH_SPILLS_NIGHTLY * nightly
    never = [what for what in wanted if not machine.seen[what]]
    assert not never, f"never came about: {never}; came about: {dict(machine.seen)}"
