"""Workers that share cores: who gets how much, and what that does to a simulated cluster."""

from __future__ import annotations

import math

import pytest

from common.policy.decode_pace import HOLD_S
from common.policy.scheduler_config import SchedulerConfig
from loadtest.simulator.cores import Cores
from loadtest.simulator.result import Outcome
from loadtest.simulator.timeline import Timeline
from loadtest.simulator.world import ClusterShape, World
from tests.loadtest.sim_cluster import (
    DECODE_S,
    HOP_S,
    LAYERS,
    LONG_TOKEN_S,
    PASS_S,
    ROW_S,
    THRESHOLD,
    TOKEN_S,
    TRANSFER_S,
    Checked,
    Costs,
    Longs,
    workload,
)


class Worker:
    def __init__(self) -> None:
        self.speed = 0.0

    def set_speed(self, speed: float) -> None:
        self.speed = speed


def test_as_many_workers_as_cores_get_one_each() -> None:
    cores, workers = Cores(2), [Worker(), Worker()]
    for worker in workers:
        cores.use(worker)
    assert [worker.speed for worker in workers] == [1.0, 1.0]


def test_more_workers_share_the_cores_and_who_leaves_gives_its_part_back() -> None:
    cores, workers = Cores(2), [Worker() for _ in range(4)]
    for worker in workers:
        cores.use(worker)
    assert [worker.speed for worker in workers] == [0.5] * 4
    cores.leave(workers[0])
    assert [worker.speed for worker in workers[1:]] == pytest.approx([2 / 3] * 3)
    cores.leave(workers[1])
    assert [worker.speed for worker in workers[2:]] == [1.0, 1.0]


def test_the_background_gets_what_the_others_leave() -> None:
    cores, front, backs = Cores(2, background_nice=10), Worker(), [Worker(), Worker()]
    for back in backs:
        cores.use(back, background=True)
    cores.use(front)
    assert front.speed == 1.0, "one core is the most that a worker can use"
    assert [back.speed for back in backs] == pytest.approx([0.5, 0.5])
    second = Worker()
    cores.use(second)
    assert 0.85 < front.speed < 1.0
    assert second.speed == pytest.approx(front.speed)
    assert sum(worker.speed for worker in (front, second, *backs)) == pytest.approx(2.0)


def test_a_worker_that_goes_to_the_background_makes_room() -> None:
    cores, workers = Cores(1, background_nice=10), [Worker(), Worker()]
    for worker in workers:
        cores.use(worker)
    cores.use(workers[0], background=True)
    weight = 1.25**-10
    assert workers[0].speed == pytest.approx(weight / (1 + weight))
    assert workers[1].speed == pytest.approx(1 / (1 + weight))


def test_cores_are_slower_together_and_stepping_slower_still_in_a_crowd() -> None:
    cores, stepper, others = Cores(2, together=0.8, crowded=0.5, background_nice=10), Worker(), [Worker(), Worker()]
    cores.use(stepper, step_s=0.02)
    assert stepper.speed == 1.0
    cores.use(others[0], background=True)
    assert [stepper.speed, others[0].speed] == pytest.approx([0.8, 0.8])
    cores.use(others[1], background=True)
    assert stepper.speed == pytest.approx(0.8 * 0.5)
    assert [other.speed for other in others] == pytest.approx([0.4, 0.4]), "what it waits, nobody gains"


def test_who_steps_and_is_nice_gets_what_longs_leave_by_weight_as_it_counts() -> None:
    cores, stepper, longs = Cores(2, background_nice=8, step_nice=16, step_gain=3.0), Worker(), [Worker(), Worker()]
    cores.use(stepper, step_s=0.02)
    assert stepper.speed == 1.0, "nobody else is there"
    cores.use(longs[0], background=True)
    assert stepper.speed == pytest.approx(1.0), "there is a core for each"
    polite = Cores(2, background_nice=8, step_nice=16)
    for task in (stepper, *longs):
        polite.use(task, background=task is not stepper, step_s=0.02 if task is stepper else None)
    assert stepper.speed == pytest.approx(2 / (2 * 1.25**8 + 1))
    cores.use(longs[1], background=True)
    assert stepper.speed == pytest.approx(2 * 3 / (2 * 1.25**8 + 3))
    assert sum(task.speed for task in (stepper, *longs)) == pytest.approx(2.0), "what it gains, they lose"


def test_who_steps_keeps_a_distance_in_a_crowd_only_and_leaves_the_rest_to_the_others() -> None:
    cores, stepper, longs = Cores(2, together=0.8, crowded=0.5, step_distance_s=0.1), Worker(), [Worker(), Worker()]
    cores.use(stepper, step_s=0.02)
    cores.use(longs[0])
    assert [stepper.speed, longs[0].speed] == pytest.approx([0.8, 0.8]), "there is a core for each"
    cores.use(longs[1])
    assert stepper.speed == pytest.approx(0.2), "a step of 20 ms each 100 ms, whatever it waits in between"
    assert [long.speed for long in longs] == pytest.approx([0.8 * (2 - 0.25) / 2] * 2)
    cores.use(stepper, step_s=0.04)
    assert stepper.speed == pytest.approx(0.4), "more rows, longer steps"
    cores.use(stepper, step_s=0.4)
    assert stepper.speed == pytest.approx(0.8 * 0.5 * 2 / 3), "no longer than by its weight"
    cores.use(stepper, step_s=math.inf)
    assert stepper.speed == pytest.approx(0.8 * 0.5 * 2 / 3), "nor does it keep a distance then"


