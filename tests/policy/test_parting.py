"""When a group gives its replicas back: by what was promised of it, how often it stood, and who waits."""

from __future__ import annotations

import pytest

from common.messages.groups import GATHERED_RING, RING
from common.policy.cluster import Cluster, Request
from common.policy.lifecycle import RequestState
from common.policy.long_planner import Layout
from common.policy.parting import LOOK_EVERY_S, PAUSES_MIN, Parting, stood
from common.policy.preemption import PauseAccount
from common.units import RequestId, WorkerId
from tests.policy.fake_world import spec
from tests.policy.test_elastic import Scene as ElasticScene

TOKEN_S = 1e-3
"""Of one replica."""


class Planner:
    """A group of two is so many times as fast as one."""

    degree_max = 8

    def __init__(self, speedup: float) -> None:
        self.speedup = speedup

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        return TOKEN_S * tokens / (self.speedup if sum(layout) > 1 else 1.0)

    def degree(self, tokens: int, kv_tokens: int, free_by_node: object, kv_free_tokens: int) -> int:
        raise AssertionError("not asked")

    def took(self, degree: int, expected_s: float, ran_s: float) -> None:
        raise AssertionError("not told")


class Scene:
    """A long of 20,000 tokens that prefills on two replicas of two; at 5 s it has done a part of it."""

    def __init__(self, speedup: float, *, scheme=GATHERED_RING, paused_s: float = 0.0, pauses: int = 0) -> None:
        planner = Planner(speedup)
        self.cluster = Cluster()
        profile = ElasticScene(1, live=True).profile
        for number in range(2):
            self.cluster.add_worker(profile(number), 0.0)
        self.cluster.can_form_groups = True
        self.long = self._long("L", 20_000)
        self.long.members, self.long.sizes, self.long.scheme = (WorkerId("p0"), WorkerId("p1")), (2, 2), scheme
        self.long.state = RequestState.RUNNING
        account = PauseAccount(started_s=0.0, estimate_s=planner.prefill_s(20_000, (2,)))
        account.suspended_s, account.count = paused_s, pauses
        self.long.pauses = account
        self.cluster.seat_long(list(self.cluster.replicas.values()), RequestId("L"))
        self.parting = Parting(planner)

    def _long(self, name: str, tokens: int) -> Request:
        request = Request(spec=spec(name, tokens), length_class="long", order=1, arrived_s=0.0)
        self.cluster.requests[request.request_id] = request
        return request

    def parts(self, at_s: float = 5.0, *, waits: int = 0, spare: int = 0) -> bool:
        """`waits`: tokens of a long that does."""
        assert self.parting.is_due(self.cluster, at_s)
        waiting = self._long("next", waits) if waits else None
        decision = self.parting.decide(self.cluster, waiting, spare, at_s)
        assert decision is None or decision.request is self.long
        return decision is not None


def test_undisturbed_and_with_nobody_waiting_a_group_keeps_its_replicas():
    assert not Scene(1.1).parts()


@pytest.mark.parametrize(("speedup", "parts"), [(1.2, True), (1.45, True), (1.55, False), (1.9, False)])
def test_for_one_of_its_length_a_group_parts_below_one_and_a_half_times_the_speed(speedup, parts):
    assert Scene(speedup).parts(0.0, waits=20_000) is parts


def test_a_short_one_that_waits_is_reason_enough_where_much_is_left():
    assert Scene(1.7).parts(0.0, waits=2_000)
    assert not Scene(1.7).parts(11.0, waits=2_000), "it is nearly done"


def test_shorts_that_keep_it_standing_are():
    """Of 10 s it stood 4. What is left is 7.3 s of its time, which take it 12.2 if that goes on; one replica, 11."""
    assert Scene(1.5, paused_s=4.0, pauses=PAUSES_MIN).parts(10.0)
    assert not Scene(1.5, paused_s=4.0, pauses=PAUSES_MIN - 1).parts(10.0), "twice may be chance"
    assert not Scene(1.9, paused_s=4.0, pauses=PAUSES_MIN).parts(10.0)
    assert not Scene(1.5, paused_s=2.0, pauses=PAUSES_MIN).parts(10.0)


def test_not_if_the_one_that_waits_would_have_no_place_for_it():
    assert not Scene(1.2).parts(waits=20_000, spare=2)
    assert not Scene(1.2).parts(waits=200_000), "one replica has no room for it"


def test_only_where_the_first_has_room_and_once():
    assert not Scene(1.2, scheme=RING).parts(waits=20_000)
    told = Scene(1.2)
    told.long.parting_since_s = 1.0
    assert not told.parts(waits=20_000)
    joined = Scene(1.2)
    joined.long.joining = (WorkerId("p2"),)
    assert not joined.parts(waits=20_000)


def test_a_look_is_not_worth_it_at_every_event():
    scene = Scene(1.2)
    assert not scene.parts(5.0)
    assert not scene.parting.is_due(scene.cluster, 5.0 + 0.9 * LOOK_EVERY_S)
    assert scene.parting.is_due(scene.cluster, 5.0 + LOOK_EVERY_S)


def test_how_often_it_stood_counts_the_pause_that_goes_on():
    account = PauseAccount(started_s=0.0, estimate_s=10.0)
    for begin_s in (1.0, 3.0, 5.0):
        account.paused(begin_s)
        if begin_s < 5.0:
            account.suspended_s += 1.0
            account.paused_since_s = None
    assert stood(account, 6.0) == pytest.approx(3.0 / 6.0)
