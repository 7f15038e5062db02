"""What taking in more ranks is worth, and when it is done: the estimates, the bounds, the hysteresis."""

from __future__ import annotations

import itertools
import random

import pytest

from common.messages.cluster import WorkerProfile
from common.policy.cluster import Cluster, Request
from common.policy.elastic import (
    EFFICIENCY_MIN,
    IDLE_S,
    LOOK_EVERY_S,
    SOON_S,
    TRY_AGAIN_S,
    Elastic,
    Work,
    remaining_s,
)
from common.policy.lifecycle import RequestState
from common.policy.long_planner import Layout
from common.policy.preemption import PauseAccount
from common.policy.scheduler_config import SchedulerConfig
from common.policy.sp_shares import Mesh
from common.units import RequestId, WorkerId
from tests.policy.scenario import profile, spec

LINEAR_S, SQUARE_S = 1e-3, 1e-7
"""Of one replica, of a prompt of n tokens: LINEAR_S·n + SQUARE_S·n²."""


class EvenPlanner:
    """All work is shared evenly."""

    degree_max = 1_000

    def degree(self, tokens: int, kv_tokens: int, free_by_node: tuple[int, ...], kv_free_tokens: int) -> int:
        return 1

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        return (LINEAR_S + SQUARE_S * tokens) * tokens / sum(layout)


PLANNER = EvenPlanner()


class UselessPlanner(EvenPlanner):
    """More ranks never pay. Remembers what it was asked about, in how many ranks of more."""

    def __init__(self) -> None:
        self.weighed: list[int] = []

    def prefill_s(self, tokens: int, layout: Layout) -> float:
        self.weighed.append(sum(layout) - 1)
        return PLANNER.prefill_s(tokens, (1,))

    def asked(self) -> int:
        """The most newcomers weighed since it was last asked this; 0 if none were."""
        most = max(self.weighed, default=0)
        self.weighed.clear()
        return most


def test_the_parabola_is_that_of_the_times_and_inverts():
    work = Work.of(PLANNER.prefill_s, 10_000, (2,))
    assert work == pytest.approx((LINEAR_S / 2, SQUARE_S / 2))
    for tokens in (0, 1, 777, 10_000):
        assert work.seconds(tokens) == pytest.approx(PLANNER.prefill_s(tokens, (2,)))
        assert work.tokens(work.seconds(tokens)) == pytest.approx(tokens)
    assert Work(2.0, 0.0).tokens(6.0) == 3.0


@pytest.mark.parametrize("done", [0, 2_500, 9_999])
def test_as_it_is_a_group_needs_what_the_rest_of_the_prompt_takes(done):
    whole_s, done_s = PLANNER.prefill_s(10_000, (2,)), PLANNER.prefill_s(done, (2,))
    assert remaining_s(PLANNER.prefill_s, 10_000, done, (2,), (2,)) == pytest.approx(whole_s - done_s)


def test_the_gain_is_partial_and_falls_with_what_is_done():
    """Of attention alone, half way through, twice the ranks save a sixth."""

    def attention(tokens: int, layout: Layout) -> float:
        return tokens**2 / sum(layout)

    gains = []
    for done in (0, 2_000, 5_000, 8_000):
        as_it_is = remaining_s(attention, 10_000, done, (1,), (1,))
        gains.append(1.0 - remaining_s(attention, 10_000, done, (1,), (2,)) / as_it_is)
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == pytest.approx(1 / 2)
    assert gains[2] == pytest.approx(1 / 6)


class Scene:
    """One long that prefills on `p0`, others that are idle."""

    def __init__(
        self, idle: int = 3, *, tokens: int = 20_000, live: bool = False, leader: int = 0, planner=PLANNER, **config
    ):
        self.cluster = Cluster()
        self.live = live
        for number in range(idle + 1):
            self.cluster.add_worker(self.profile(number), 0.0)
        self.cluster.can_form_groups = True
        self.request = Request(spec=spec("L", tokens), length_class="long", order=1, arrived_s=0.0)
        self.cluster.requests[RequestId("L")] = self.request
        member = WorkerId(f"p{leader}")
        self.request.members, self.request.sizes = (member,), (1,)
        self.request.state = RequestState.RUNNING
        self.request.pauses = PauseAccount(started_s=0.0, estimate_s=PLANNER.prefill_s(tokens, (1,)))
        self.cluster.seat_long([self.cluster.replicas[member]], RequestId("L"))
        self.elastic = Elastic(SchedulerConfig(**{"group_max": 8, **config}), planner)

    def profile(self, number: int) -> WorkerProfile:
        found = profile(f"p{number}")
        address = f"p{number}:2" if self.live else ""
        return WorkerProfile(
            **{name: getattr(found, name) for name in found.__struct_fields__} | {"group_address": address}
        )

    def decide(self, at_s: float, spare: int = 0):
        decision = self.elastic.decide(self.cluster, spare, at_s)
        return () if decision is None else decision.newcomers

    def settled(self, at_s: float, spare: int = 0):
        """When the workers have been idle for long enough."""
        self.decide(at_s, spare)
        return self.decide(at_s + IDLE_S, spare)


