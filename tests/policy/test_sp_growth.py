"""How the coordinator lets a group grow: the order of its words, and everything that may come in between."""

import pytest

from common.messages.groups import GroupScheme
from common.messages.sp import (
    DissolveGroup,
    DropSegment,
    FormGroup,
    GroupFailed,
    GroupGrown,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    GrowGroup,
    LoadSegment,
    MeetRanks,
    PauseGroup,
    PauseSegment,
    RanksMet,
    ResumeGroup,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentLoaded,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.policy.sp_group import GroupState
from tests.policy.test_sp_group import ANSWER_S, Scene, form, kinds, spec


class Growing(Scene):
    """`ranks` of a group that prefills; w0 leads. The larger one has also the workers that are named."""

    def __init__(self, ranks=1, newcomers=("x0",)):
        super().__init__(ranks)
        self.prefilling()
        self.newcomers = newcomers
        self.larger = (*self.members, *newcomers)

    def grow(self, growth=1, members=None, **more):
        members = members or self.larger
        addresses = tuple(f"{member}:1" for member in members)
        return self.tell(GrowGroup(**self.ids, growth=growth, members=members, addresses=addresses, **more))

    def met(self, rank=0, growth=1, reason=""):
        return self.word(RanksMet, rank, growth=growth, reason=reason)

    def of(self, worker_id, kind, **fields):
        return self.tell(kind(worker_id=worker_id, **self.ids, **fields))

    def switching(self):
        self.grow()
        for rank in range(len(self.members)):
            self.met(rank)
        for newcomer in self.newcomers:
            self.of(newcomer, SegmentLoaded)
        assert self.state is GroupState.SWITCHING
        return self

    def grown(self):
        self.switching()
        self.words(SegmentPaused, step=60, prefilled_tokens=1_024)
        assert self.state is GroupState.RESUMING
        self.members = self.larger
        return self

    @property
    def ranks(self):
        (group,) = self.core._groups.values()
        return group.members


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_group_takes_in_two(ranks):
    scene = Growing(ranks, ("x0", "x1"))
    orders = scene.grow()
    assert [(type(order), order.worker_id) for order in orders] == [
        *((MeetRanks, member) for member in scene.members),
        (LoadSegment, "x0"),
        (LoadSegment, "x1"),
    ]
    assert [order.rank for order in orders] == list(range(ranks + 2))
    assert all(order.growth == 1 and len(order.addresses) == ranks + 2 for order in orders)
    assert scene.of("x0", SegmentLoaded) == scene.of("x1", SegmentLoaded) == []
    assert [scene.met(rank) for rank in range(ranks)][:-1] == [[]] * (ranks - 1)
    assert scene.state is GroupState.SWITCHING, "when the last has met the others"
    *asked, grown = [said for said in scene.words(SegmentPaused, step=60, prefilled_tokens=1_025) if said]
    runs = [said for said in asked if isinstance(said, RunSegment)]
    grown = next(said for said in [*asked, grown] if isinstance(said, GroupGrown))
    assert (grown.members, grown.prefilled_tokens, grown.growth, grown.reason) == (scene.larger, 1_025, 1, "")
    scene.members = scene.larger
    assert scene.state is GroupState.RESUMING
    assert all(run.growth == 1 for run in runs)
    leads = scene.words(SegmentRunning)
    assert kinds(leads) == [RunSegment, GroupResumed], "rank 0 last"
    shares = {1: (1_025, 0, 0), 2: (513, 512, 0, 0), 3: (342, 342, 341, 0, 0)}[ranks]
    assert (leads[0].start, leads[0].step, leads[0].kept) == (1_025, 60, shares)
    assert scene.state is GroupState.PREFILLING


def test_rank_0_ends_its_chunk_and_the_others_confirm_it():
    scene = Growing(2)
    scene.grow()
    scene.met(0)
    scene.of("x0", SegmentLoaded)
    (stop,) = scene.met(1)
    assert (type(stop), stop.worker_id, stop.at_chunk_end) == (PauseSegment, "w0", True)
    (asked,) = scene.word(SegmentPaused, 0, step=60)
    assert (type(asked), asked.worker_id, asked.step, asked.at_chunk_end) == (PauseSegment, "w1", 60, False)
    said = scene.word(SegmentPaused, 1, step=60)
    assert kinds(said) == [GroupGrown, RunSegment, RunSegment]
    assert [run.worker_id for run in said[1:]] == ["w1", "x0"]


def test_ranks_keep_their_order_and_a_newcomer_may_stand_between_them():
    scene = Growing(2)
    scene.grow(members=("w0", "v", "w1"))
    scene.newcomers = ("v",)
    for rank in range(2):
        scene.met(rank)
    scene.of("v", SegmentLoaded)
    scene.words(SegmentPaused, step=60, prefilled_tokens=1_025)
    scene.members = ("w0", "v", "w1")
    run, _ = scene.words(SegmentRunning)
    assert run.kept == (513, 0, 512)


REFUSED = [
    (("w1", "w0", "x0"), {}, "order"),
    (("x0", "w0", "w1"), {}, "order"),
    (("w0", "w1"), {}, "no more"),
    (("w0", "x0", "x1"), {}, "order"),
    (("w0", "w1", "x0", "x0"), {}, "twice"),
]


@pytest.mark.parametrize(("members", "more", "why"), REFUSED)
def test_what_cannot_be_is_refused_and_the_group_goes_on(members, more, why):
    scene = Growing(2)
    (word,) = scene.grow(members=members, **more)
    assert (type(word), word.members) == (GroupGrown, ("w0", "w1"))
    assert why in word.reason
    assert scene.state is GroupState.PREFILLING


def test_only_rings_grow_and_only_while_they_prefill():
    scene = Scene(2)
    scene.tell(form(spec(), scene.members, scheme=GroupScheme(per_node=2)))
    scene.words(SegmentLoaded)
    scene.words(SegmentRunning)
    order = {"members": ("w0", "w1", "x0"), "addresses": ("a", "b", "c"), **scene.ids}
    (word,) = scene.tell(GrowGroup(growth=1, **order))
    assert "only rings" in word.reason
    paused = Growing(1)
    paused.order(PauseGroup)
    (word,) = paused.grow()
    assert "pausing" in word.reason


def give_up(scene, said, *, tells_newcomer=True):
    (word,) = [each for each in said if isinstance(each, GroupGrown)]
    assert word.members == scene.members
    assert word.reason
    drops = [each.worker_id for each in said if isinstance(each, DropSegment)]
    assert drops == (list(scene.newcomers) if tells_newcomer else [])


def test_a_newcomer_without_room_changes_nothing():
    scene = Growing(2)
    scene.grow()
    give_up(scene, scene.of("x0", SegmentFailed, reason="no room"), tells_newcomer=False)
    assert scene.state is GroupState.PREFILLING
    assert scene.met(0) == scene.met(1) == []


def test_who_still_lets_go_of_an_earlier_try_comes_into_no_other():
    scene = Growing(1)
    scene.grow()
    give_up(scene, scene.met(0, reason="too slow"))
    (refused,) = scene.grow(2)
    assert (type(refused), refused.reason) == (GroupGrown, "one that is to come in still lets go of an earlier try")
    assert scene.of("x0", SegmentLoaded) == [], "said before it heard that it is to drop it"
    assert scene.of("x0", SegmentDropped) == []
    assert kinds(scene.grow(3)) == [MeetRanks, LoadSegment]


def test_ranks_that_do_not_meet_in_time_change_nothing():
    scene = Growing(2)
    scene.grow()
    scene.met(0)
    give_up(scene, scene.pass_time(ANSWER_S))
    assert scene.state is GroupState.PREFILLING
    assert scene.of("x0", SegmentLoaded) == [], "too late"


def test_a_rank_that_has_not_met_the_others_changes_nothing():
    scene = Growing(2)
    scene.grow()
    give_up(scene, scene.met(1, reason="nobody answers"))


@pytest.mark.parametrize("switching", [False, True])
def test_a_pause_ends_the_try(switching):
    scene = Growing(2)
    scene.switching() if switching else scene.grow()
    said = scene.order(PauseGroup)
    give_up(scene, said)
    assert kinds(said)[-1] is PauseSegment
    assert said[-1].at_chunk_end is False
    *_, paused = scene.words(SegmentPaused)
    assert type(paused) is GroupPaused
    scene.order(ResumeGroup)
    run, resumed = scene.words(SegmentRunning)
    assert (run.growth, type(resumed)) == (0, GroupResumed)


@pytest.mark.parametrize("switching", [False, True])
def test_the_end_of_the_prefill_ends_the_try(switching):
    scene = Growing(1)
    scene.switching() if switching else scene.grow()
    said = scene.word(SegmentPrefilled)
    give_up(scene, said)
    assert kinds(said)[-1] is GroupPrefillFinished
    assert scene.state is GroupState.DECODING


def test_a_newcomer_lost_while_rank_0_ends_its_chunk_lets_the_group_run_on_as_it_was():
    scene = Growing(2).switching()
    give_up(scene, scene.of("x0", SegmentFailed, reason="gone"), tells_newcomer=False)
    scene.words(SegmentPaused, step=60)
    assert scene.state is GroupState.RESUMING
    run, _ = scene.words(SegmentRunning)
    assert run.growth == 0


def test_where_next_to_nothing_is_left_it_stays_as_it_was():
    scene = Growing(3).switching()
    said = scene.words(SegmentPaused, step=60, prefilled_tokens=7_000)
    (word,) = [each for each in said if isinstance(each, GroupGrown)]
    assert word.members == ("w0", "w1", "w2")
    assert "too little" in word.reason


def test_ranks_at_different_steps_end_the_group_and_the_newcomers_with_it():
    scene = Growing(2).switching()
    scene.word(SegmentPaused, 0, step=60)
    drops = scene.word(SegmentPaused, 1, step=59)
    assert [drop.worker_id for drop in drops] == ["w0", "w1", "x0"]
    for worker_id in ("w0", "w1", "x0"):
        ended = scene.of(worker_id, SegmentDropped)
    assert kinds(ended) == [GroupFailed]


def test_a_group_that_is_dissolved_ends_when_newcomers_have_dropped_too():
    scene = Growing(1)
    scene.grow()
    assert [drop.worker_id for drop in scene.order(DissolveGroup)] == ["w0", "x0"]
    assert scene.of("w0", SegmentDropped) == []
    assert kinds(scene.of("x0", SegmentDropped)) == [GroupFailed]


def test_a_word_that_was_lost_is_repeated_and_an_order_is_obeyed_once():
    scene = Growing(1)
    assert scene.grow()
    assert scene.grow() == [], "under way"
    give_up(scene, scene.met(0, reason="nobody answers"))
    (again,) = scene.grow()
    assert (type(again), again.members) == (GroupGrown, ("w0",))
    scene.of("x0", SegmentDropped)
    assert kinds(scene.grow(growth=2)) == [MeetRanks, LoadSegment]


def test_rank_0_is_asked_again_to_end_its_chunk():
    scene = Growing(1).switching()
    (again,) = scene.pass_time(ANSWER_S)
    assert (type(again), again.at_chunk_end) == (PauseSegment, True)
    assert scene.state is GroupState.SWITCHING


def test_a_group_grows_more_than_once_and_says_so_at_each_heartbeat():
    scene = Growing(1).grown()
    scene.words(SegmentRunning)
    assert [type(word) for word in scene.core.standings()].count(GroupGrown) == 1
    scene.newcomers, scene.larger = ("y0",), ("w0", "x0", "y0")
    scene.grow(growth=2)
    assert GroupGrown not in kinds(scene.core.standings()), "what came of the last try is not known yet"
    scene.met(0, growth=2)
    scene.met(1, growth=2)
    scene.of("y0", SegmentLoaded)
    scene.words(SegmentPaused, step=90, prefilled_tokens=2_024)
    scene.members = scene.larger
    run, _ = scene.words(SegmentRunning)
    assert (run.growth, run.start, run.kept) == (2, 2_024, (1_024 + 500, 500, 0))


def test_a_larger_group_is_paused_by_its_new_ranks_too():
    scene = Growing(1).grown()
    scene.words(SegmentRunning)
    scene.order(PauseGroup)
    (asked,) = scene.word(SegmentPaused, 0, step=77)
    assert (asked.worker_id, asked.step) == ("x0", 77)
    assert kinds(scene.word(SegmentPaused, 1, step=77)) == [GroupPaused]
    scene.order(ResumeGroup)
    assert [run.growth for run in scene.words(SegmentRunning) if isinstance(run, RunSegment)] == [1]


def test_a_new_rank_that_fails_after_the_switch_ends_the_group():
    scene = Growing(1).grown()
    drops = scene.word(SegmentFailed, 1)
    assert [drop.worker_id for drop in drops if isinstance(drop, DropSegment)] == ["w0"]
    assert kinds(scene.word(SegmentDropped, 0)) == [GroupFailed]


def test_a_growth_of_nobody_is_answered_by_the_end():
    scene = Scene(1)
    (word,) = scene.tell(GrowGroup(**scene.ids, growth=1, members=("w0", "x0"), addresses=("a", "b")))
    assert type(word) is GroupFailed
    assert scene.order(FormGroup)
