"""The cascade's choices beyond the golden scenarios: balance, bounds on what a decision looks at, room."""

from __future__ import annotations

import random

import pytest

from common.messages.scheduling import RequestSubmitted
from common.messages.sp import FormGroup, GroupFormed, GroupPaused, PauseGroup
from common.policy.lifecycle import RequestState
from common.policy.load_index import CANDIDATES_MAX, LoadIndex
from common.policy.scheduler_config import SchedulerConfig
from tests.policy.fake_world import World
from tests.policy.scenario import spec


def world_of_paused_longs(replicas: int) -> World:
    """Every replica prefills a long, and all of them are paused by a first wave of shorts."""
    config = SchedulerConfig(pause_max_s=1_000.0, pause_share_max=1.0, batch_tokens_max=100_000, lease_s=1e6)
    world = World(config, prefill=replicas, decode=2, kv=1_000_000)
    for i in range(replicas):
        world.submit(f"L{i}", 6_000, 16)
    world.deliver_all()
    assert len(world.groups) == replicas
    return world


def test_while_longs_are_paused_shorts_are_balanced_in_tokens_over_the_replicas():
    world = world_of_paused_longs(4)
    rng = random.Random(7)
    sizes = [rng.randint(32, 400) for _ in range(40)]
    for i, tokens in enumerate(sizes):
        world.submit(f"s{i}", tokens, 16)
        world.deliver_all()
    queued = [r.queued_tokens for r in world.scheduler.cluster.replicas.values()]
    assert sum(queued) == sum(sizes)
    assert max(queued) - min(queued) <= max(sizes), "greedy balance: never further apart than one short"


def test_no_more_longs_are_paused_than_needed():
    world = world_of_paused_longs(4)
    world.submit("s", 100, 16)
    world.deliver_all()
    states = [r.state for r in world.scheduler.cluster.requests.values() if r.is_long]
    assert states.count(RequestState.PAUSED) == 1
    assert states.count(RequestState.RUNNING) == 3


def test_a_short_that_fits_no_replicas_kv_waits_and_is_not_lost():
    world = World(SchedulerConfig(lease_s=1e6, threshold_tokens=4_096), prefill=1, decode=1, kv=4_096)
    for i in range(3):
        world.submit(f"s{i}", 2_000, 16)
    world.deliver_all()
    states = sorted(r.state.value for r in world.scheduler.cluster.requests.values())
    assert states == ["prefilling", "queued", "queued"]
    world.settle()
    assert {r.ended for r in world.requests.values()} == {"finished"}


@pytest.mark.parametrize("replicas", [8, 512])
def test_a_decision_looks_at_a_bounded_number_of_replicas(replicas: int, monkeypatch: pytest.MonkeyPatch):
    world = World(SchedulerConfig(lease_s=1e6), prefill=replicas, decode=1)
    looked: list[int] = []
    least = LoadIndex.least

    def counted(self: LoadIndex, count: int = CANDIDATES_MAX):
        looked.append(min(count, len(self)))
        return least(self, count)

    monkeypatch.setattr(LoadIndex, "least", counted)
    world.scheduler.handle(RequestSubmitted(spec=spec("s", 100)), 0.0)
    assert sum(looked) <= 5 * CANDIDATES_MAX


def test_a_long_takes_the_replica_with_the_fewest_queued_tokens():
    world = World(SchedulerConfig(lease_s=1e6), prefill=3, decode=1)
    world.submit("a", 300, 16)
    world.submit("b", 100, 16)
    world.deliver_all()
    commands = world.scheduler.handle(RequestSubmitted(spec=spec("L", 6_000)), 0.0)
    (form,) = [c for c in commands if isinstance(c, FormGroup)]
    assert [world.scheduler.cluster.replicas[w].queued_tokens for w in form.members] == [0]


def test_an_order_to_pause_is_given_once():
    world = World(SchedulerConfig(lease_s=1e6), prefill=1, decode=1)
    world.scheduler.handle(RequestSubmitted(spec=spec("L", 6_000)), 0.0)
    world.scheduler.handle(GroupFormed(request_id="L", attempt=0), 0.1)
    orders = []
    for i in range(5):
        orders += world.scheduler.handle(RequestSubmitted(spec=spec(f"s{i}", 50)), 3.0 + i / 1_000)
    assert sum(isinstance(c, PauseGroup) for c in orders) == 1
    paused = GroupPaused(request_id="L", attempt=0, step=1, prefilled_tokens=1, pause_latency_s=0.01)
    assert not [c for c in world.scheduler.handle(paused, 3.02) if isinstance(c, PauseGroup)]
    world.scheduler.check()