def test_idle_workers_are_taken_in_when_they_have_been_idle_for_a_while():
    scene = Scene()
    assert scene.decide(1.0) == ()
    assert scene.elastic.next_deadline_s() == 1.0 + IDLE_S
    assert scene.decide(1.0 + IDLE_S / 2) == ()
    assert scene.decide(1.0 + IDLE_S) == ("p1", "p2", "p3")


def test_those_who_wait_come_first():
    scene = Scene()
    scene.decide(1.0)
    scene.elastic.nobody_grows()
    assert scene.elastic.next_deadline_s() is None
    assert scene.decide(1.0 + IDLE_S) == (), "they have to be idle anew"
    assert scene.decide(1.0 + 2 * IDLE_S) != ()


def test_nobody_is_weighed_in_the_event_from_which_it_follows():
    """A request waits for what that is about."""
    scene = Scene()
    scene.request.state = RequestState.PAUSED
    assert scene.settled(1.0) == ()
    scene.request.state = RequestState.RUNNING
    assert scene.decide(3.0) == (), "nothing has changed that it knows of"
    scene.elastic.long_changed(scene.request)
    assert scene.decide(4.0) == ()
    assert scene.elastic.next_deadline_s() == 4.0 + SOON_S
    assert scene.decide(4.0 + SOON_S) == ("p1", "p2", "p3")


def test_a_cluster_in_which_something_changes_all_the_time_is_looked_at_now_and_then():
    planner = UselessPlanner()
    scene, looks = Scene(planner=planner), 0
    for tick in range(2_000):
        scene.elastic.long_changed(scene.request)  # as if it were another group each time
        scene.cluster.room_changes += 1
        scene.decide(1.0 + tick / 1_000)
        looks += planner.asked() > 0
    assert looks == pytest.approx((2.0 - IDLE_S) / LOOK_EVERY_S, abs=1)


def test_what_was_not_worth_it_is_weighed_again_with_more_workers_later_or_at_another_pace():
    planner = UselessPlanner()
    scene = Scene(planner=planner)

    def offered(at_s: float, spare: int) -> int:
        scene.cluster.room_changes += 1
        scene.settled(at_s, spare)
        return planner.asked()

    assert offered(1.0, spare=1) == 2
    assert offered(2.0, spare=1) == 0, "with as many"
    assert offered(3.0, spare=2) == 0, "with fewer"
    assert offered(4.0, spare=0) == 3, "with more"
    assert offered(5.0, spare=0) == 0
    scene.elastic.long_changed(scene.request)
    assert offered(6.0, spare=0) == 3, "it stood meanwhile, and said how far it is"
    assert offered(7.0 + TRY_AGAIN_S, spare=0) > 0, "later"


@pytest.mark.parametrize(("spare", "taken"), [(0, 3), (1, 2), (2, 1), (3, 0)])
def test_what_shorts_need_is_left_to_them(spare, taken):
    assert len(Scene().settled(1.0, spare)) == taken


def test_no_group_beyond_group_max():
    assert len(Scene(7, group_max=4).settled(1.0)) == 3


def test_nor_beyond_what_the_planner_would_form():
    planner = EvenPlanner()
    planner.degree_max = 3
    assert len(Scene(7, group_max=8, planner=planner).settled(1.0)) == 2


def test_nobody_grows_for_nothing_or_next_to_nothing():
    scene = Scene()
    assert scene.request.pauses is not None
    scene.request.pauses.started_s = -(scene.request.pauses.estimate_s - 0.4)
    assert scene.settled(0.0) == (), "0.4 s are left"
    scene.request.pauses.started_s = -2 * scene.request.pauses.estimate_s
    assert scene.settled(10.0) == (), "nobody knows how long it takes"