def test_steps_keep_their_distance_for_a_while_after_the_crowd() -> None:
    cores, timeline, stepper, longs = Cores(2, step_distance_s=0.1), Timeline(), Worker(), [Worker(), Worker()]
    cores.attach(timeline)
    for task in longs:
        cores.use(task)
    cores.use(stepper, step_s=0.02)
    assert stepper.speed == pytest.approx(0.2)
    timeline.now_s = 5.0
    cores.leave(longs[0])
    assert stepper.speed == pytest.approx(0.2), "it cannot know so soon"
    when_s, _, do, what = timeline.heap.pop()
    timeline.now_s = when_s
    do(what)
    assert when_s == pytest.approx(5.0 + HOLD_S)
    assert stepper.speed == 1.0
    cores.use(longs[0])
    assert stepper.speed == pytest.approx(0.2), "a new crowd"
    do(what)
    assert stepper.speed == pytest.approx(0.2), "what was to end the last one does not end this"


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"count": 2, "together": 0.0}, {"count": 2, "crowded": 0.0}, {"count": 2, "step_gain": 0.0}]
)
def test_cores_that_do_not_run_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must run"):
        Cores(**wrong)  # type: ignore[arg-type]


# --- in the simulated cluster --------------------------------------------------------------------


def served(cores: Cores | None, *arrivals: tuple[float, int, int]) -> list[Outcome]:
    """By two prefill workers and a decode worker."""
    config = SchedulerConfig(
        threshold_tokens=THRESHOLD, batch_tokens_max=400, pause_immunity_s=0.0, wait_instead_of_pause_s=0.0
    )
    shape = ClusterShape(nodes=1, replicas_per_node=3, decode_replicas=1, gpus_per_replica=1, layers=LAYERS)
    longs = Longs()
    world = World(shape, config, Costs(), longs, longs, hop_s=HOP_S, cores=cores)
    world._core = Checked(world._core)
    return world.run(workload(*arrivals)).outcomes


def test_enough_cores_change_nothing() -> None:
    arrivals = [(0.0, 2_000, 8), (0.01, 100, 8), (0.02, 300, 8), (0.3, 50, 4), (0.31, 1_500, 5), (1.0, 10, 3)]
    alone, shared = served(None, *arrivals), served(Cores(3), *arrivals)
    for one, other in zip(alone, shared, strict=True):
        assert other.first_token_s == pytest.approx(one.first_token_s)
        assert other.finished_s == pytest.approx(one.finished_s)


def test_two_passes_on_one_core_take_twice_as_long() -> None:
    pass_s = PASS_S + TOKEN_S * 300
    both = served(Cores(1), (0.0, 300, 1), (0.0, 300, 1))
    assert [each.first_token_s for each in both] == pytest.approx([2 * HOP_S + 2 * pass_s] * 2)


def test_a_pass_that_gets_company_is_slower_from_then_on() -> None:
    pass_s, later_s = PASS_S + TOKEN_S * 300, 0.02
    first, second = served(Cores(1), (0.0, 300, 1), (later_s, 300, 1))
    assert first.first_token_s == pytest.approx(2 * HOP_S + later_s + 2 * (pass_s - later_s))
    assert second.first_token_s == pytest.approx(2 * HOP_S + 2 * pass_s), "alone again at the end"


def test_decode_shares_a_core_with_a_long_in_the_background() -> None:
    weight = 1.25**-10
    long_s, step_s = LONG_TOKEN_S * 2_000, DECODE_S + ROW_S
    long, short = served(Cores(1, background_nice=10), (0.0, 2_000, 1), (0.5, 100, 11))
    speed = 1 / (1 + weight)
    pass_s = PASS_S + TOKEN_S * 100
    took_s = short.finished_s - short.arrived_s
    assert took_s == pytest.approx(2 * HOP_S + pass_s / speed + TRANSFER_S / LAYERS + 10 * step_s / speed)
    lost_s = (pass_s + 10 * step_s) / speed * (1 - weight * speed)
    assert long.first_token_s == pytest.approx(3 * HOP_S + long_s + lost_s)


def test_a_long_that_decodes_shares_too() -> None:
    alone = served(None, (0.0, 1_200, 50), (1.25, 400, 60))
    shared = served(Cores(1), (0.0, 1_200, 50), (1.25, 400, 60))
    for one, other in zip(alone, shared, strict=True):
        assert other.finished_s - other.arrived_s > 1.1 * (one.finished_s - one.arrived_s)
