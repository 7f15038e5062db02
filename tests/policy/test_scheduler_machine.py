"""A state machine over the scheduler: any interleaving of requests, work, cancels, crashes, lost messages and
time. `Scheduler.check()` runs after every event; in the end everything has ended and nothing is held."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from common.policy.cluster import SchedulerConfig
from tests.policy.fake_world import World


class SchedulerMachine(RuleBasedStateMachine):
    policy = "pecsched"

    @initialize(
        prefill=st.integers(1, 5),
        decode=st.integers(1, 2),
        threshold=st.sampled_from([100, 2_048]),
        group_max=st.sampled_from([1, 4]),
        switches=st.sampled_from(
            [
                {},
                {"preemption": False},
                {"colocation": False},
                {"disaggregation": False},
                {"long_order": "arrival"},
                {"shorts_spare": 1.5},
                {"reserved_long_tokens": 20_000},
            ]
        ),
    )
    def start(self, prefill: int, decode: int, threshold: int, group_max: int, switches: dict[str, object]) -> None:
        settings = {"threshold_tokens": threshold, "attempts_max": 1_000, "group_max": group_max} | switches
        config = SchedulerConfig(policy=self.policy, **settings)
        self.world = World(config, prefill=prefill, decode=decode)
        self.serial = 0

    @rule(tokens=st.one_of(st.integers(1, 400), st.integers(3_000, 19_000)), max_tokens=st.integers(1, 500))
    def submit(self, tokens: int, max_tokens: int) -> None:
        self.serial += 1
        self.world.submit(f"q{self.serial}", tokens, max_tokens)

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

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        self.world.crash(data.draw(st.sampled_from(sorted(self.world.workers))))

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        self.world.restart(data.draw(st.sampled_from(sorted(self.world.workers))))

    @rule()
    def restart_coordinator(self) -> None:
        self.world.restart_coordinator()

    @precondition(lambda self: self.world.senders())
    @rule(data=st.data())
    def lose_message(self, data: st.DataObject) -> None:
        self.world.lose_next(data.draw(st.sampled_from(self.world.senders())))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.settle()
        world.scheduler.check()
        assert {r.ended for r in world.requests.values()} <= {"finished", "cancelled", "failed"}
        assert not world.saved, "no record outlives its request"
        assert all(w.kv_reserved == 0 for w in world.scheduler.cluster.workers())


class FifoMachine(SchedulerMachine):
    policy = "fifo"


class ReservationMachine(SchedulerMachine):
    policy = "reservation"


class PriorityMachine(SchedulerMachine):
    policy = "priority"


@pytest.mark.parametrize("machine", [SchedulerMachine, FifoMachine, ReservationMachine, PriorityMachine])
def test_any_interleaving(machine: type[SchedulerMachine], request: pytest.FixtureRequest) -> None:
    nightly = request.config.getoption("--nightly")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10_000 if nightly else 150,
            stateful_step_count=60,
            deadline=None,
            derandomize=not nightly,
            suppress_health_check=list(HealthCheck),
            print_blob="pytest" in sys.modules,
        ),
    )