@pytest.mark.parametrize("state", [RequestState.PAUSING, RequestState.PAUSED, RequestState.FORMING])
def test_only_who_prefills_grows(state):
    scene = Scene()
    scene.request.state = state
    assert scene.settled(1.0) == ()


def test_a_group_waits_between_its_tries():
    scene = Scene()
    scene.request.growth, scene.request.growth_since_s = 1, 3.0
    assert scene.settled(2.0) == ()
    assert scene.elastic.next_deadline_s() == 3.0 + TRY_AGAIN_S
    assert scene.decide(3.0 + TRY_AGAIN_S) != ()


def test_who_still_holds_kv_of_an_earlier_try_or_lacks_room_is_not_asked():
    scene = Scene()
    scene.cluster.reserve(scene.cluster.replicas[WorkerId("p1")], scene.request.key, 10, 0.0)
    assert scene.settled(1.0) == ("p2", "p3")
    full = Scene(1)
    full.cluster.reserve(full.cluster.replicas[WorkerId("p1")], (RequestId("other"), 0), 30_000, 0.0)
    assert full.settled(1.0) == ()


def test_rank_0_stays_rank_0():
    """Live workers stand in one order in all groups."""
    assert Scene(live=True, leader=2).settled(1.0) == ("p3",)
    assert Scene(live=True, leader=3).settled(1.0) == ()


def test_each_rank_of_a_larger_group_does_enough():
    """The later, the fewer; at last nobody."""
    taken = []
    for share in (0.0, 0.3, 0.6, 0.85):
        scene = Scene(7, tokens=200_000)
        assert scene.request.pauses is not None
        scene.request.pauses.started_s = -share * scene.request.pauses.estimate_s
        for replica in scene.cluster.replicas.values():
            replica.kv_free = 10**6
        count = len(scene.settled(0.0))
        work = Work.of(PLANNER.prefill_s, 200_000, (1,))
        done = work.tokens(share * work.seconds(200_000))
        if count:
            took_s = remaining_s(PLANNER.prefill_s, 200_000, done, (1,), (1 + count,))
            left_s = remaining_s(PLANNER.prefill_s, 200_000, done, (1,), (1,))
            assert left_s >= EFFICIENCY_MIN * (1 + count) * took_s * 0.98
        taken.append(count)
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == 7
    assert taken[-1] < 7


def test_the_pace_of_a_group_that_has_grown_is_counted_from_there():
    account = PauseAccount(started_s=0.0, estimate_s=100.0)
    account.regrouped(20.0, 30.0, 0.25)
    assert account.remaining_s(20.0) == pytest.approx(30.0)
    account.paused(30.0, 0.50)  # a quarter in ten seconds
    assert account.remaining_s(30.0) == pytest.approx(20.0)


def test_a_mesh_that_grows_deals_out_every_token_once_and_each_rank_keeps_what_it_had():
    rng = random.Random(5)
    for _ in range(200):
        size = rng.randint(1, 4)
        mesh, start = Mesh(size, 1), rng.randint(1, 60)
        former = [*range(size), *[None] * rng.randint(1, 4)]
        larger = mesh.grown(start, former)
        assert larger.before == tuple(0 if rank is None else mesh.owned_tokens(start, rank) for rank in former)
        at = start
        for _ in range(4):
            tokens = rng.randint(1, 40)
            parts = [end - begin for begin, end in itertools.pairwise(larger.bounds(at, tokens))]
            assert sum(parts) == tokens
            assert max(parts) - min(parts) <= 1
            for node, part in enumerate(parts):
                assert larger.owned_tokens(at + tokens, node) - larger.owned_tokens(at, node) == part
            at += tokens
        owners = [larger.append_node(position) for position in range(at, at + len(former))]
        assert sorted(owners) == list(range(len(former)))
        assert sum(larger.owned_tokens(at, node) for node in range(len(former))) == at


def test_ranks_have_room_for_what_comes_unless_next_to_nothing_is_left():
    for size, more, kv_tokens in itertools.product((1, 2, 3), (1, 2, 3), (40, 97)):
        for start in range(1, kv_tokens + 1):
            mesh = Mesh(size, 1).grown(start, [*range(size), *[None] * more])
            share = Mesh(size, 1).reserved_tokens(kv_tokens)
            reserved = (share,) * size + (mesh.reserved_tokens(kv_tokens),) * more
            fits = all(mesh.owned_tokens(kv_tokens, rank) <= room for rank, room in enumerate(reserved))
            assert mesh.fits(kv_tokens, reserved) == fits
            if kv_tokens - start >= 2 * size * (size + more):
                assert fits
