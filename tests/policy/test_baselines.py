"""FIFO, Reservation and Priority: each rule beyond the golden scenarios and the books they keep."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, run_state_machine_as_test

from common.messages.cluster import WorkerLeft
from common.messages.sp import PauseGroup
from common.policy.cluster import Request
from common.policy.fifo import FifoPolicy
from common.policy.lifecycle import PREFILLING_LONG, RequestState
from common.policy.lines import Lines
from common.policy.priority import PriorityPolicy
from common.policy.reservation import ReservationPolicy
from common.policy.scheduler_config import SchedulerConfig
from tests.policy.fake_world import World
from tests.policy.test_scheduler_machine import FifoMachine, PriorityMachine, ReservationMachine, SchedulerMachine

BASELINES = ["fifo", "reservation", "priority"]


def world(policy: str, replicas: int = 4, *, kv: int = 20_000, decoders: int = 1, **more: object) -> World:
    """Two replicas to a node; a long takes one more than hold its KV."""
    config = SchedulerConfig(policy=policy, group_max=64, lease_s=1e6, **more)
    return World(config, prefill=replicas, decode=decoders, kv=kv)


def submit(place: World, name: str, tokens: int) -> Request:
    place.submit(name, tokens, 16)
    place.deliver_all()
    return place.scheduler.cluster.requests[name]


def members(place: World, name: str) -> tuple[str, ...]:
    return place.scheduler.cluster.requests[name].members


def lines_of(place: World) -> Lines:
    policy = place.scheduler._policy
    assert isinstance(policy, FifoPolicy | ReservationPolicy)
    return policy._lines


# --- the books ---------------------------------------------------------------------------------------


def audit_lines(place: World, lines: Lines) -> None:
    """Everything that is kept up to date is what a plain count gives."""
    cluster = place.scheduler.cluster
    queued = {name for name, request in cluster.requests.items() if request.state is RequestState.QUEUED}
    homeless = {request.request_id for request in lines._homeless.first(1_000)}
    assert set(lines._bindings) | homeless == queued
    assert not set(lines._bindings) & homeless
    assert set(lines._lines) <= set(cluster.replicas)
    for worker_id, line in lines._lines.items():
        replica = cluster.replicas[worker_id]
        here = [b for b in lines._bindings.values() if worker_id in b.members]
        assert line.waiting == {b.order: b for b in here}
        assert line.head() is min(here, key=lambda b: b.order, default=None), "first come, first served"
        assert line.tokens == sum(b.weight for b in here)
        seated = line.seat[1] if line.seat is not None and line.seat[0] == replica.long else 0
        assert (seated > 0) == (replica.long is not None), "a long that prefills counts"
        for pool in {lines.every, line.pool}:
            assert pool.load(worker_id) == line.tokens + replica.queued_tokens + seated
        head = line.head()
        assert line.called is (head if head and lines._may_start(head, replica) else None)
    for binding in lines._bindings.values():
        everywhere = all(lines._lines[w].called is binding for w in binding.members)
        assert everywhere == (lines._ready_of(binding).get(binding.order) is binding)
        assert len(set(binding.members)) == len(binding.members)
    assert not (lines._ready_longs and cluster.can_form_groups), "a long that could start was started"


def audit_waiting(place: World) -> None:
    policy = place.scheduler._policy
    queued = [r for r in place.scheduler.cluster.requests.values() if r.state is RequestState.QUEUED]
    assert policy.waiting_shorts() == sum(not r.is_long for r in queued)
    assert policy.waiting_longs() == sum(r.is_long for r in queued)
    assert policy.waiting_tokens() == sum(r.tokens for r in queued)
    assert {r.request_id for r in policy.waiting(1_000)} == {r.request_id for r in queued}
    assert len(list(policy.waiting(2))) == min(2, len(queued))


class Audited(SchedulerMachine):
    @invariant()
    def audit(self) -> None:
        if not hasattr(self, "world"):
            return
        place = self.world
        audit_waiting(place)
        assert not [r for r in place.scheduler.cluster.requests.values() if r.state is RequestState.PAUSED]
        policy = place.scheduler._policy
        if isinstance(policy, FifoPolicy | ReservationPolicy):
            audit_lines(place, policy._lines)
        if isinstance(policy, ReservationPolicy) and policy._drawn:
            parts = set(policy._lines.for_shorts.ids()), set(policy._lines.for_longs.ids())
            assert parts[0] | parts[1] == set(place.scheduler.cluster.replicas)
            assert not parts[0] & parts[1]
            assert parts[0] or not parts[1]
        if isinstance(policy, PriorityPolicy):
            replicas = place.scheduler.cluster.replicas.values()
            assert set(policy._idle.ids()) == {r.worker_id for r in replicas if r.long is None and not r.has_shorts}


class AuditedFifo(Audited, FifoMachine):
    pass


class AuditedReservation(Audited, ReservationMachine):
    pass


class AuditedPriority(Audited, PriorityMachine):
    pass


@pytest.mark.parametrize("machine", [AuditedFifo, AuditedReservation, AuditedPriority])
def test_totals_and_heads_are_right_after_any_interleaving(
    machine: type[Audited], request: pytest.FixtureRequest
) -> None:
    nightly = request.config.getoption("--nightly")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=2_000 if nightly else 25,
            stateful_step_count=40,
            deadline=None,
            derandomize=not nightly,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- FIFO --------------------------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("short"), st.integers(1, 2_000)),
        st.tuples(st.just("long"), st.integers(3_000, 50_000)),
        st.tuples(st.just("work"), st.integers(0, 100)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_no_short_stands_behind_a_long_while_a_replica_is_idle(history: list[tuple[str, int]]) -> None:
    place = world("fifo", 6)
    lines = lines_of(place)
    for i, (what, number) in enumerate(history):
        if what == "work":
            if work := place.work():
                place.progress(work[number % len(work)])
                place.deliver_all()
            continue
        taken = {w for b in lines._bindings.values() for w in b.members}
        idle = {
            worker_id
            for worker_id, replica in place.scheduler.cluster.replicas.items()
            if worker_id not in taken and replica.long is None and replica.queued_tokens == 0
        }
        request = submit(place, f"q{i}", number)
        if what == "short" and idle and request.state is RequestState.PREFILLING:
            assert request.prefill_worker in idle
        if what == "short" and idle and request.state is RequestState.QUEUED:
            assert set(lines._bindings[request.request_id].members) <= idle, "waits for KV or a decode worker only"
    place.settle()
    assert {r.ended for r in place.requests.values()} <= {"finished"}


def test_a_long_weighs_what_its_time_is_worth_in_shorts() -> None:
    place = world("fifo", 2, group_gathers=False)
    submit(place, "L", 14_000)
    # 14 s of prefill (1 ms a token) on two replicas at 0.7 ms a token of shorts.
    assert [lines_of(place).every.load(w) for w in members(place, "L")] == [10_000, 10_000]
    place.progress(("L", 0))
    place.deliver_all()
    assert [lines_of(place).every.load(w) for w in members(place, "L")] == [0, 0], "a long that decodes counts nothing"


def test_of_two_longs_the_shorter_has_the_shorter_line() -> None:
    place = world("fifo", 4)
    submit(place, "long", 19_000)
    submit(place, "longer", 30_000)
    assert set(members(place, "long")) == {"p0", "p1"}
    # Three replicas: behind `long` as well.
    assert place.scheduler.cluster.requests["longer"].state is RequestState.QUEUED
    submit(place, "s", 10)
    assert lines_of(place)._bindings["s"].members[0] in set(members(place, "long")) | {"p2", "p3"}


def test_a_long_is_not_overtaken_where_it_is_at_the_head_and_waits_for_the_other_replicas() -> None:
    place = world("fifo", 2, batch_tokens_max=100_000)
    submit(place, "s", 2_000)
    submit(place, "L", 14_000)
    submit(place, "later", 10)
    requests = place.scheduler.cluster.requests
    assert [requests[name].state.value for name in ("s", "L", "later")] == ["prefilling", "queued", "queued"]
    place.progress(("s", 0))
    place.deliver_all()
    assert members(place, "L") == ("p0", "p1")
    assert requests["later"].state is RequestState.QUEUED


def test_a_long_that_comes_back_passes_those_that_came_after_it() -> None:
    place = world("fifo", 4)
    submit(place, "A", 14_000)
    submit(place, "B", 50_000)
    submit(place, "C", 50_000)
    assert len(lines_of(place)._bindings["C"].members) == 4
    place._dissolve(("A", 0), "rank lost")
    place.deliver("c")
    assert len(members(place, "B")) == 4, "the first of those that wait, now that A does not"
    place.deliver_all()
    assert place.requests["A"].attempt == 1
    place.progress(("B", 0))
    place.deliver_all()
    requests = place.scheduler.cluster.requests
    assert requests["A"].state in PREFILLING_LONG, "it came before C, on some of whose lines C stood first meanwhile"
    assert requests["C"].state is RequestState.QUEUED
    place.settle()
    assert {r.ended for r in place.requests.values()} == {"finished"}


def test_a_returning_long_takes_the_head_from_one_that_is_ready_on_part_of_its_replicas() -> None:
    """Were lines ordered by when somebody joined them, A and B could each be first where the other waits."""
    place = world("fifo", 2, batch_tokens_max=100_000)
    submit(place, "A", 14_000)
    submit(place, "s", 2_000)
    submit(place, "B", 14_000)
    place._dissolve(("A", 0), "rank lost")
    place.deliver("c")
    lines = lines_of(place)
    (idle,) = lines._bindings["B"].ready
    assert place.scheduler.cluster.replicas[idle].queued_tokens == 0, "the short runs on the other"
    place.deliver_all()
    assert lines._bindings["B"].ready == set()
    assert lines._bindings["A"].ready == {idle}
    place.progress(("s", 0))
    place.deliver_all()
    requests = place.scheduler.cluster.requests
    assert requests["A"].state in PREFILLING_LONG
    assert requests["B"].state is RequestState.QUEUED


def test_who_stood_in_the_line_of_a_lost_replica_is_bound_anew() -> None:
    place = world("fifo", 3)
    submit(place, "L", 14_000)
    submit(place, "M", 25_000)
    assert lines_of(place)._bindings["M"].members == ("p0", "p1", "p2")
    place.crash("p2")
    place.advance(0.0)
    place.restart("p2")
    place.heartbeats()
    place.deliver_all()
    assert set(lines_of(place)._bindings["M"].members) <= set(place.scheduler.cluster.replicas)
    place.settle()
    assert {r.ended for r in place.requests.values()} == {"finished"}


def test_decode_workers_are_given_in_order_of_arrival() -> None:
    """One row: of the shorts at the heads of all lines the one that came first has it, however it eased."""
    place = World(SchedulerConfig(policy="fifo", lease_s=1e6, batch_tokens_max=10), prefill=3, decode=1, kv=1_024)
    for i in range(5):
        submit(place, f"s{i}", 700)
    states = {n: r.state.value for n, r in place.scheduler.cluster.requests.items()}
    assert states == {"s0": "prefilling", "s1": "queued", "s2": "queued", "s3": "queued", "s4": "queued"}
    for expected in ("s1", "s2", "s3", "s4"):
        while place.scheduler.cluster.requests[expected].state is RequestState.QUEUED:
            place.progress(place.work()[0])
            place.deliver_all()
        later = [r for r in place.scheduler.cluster.requests.values() if r.request_id > expected]
        assert all(r.state is RequestState.QUEUED for r in later)


# --- Reservation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "longest", "for_longs"),
    [
        (8, 30_000, 3),  # two hold its KV, the planner adds one
        (8, 70_000, 4),  # the planner would add one for speed, but half is enough
        (8, 90_000, 5),  # of which its KV needs all
        (8, 10_000_000, 7),  # more than all can hold: one stays for shorts
        (2, 30_000, 1),
        (1, 30_000, 0),
    ],
)
def test_as_many_replicas_are_set_aside_as_the_longest_prompt_is_spread_over(
    replicas: int, longest: int, for_longs: int
) -> None:
    place = world("reservation", replicas, reserved_long_tokens=longest)
    submit(place, "s", 10)
    lines = lines_of(place)
    assert len(lines.for_longs) == for_longs
    assert len(lines.for_shorts) == replicas - for_longs
    nodes = [int(worker_id[1:]) // 2 for worker_id in lines.for_longs.ids()]
    assert len(set(nodes)) == -(-for_longs // 2), "as few nodes as can be"


def test_shorts_queue_up_while_reserved_replicas_idle_and_longs_while_others_do() -> None:
    place = world("reservation", 4, reserved_long_tokens=55_000, batch_tokens_max=10)
    lines = lines_of(place)
    for i in range(6):
        submit(place, f"s{i}", 100)
    cluster = place.scheduler.cluster
    assert len(lines.for_longs) == 3
    assert all(r.queued_tokens == 0 for w, r in cluster.replicas.items() if w in lines.for_longs)
    assert sum(r.state is RequestState.QUEUED for r in cluster.requests.values()) == 5
    submit(place, "L", 14_000)
    submit(place, "M", 14_000)
    assert set(members(place, "L")) <= set(lines.for_longs.ids())
    assert cluster.requests["M"].state is RequestState.QUEUED
    place.settle()
    assert {r.ended for r in place.requests.values()} == {"finished"}


def test_a_lone_replica_serves_both() -> None:
    place = world("reservation", 1)
    submit(place, "L", 14_000)
    submit(place, "s", 100)
    assert members(place, "L") == ("p0",)
    place.settle()
    assert {r.ended for r in place.requests.values()} == {"finished"}


def test_the_parts_are_drawn_again_when_a_reserved_replica_is_lost() -> None:
    place = world("reservation", 5, reserved_long_tokens=15_000)
    submit(place, "s", 10)
    lines = lines_of(place)
    assert set(lines.for_longs.ids()) == {"p0", "p1"}
    place.crash("p0")
    place.restart("p0")
    place.workers["p0"].alive = False
    place.scheduler.handle(_left("p0"), place.now_s)
    assert len(lines.for_longs) == 2
    assert set(lines.for_longs.ids()) == {"p2", "p3"}, "of one node"
    assert set(lines.for_shorts.ids()) == {"p1", "p4"}


def _left(worker_id: str) -> WorkerLeft:
    return WorkerLeft(worker_id=worker_id, incarnation="1")


# --- Priority ----------------------------------------------------------------------------------------


def test_a_long_waits_until_no_short_waits_and_enough_replicas_are_idle() -> None:
    place = world("priority", 2, batch_tokens_max=10)
    for i in range(4):
        submit(place, f"s{i}", 100)
    long = submit(place, "L", 14_000)
    for name in ("s0", "s1", "s2"):
        place.progress((name, 0))
        place.deliver_all()
        assert long.state is RequestState.QUEUED
    place.progress(("s3", 0))
    place.deliver_all()
    assert long.members == ("p0", "p1")


def test_longs_starve_while_shorts_keep_one_replica_too_many_busy() -> None:
    place = world("priority", 2)
    long = None
    for i in range(30):
        submit(place, f"s{i}", 100)
        long = long or submit(place, "L", 14_000)
        if i:
            place.progress((f"s{i - 1}", 0))
            place.deliver_all()
    assert long is not None
    assert long.state is RequestState.QUEUED


def test_shorts_go_to_the_replica_with_the_fewest_queued_tokens_and_never_where_a_long_prefills() -> None:
    place = world("priority", 4)
    submit(place, "L", 14_000)
    free = set(place.workers) - set(members(place, "L")) - {"d0"}
    for i, tokens in enumerate([300, 100, 100, 150]):
        submit(place, f"s{i}", tokens)
    replicas = place.scheduler.cluster.replicas
    assert sorted(replicas[w].queued_tokens for w in free) == [300, 350]
    for i in range(4, 14):
        submit(place, f"s{i}", 900)
    assert all(replicas[w].queued_tokens == 0 for w in members(place, "L"))
    assert place.scheduler._policy.waiting_shorts() > 0


def test_a_long_that_no_replicas_there_can_hold_does_not_hold_up_the_others() -> None:
    place = world("priority", 3)
    submit(place, "s", 10)
    huge = submit(place, "huge", 55_000)
    place.scheduler.handle(_left("p2"), place.now_s)
    small = submit(place, "small", 14_000)
    place.progress(("s", 0))
    place.deliver_all()
    assert huge.state is RequestState.QUEUED
    assert small.state in PREFILLING_LONG


# --- all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BASELINES)
def test_nobody_is_ever_paused(policy: str) -> None:
    place = world(policy, 3)
    submit(place, "L", 14_000)
    for i in range(20):
        submit(place, f"s{i}", 100)
    place.settle()
    assert PauseGroup.__name__ not in "".join(place.log)
    assert {r.ended for r in place.requests.values()} == {"finished"}
