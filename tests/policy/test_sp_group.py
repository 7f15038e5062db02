"""The SP coordinator's core: scenarios for one, two and three ranks, then random schedules with all invariants."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.messages.groups import GroupScheme
from common.messages.requests import Prompt, RequestSpec
from common.messages.sp import (
    DissolveGroup,
    DropSegment,
    FormGroup,
    GroupFailed,
    GroupFinished,
    GroupFormed,
    GroupPaused,
    GroupPrefillFinished,
    GroupResumed,
    LoadSegment,
    PauseGroup,
    PauseSegment,
    ResumeGroup,
    RunSegment,
    SegmentDropped,
    SegmentFailed,
    SegmentFinished,
    SegmentLoaded,
    SegmentPaused,
    SegmentPrefilled,
    SegmentRunning,
)
from common.policy.core import InvariantViolated, TimePassed
from common.policy.sp_coordinator import ENDINGS_KEPT, SpCoordinator
from common.policy.sp_group import LEADER_FIRST_S, TRANSITIONS, Group, GroupState, Rank
from common.policy.sp_io import StopAsked

ANSWER_S = 5.0


def form(spec, members, **more):
    addresses = tuple(f"{member}:1" for member in members) if len(members) > 1 else ()
    return FormGroup(spec=spec, members=members, addresses=addresses, **more)


def spec(request_id="r", attempt=0, tokens=7_000):
    prompt = Prompt(tokens=tokens, key=f"prompt-{request_id}-{attempt}")
    return RequestSpec(request_id=request_id, attempt=attempt, router_id="router", prompt=prompt, max_tokens=16)


class Scene:
    """A coordinator, one request, and members that answer when told to."""

    def __init__(self, ranks=1, request_id="r", attempt=0, core=None):
        self.core = core or SpCoordinator(ANSWER_S)
        self.members = tuple(f"w{n}" for n in range(ranks))
        self.request_id, self.attempt = request_id, attempt
        self.now_s = 0.1  # not a round number: deadlines must not depend on how a sum is rounded

    @property
    def ids(self):
        return {"request_id": self.request_id, "attempt": self.attempt}

    @property
    def state(self):
        return self.core.state_of(self.request_id, self.attempt)

    def tell(self, event):
        commands = self.core.handle(event, self.now_s)
        self.core.check()
        return commands

    def order(self, kind, epoch=0):
        if kind is FormGroup:
            return self.tell(form(spec(self.request_id, self.attempt), self.members, epoch=epoch))
        return self.tell(kind(**self.ids, epoch=epoch))

    def word(self, kind, rank=0, **fields):
        needed = {
            SegmentPaused: {"step": 10, "prefilled_tokens": 512, "pause_latency_s": 0.01},
            SegmentPrefilled: {"steps": 90, "compute_s": 2.0},
            SegmentFinished: {"finish_reason": "length", "generated": 16},
            SegmentFailed: {"reason": "out of memory"},
        }.get(kind, {})
        return self.tell(kind(worker_id=self.members[rank], **self.ids, **{**needed, **fields}))

    def words(self, kind, **fields):
        """Of all ranks, in the order in which they come: of a start, the followers' first."""
        ranks = range(len(self.members))
        return [
            said
            for rank in (reversed(ranks) if kind is SegmentRunning else ranks)
            for said in self.word(kind, rank, **fields)
        ]

    def finished(self, **fields):
        """Rank 0 has drawn the last token; the others follow."""
        out = self.word(SegmentFinished, 0, **fields)
        for rank in range(1, len(self.members)):
            out += self.word(SegmentDropped, rank)
        return out

    def pass_time(self, seconds):
        """As a shell would: the clock reads the deadline itself when it is due."""
        until_s = self.now_s + seconds
        deadline_s = self.core.next_deadline_s()
        if deadline_s is None or deadline_s > until_s + 1e-6:
            self.now_s = until_s
            return []
        self.now_s = deadline_s
        commands = self.tell(TimePassed())
        following_s = self.core.next_deadline_s()
        assert following_s is None or following_s > self.now_s, "a deadline that stays due"
        return commands

    def prefilling(self):
        self.order(FormGroup)
        self.words(SegmentLoaded)
        self.words(SegmentRunning)
        assert self.state is GroupState.PREFILLING
        return self

    def paused(self):
        self.prefilling()
        self.order(PauseGroup)
        self.words(SegmentPaused)
        assert self.state is GroupState.PAUSED
        return self

    def decoding(self):
        self.prefilling()
        self.words(SegmentPrefilled)
        assert self.state is GroupState.DECODING
        return self


def kinds(commands):
    return [type(command) for command in commands]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_life_of_a_group_with_a_pause(ranks):
    scene = Scene(ranks)
    followers = list(scene.members[1:])
    loads = scene.order(FormGroup)
    assert kinds(loads) == [LoadSegment] * ranks
    assert [(part.start, part.tokens) for load in loads for part in load.parts] == [(0, 7_000)] * ranks
    assert [load.worker_id for load in loads] == list(scene.members)
    assert all(len(load.addresses) == (ranks if ranks > 1 else 0) for load in loads)
    formed, *runs = scene.words(SegmentLoaded)
    assert type(formed) is GroupFormed
    assert [run.worker_id for run in runs] == (followers or ["w0"]), "the followers first"
    runs = scene.words(SegmentRunning)
    assert [run.worker_id for run in runs] == (["w0"] if followers else [])
    (pause,) = scene.order(PauseGroup)
    assert (type(pause), pause.worker_id, pause.step) == (PauseSegment, "w0", None), "by way of rank 0"
    *pauses, paused = scene.words(SegmentPaused, step=17)
    assert [(type(told), told.worker_id, told.step) for told in pauses] == [(PauseSegment, w, 17) for w in followers]
    assert (type(paused), paused.step, paused.pause_latency_s) == (GroupPaused, 17, 0.01)
    assert paused.prefilled_tokens == 512, "all ranks count the whole group's tokens"
    assert [run.worker_id for run in scene.order(ResumeGroup)] == (followers or ["w0"])
    assert kinds(scene.words(SegmentRunning)) == [RunSegment, GroupResumed][0 if followers else 1 :]
    (finished,) = scene.words(SegmentPrefilled)
    assert type(finished) is GroupPrefillFinished
    assert finished.compute_s == 2.0
    assert scene.core.driving() == (("r", 0),)
    *drops, end = scene.finished()
    assert [(type(drop), drop.worker_id) for drop in drops] == [(DropSegment, w) for w in followers]
    assert (type(end), end.generated, end.finish_reason) == (GroupFinished, 16, "length")
    assert scene.core.driving() == ()
    assert scene.core.next_deadline_s() is None


def test_every_word_names_its_cause_and_orders_carry_the_epoch():
    scene = Scene()
    (load,) = scene.order(FormGroup, epoch=3)
    assert load.epoch == 3
    assert "FormGroup" in load.cause
    formed, run = scene.word(SegmentLoaded)
    assert run.epoch == 3
    assert formed.cause == run.cause
    assert "SegmentLoaded" in run.cause


def test_pause_that_meets_the_end_of_the_prefill_is_void():
    scene = Scene().prefilling()
    scene.order(PauseGroup)
    assert kinds(scene.word(SegmentPrefilled)) == [GroupPrefillFinished]
    assert scene.word(SegmentPaused) == []
    # ... and one that comes still later is answered by the same word.
    assert kinds(scene.order(PauseGroup)) == [GroupPrefillFinished]
    assert kinds(scene.order(ResumeGroup)) == [GroupPrefillFinished]
    assert kinds(scene.word(SegmentFinished)) == [GroupFinished]


def test_pause_while_forming_is_remembered_and_needs_no_step():
    scene = Scene(2)
    scene.order(FormGroup)
    assert scene.order(PauseGroup) == []
    formed, paused = scene.words(SegmentLoaded)
    assert (type(formed), type(paused), paused.step) == (GroupFormed, GroupPaused, 0)
    assert [run.worker_id for run in scene.order(ResumeGroup) + scene.words(SegmentRunning)[:1]] == ["w1", "w0"]


def test_pause_and_resume_while_forming_leave_no_trace():
    scene = Scene()
    scene.order(FormGroup)
    scene.order(PauseGroup)
    scene.order(ResumeGroup)
    assert kinds(scene.word(SegmentLoaded)) == [GroupFormed, RunSegment]


def test_resume_before_paused_is_reached_takes_effect_there():
    scene = Scene(2).prefilling()
    scene.order(PauseGroup)
    assert scene.order(ResumeGroup) == []
    assert kinds(scene.word(SegmentPaused, 0)) == [PauseSegment]
    assert kinds(scene.word(SegmentPaused, 1)) == [GroupPaused, RunSegment]
    assert kinds(scene.words(SegmentRunning)) == [RunSegment, GroupResumed]


def test_pause_while_resuming_goes_out_at_once():
    scene = Scene(3).paused()
    scene.order(ResumeGroup)
    scene.word(SegmentRunning, 1)
    (pause,) = scene.order(PauseGroup)
    assert (pause.worker_id, pause.step) == ("w0", None), "though it was not told to run yet"
    assert scene.word(SegmentRunning, 2) == [], "rank 0 is not told to run any more"
    assert kinds(scene.words(SegmentPaused, step=12)) == [PauseSegment, PauseSegment, GroupPaused]


def test_different_steps_fail_the_group_and_name_the_ranks():
    scene = Scene(3).prefilling()
    scene.order(PauseGroup)
    scene.word(SegmentPaused, 0, step=4)
    scene.word(SegmentPaused, 1, step=4)
    assert kinds(scene.word(SegmentPaused, 2, step=5)) == [DropSegment] * 3
    scene.word(SegmentFailed, 1)
    scene.word(SegmentDropped, 0)
    (failed,) = scene.word(SegmentDropped, 2)
    assert "different steps" in failed.reason


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_follower_that_prefilled_while_rank_0_stands_is_out_of_step(when):
    scene = Scene(2).prefilling()
    if when == "before":
        scene.word(SegmentPrefilled, 1)
        scene.order(PauseGroup)
        assert kinds(scene.word(SegmentPaused, 0)) == [DropSegment] * 2
    else:
        scene.order(PauseGroup)
        scene.words(SegmentPaused)
        assert kinds(scene.word(SegmentPrefilled, 1)) == [DropSegment] * 2
    assert scene.state is GroupState.DISSOLVING


def test_the_step_at_which_ranks_stopped_is_told():
    scene = Scene(3).prefilling()
    scene.order(PauseGroup)
    scene.word(SegmentPaused, 0, step=4)
    scene.word(SegmentPaused, 1, step=4)
    assert kinds(scene.word(SegmentPaused, 2, step=5)) == [DropSegment] * 3
    (failed,) = scene.words(SegmentDropped)
    assert type(failed) is GroupFailed
    assert "different steps" in failed.reason
    assert "w2" in failed.reason


@pytest.mark.parametrize("state", ["prefilling", "pausing", "followers pausing", "resuming"])
@pytest.mark.parametrize("first", [0, 1])
def test_rank_0_ends_the_prefill_whatever_the_followers_say(state, first):
    scene = Scene(3).paused() if state == "resuming" else Scene(3).prefilling()
    match state:
        case "pausing":
            scene.order(PauseGroup)
        case "resuming":
            scene.order(ResumeGroup)
            scene.words(SegmentRunning)
        case "followers pausing" if first == 0:
            scene.order(PauseGroup)
            scene.word(SegmentPaused, 0)
    if first == 1:
        assert scene.word(SegmentPrefilled, 1) == []
    assert kinds(scene.word(SegmentPrefilled, 0)) == [GroupPrefillFinished]
    assert scene.word(SegmentPaused, 2) == []
    assert scene.word(SegmentPrefilled, 1) == []
    assert kinds(scene.finished()) == [DropSegment, DropSegment, GroupFinished]


def test_first_token_that_is_the_last():
    scene = Scene().prefilling()
    (done,) = scene.word(SegmentPrefilled, finish_reason="stop")
    assert done.finish_reason == "stop"
    assert scene.state is GroupState.FINISHING
    (end,) = scene.word(SegmentFinished, finish_reason="stop", generated=1)
    assert (type(end), end.generated) == (GroupFinished, 1)


def test_a_rank_that_does_not_follow_at_the_end_is_told_to_drop():
    scene = Scene(2).decoding()
    assert kinds(scene.word(SegmentFinished, 0)) == [DropSegment]
    drop, end = scene.pass_time(ANSWER_S)
    assert (type(drop), drop.worker_id, type(end), end.generated) == (DropSegment, "w1", GroupFinished, 16)


def test_a_follower_that_fails_after_the_last_token_changes_nothing():
    scene = Scene(3).decoding()
    assert kinds(scene.word(SegmentFinished, 0)) == [DropSegment, DropSegment]
    assert scene.word(SegmentFailed, 1) == []
    assert scene.word(SegmentPrefilled, 2) == [], "said long ago"
    assert kinds(scene.word(SegmentDropped, 2)) == [GroupFinished]


@pytest.mark.parametrize("state", ["forming", "prefilling", "pausing", "paused", "resuming", "decoding"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_dissolved_in_every_state(state, ranks):
    scene = Scene(ranks)
    match state:
        case "forming":
            scene.order(FormGroup)
        case "prefilling":
            scene.prefilling()
        case "pausing":
            scene.prefilling().order(PauseGroup)
        case "paused":
            scene.paused()
        case "resuming":
            scene.paused().order(ResumeGroup)
        case "decoding":
            scene.decoding()
    assert scene.state == state
    leader_first = state == "decoding"
    drops = scene.order(DissolveGroup)
    assert [drop.worker_id for drop in drops] == list(scene.members[: 1 if leader_first else ranks])
    assert scene.order(DissolveGroup) == []
    assert scene.order(PauseGroup) == []
    *later, failed = scene.words(SegmentDropped)
    assert [drop.worker_id for drop in drops + later] == list(scene.members)
    assert (type(failed), failed.reason) == (GroupFailed, "dissolved as asked")
    assert kinds(scene.order(DissolveGroup)) == [GroupFailed]


def test_a_group_that_decodes_is_dropped_without_rank_0_if_that_does_not_answer():
    scene = Scene(3).decoding()
    scene.order(DissolveGroup)
    drops = scene.pass_time(ANSWER_S)
    assert scene.now_s < 1.0 + LEADER_FIRST_S
    assert [drop.worker_id for drop in drops] == ["w1", "w2"]
    assert scene.word(SegmentDropped, 1) == []
    assert scene.word(SegmentDropped, 2) == []
    assert kinds(scene.pass_time(ANSWER_S)) == [GroupFailed]


def test_a_rank_that_fails_while_rank_0_is_asked_first():
    scene = Scene(3).decoding()
    scene.order(DissolveGroup)
    assert scene.word(SegmentFailed, 1) == []
    assert [drop.worker_id for drop in scene.word(SegmentDropped, 0)] == ["w2"]
    assert kinds(scene.word(SegmentDropped, 2)) == [GroupFailed]


def test_words_that_cross_with_a_drop_change_nothing():
    scene = Scene(2).prefilling()
    scene.order(DissolveGroup)
    for kind in (SegmentRunning, SegmentPaused, SegmentPrefilled, SegmentFinished):
        assert scene.word(kind) == []
    assert kinds(scene.words(SegmentDropped)) == [GroupFailed]


@pytest.mark.parametrize("ranks", [1, 2])
def test_silence_after_load_fails_the_group(ranks):
    scene = Scene(ranks)
    scene.order(FormGroup)
    for rank in range(1, ranks):
        scene.word(SegmentLoaded, rank)
    assert scene.pass_time(ANSWER_S / 2) == []
    commands = scene.pass_time(ANSWER_S / 2)
    assert kinds(commands)[:ranks] == [DropSegment] * ranks
    commands += [c for rank in range(1, ranks) for c in scene.word(SegmentDropped, rank)]
    failed = commands[-1]
    assert type(failed) is GroupFailed
    assert failed.retryable
    assert "w0" in failed.reason
    assert "loading" in failed.reason
    assert "5 s" in failed.reason


def test_silence_after_pause_fails_the_group():
    scene = Scene().prefilling()
    scene.order(PauseGroup)
    assert kinds(scene.pass_time(ANSWER_S)) == [DropSegment, GroupFailed]


def test_silence_after_drop_ends_the_wait():
    scene = Scene(2).prefilling()
    scene.order(DissolveGroup)
    scene.word(SegmentDropped, 0)
    assert kinds(scene.pass_time(ANSWER_S)) == [GroupFailed]


def test_run_may_wait_behind_shorts_and_is_repeated():
    scene = Scene()
    scene.order(FormGroup)
    scene.word(SegmentLoaded)
    for _ in range(20):
        assert kinds(scene.pass_time(ANSWER_S)) == [RunSegment]
    scene.word(SegmentRunning)
    assert scene.core.next_deadline_s() is None
    assert scene.state is GroupState.PREFILLING


def test_one_failed_rank_ends_all_and_is_not_told_to_drop():
    scene = Scene(3).prefilling()
    drops = scene.word(SegmentFailed, 1, reason="KV full", retryable=False)
    assert [drop.worker_id for drop in drops] == ["w0", "w2"]
    assert scene.word(SegmentDropped, 0) == []
    (failed,) = scene.word(SegmentDropped, 2)
    assert (failed.reason, failed.retryable) == ("rank 1 (w1) failed: KV full", False)


def test_a_rank_that_was_told_by_others_to_drop_fails_the_group():
    scene = Scene(2).decoding()
    assert kinds(scene.word(SegmentDropped, 0)) == [DropSegment]
    (failed,) = scene.word(SegmentDropped, 1)
    assert "w0" in failed.reason


def test_higher_attempt_supersedes_and_its_members_hear_the_drop_first():
    first = Scene(2).prefilling()
    second = Scene(2, attempt=1, core=first.core)
    assert kinds(second.order(FormGroup)) == [DropSegment, DropSegment, LoadSegment, LoadSegment]
    assert kinds(first.words(SegmentDropped)) == [GroupFailed]
    assert kinds(second.words(SegmentLoaded)) == [GroupFormed, RunSegment]
    # The older attempt is over, whoever asks.
    assert kinds(first.order(FormGroup)) == [GroupFailed]
    assert kinds(first.order(PauseGroup)) == [GroupFailed]
    assert second.state is GroupState.PREFILLING


def test_an_older_attempt_is_ignored():
    newer = Scene(attempt=2).prefilling()
    assert Scene(attempt=1, core=newer.core).order(FormGroup) == []
    assert newer.core.driving() == (("r", 2),)


def test_orders_of_an_older_scheduler_are_ignored():
    scene = Scene()
    scene.order(FormGroup, epoch=7)
    assert scene.order(DissolveGroup, epoch=6) == []
    assert scene.state is GroupState.FORMING
    assert kinds(scene.order(DissolveGroup, epoch=8)) == [DropSegment]


def test_repeated_orders_are_answered_again():
    scene = Scene()
    scene.order(FormGroup)
    assert scene.order(FormGroup) == []
    scene.word(SegmentLoaded)
    scene.word(SegmentRunning)
    assert kinds(scene.order(FormGroup)) == [GroupFormed, GroupResumed]
    assert kinds(scene.order(ResumeGroup)) == [GroupFormed, GroupResumed]
    assert kinds(scene.core.standings()) == [GroupFormed, GroupResumed]
    scene.order(PauseGroup)
    assert scene.order(PauseGroup) == []
    scene.word(SegmentPaused)
    assert kinds(scene.order(PauseGroup)) == [GroupFormed, GroupPaused]
    scene.order(ResumeGroup)
    assert scene.core.standings() == []
    assert scene.order(ResumeGroup) == []


@pytest.mark.parametrize("kind", [PauseGroup, ResumeGroup, DissolveGroup])
def test_orders_for_an_unknown_group_are_answered(kind):
    (failed,) = Scene().order(kind)
    assert type(failed) is GroupFailed
    assert "no such group" in failed.reason


def test_a_former_coordinators_segment_is_dropped():
    scene = Scene()
    assert kinds(scene.word(SegmentPaused)) == [DropSegment]
    assert scene.word(SegmentDropped) == []
    assert scene.word(SegmentFailed) == []


@pytest.mark.parametrize(
    ("members", "addresses"),
    [
        ((), ()),
        (("w0", "w0"), ("a:1", "b:1")),
        (("w0", "w1"), ()),
        (("w0", "w1"), ("a:1", "")),
        (("w0",) * 2, ("a:1",)),
    ],
)
def test_a_group_that_cannot_be_is_refused(members, addresses):
    core = SpCoordinator(ANSWER_S)
    (failed,) = core.handle(FormGroup(spec=spec(), members=members, addresses=addresses), 0.0)
    assert type(failed) is GroupFailed
    assert not failed.retryable
    assert core.driving() == ()


def test_a_scheme_that_does_not_fit_the_group_is_refused():
    order = FormGroup(
        spec=spec(), members=("w0", "w1", "w2"), addresses=("a:1", "b:1", "c:1"), scheme=GroupScheme(per_node=2)
    )
    (failed,) = SpCoordinator(ANSWER_S).handle(order, 0.0)
    assert type(failed) is GroupFailed
    assert "3 ranks are no whole number of nodes of 2" in failed.reason
    assert not failed.retryable


def test_stop_dissolves_all_and_takes_no_more():
    core = SpCoordinator(ANSWER_S)
    scenes = [Scene(2, request_id=name, core=core).prefilling() for name in ("a", "b")]
    assert kinds(scenes[0].tell(StopAsked())) == [DropSegment] * 4
    (refused,) = Scene(request_id="c", core=core).order(FormGroup)
    assert (type(refused), refused.retryable) == (GroupFailed, True)
    for scene in scenes:
        assert kinds(scene.words(SegmentDropped)) == [GroupFailed]
    assert core.driving() == ()


def test_endings_and_stories_are_bounded():
    core = SpCoordinator(ANSWER_S)
    for number in range(ENDINGS_KEPT + 50):
        scene = Scene(request_id=f"r{number}", core=core)
        scene.order(FormGroup)
        scene.word(SegmentFailed)
    assert kinds(scene.order(PauseGroup)) == [GroupFailed]
    assert core.story("r0") == []
    assert any("out of memory" in line or "SegmentFailed" in line for line in core.story(scene.request_id))


def test_an_illegal_transition_raises_with_the_story_and_changes_nothing():
    group = Group(spec=spec(), ranks=(Rank(worker_id="w0"),), story=lambda: ["1.0 something happened"])
    with pytest.raises(InvariantViolated, match=r"forming → decoding is illegal.*\n.*something happened"):
        group.move(GroupState.DECODING)
    assert group.state is GroupState.FORMING


def test_every_state_is_reachable_and_leads_to_the_end():
    reached, frontier = {GroupState.FORMING}, [GroupState.FORMING]
    while frontier:
        for target in TRANSITIONS[frontier.pop()] - reached:
            reached.add(target)
            frontier.append(target)
    assert reached == set(GroupState)
    assert all(
        GroupState.DISSOLVING in targets
        for state, targets in TRANSITIONS.items()
        if state not in (GroupState.DISSOLVING, GroupState.GONE)
    )


# --- random schedules ------------------------------------------------------------------------------


class Member:
    """A worker that does as told, answers late, and may die. It is at the step of its group: rank 0's, whom the
    others follow within the step."""

    def __init__(self, worker_id):
        self.worker_id = worker_id
        self.alive = True
        self.inbox = []
        self.held = {}

    def obey(self, order, steps):
        ids = {"worker_id": self.worker_id}
        spec_ = getattr(order, "spec", None)
        key = (spec_.request_id, spec_.attempt) if spec_ else (order.request_id, order.attempt)
        ids |= {"request_id": key[0], "attempt": key[1]}
        phase = self.held.get(key)
        match order:
            case LoadSegment():
                self.held[key] = "loaded"
                return SegmentLoaded(**ids)
            case DropSegment():
                self.held.pop(key, None)
                return SegmentDropped(**ids)
            case _ if phase is None:
                return SegmentFailed(**ids, reason="not held")
            case _ if phase == "decoding":
                return SegmentPrefilled(**ids, steps=99, compute_s=1.0)
            case RunSegment():
                self.held[key] = "running"
                return SegmentRunning(**ids)
            case PauseSegment():
                self.held[key] = "paused"
                return SegmentPaused(**ids, step=steps.get(key, 0), prefilled_tokens=0, pause_latency_s=0.0)


REQUESTS = ["a", "b"]
WORKERS = ["w0", "w1", "w2", "w3"]


class CoordinatorMachine(RuleBasedStateMachine):
    """Orders in any sequence, answers in any interleaving (in order per worker), dead workers, repeats."""

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed):
        self.random = random.Random(seed)
        self.core = SpCoordinator(ANSWER_S)
        self.members = {name: Member(name) for name in WORKERS}
        self.outbox = {name: [] for name in WORKERS}
        self.steps = {}
        self.attempts = dict.fromkeys(REQUESTS, -1)
        self.formed_with = {}
        self.endings = {}
        self.open_pauses = {}
        self.now_s = 0.0

    def feed(self, event):
        for command in self.core.handle(event, self.now_s):
            if isinstance(command, LoadSegment | RunSegment | PauseSegment | DropSegment):
                self.members[command.worker_id].inbox.append(command)
                if isinstance(command, RunSegment):
                    self.require_followers_first(command)
                continue
            key = (command.request_id, command.attempt)
            if isinstance(command, GroupPaused):
                self.require_still(key)
            if isinstance(command, GroupFinished | GroupFailed):
                before = self.endings.setdefault(key, command)
                assert type(before) is type(command)
            if not isinstance(command, GroupFormed | GroupResumed):
                self.open_pauses.pop(key, None)

    def require_followers_first(self, order):
        key = (order.request_id, order.attempt)
        leader, *followers = (self.members[name] for name in self.formed_with[key])
        if order.worker_id == leader.worker_id:
            for member in followers:
                assert not member.alive or member.held[key] in ("running", "decoding"), "rank 0 runs alone"

    def require_still(self, key):
        for member in (self.members[name] for name in self.formed_with[key]):
            assert not member.alive or member.held[key] in ("loaded", "paused", "decoding"), "a rank goes on"

    @rule(request_id=st.sampled_from(REQUESTS))
    def advance(self, request_id):
        """A step, for which all ranks are needed."""
        key = (request_id, self.attempts[request_id])
        ranks = [self.members[name] for name in self.formed_with.get(key, ())]
        if ranks and all(member.held.get(key) == "running" for member in ranks):
            self.steps[key] = self.steps.get(key, 0) + 1

    @rule(request_id=st.sampled_from(REQUESTS), ranks=st.integers(1, 4))
    def form(self, request_id, ranks):
        if sum(1 for key in self.core.driving() if key[0] == request_id) > 2:
            return
        self.attempts[request_id] += 1
        key = (request_id, self.attempts[request_id])
        members = tuple(WORKERS[:ranks])
        self.formed_with[key] = members
        self.feed(form(spec(*key), members))

    @rule(request_id=st.sampled_from(REQUESTS), kind=st.sampled_from([PauseGroup, ResumeGroup, PauseGroup]))
    def order(self, request_id, kind):
        key = (request_id, self.attempts[request_id])
        if key in self.formed_with:
            if kind is PauseGroup and key not in self.endings:
                self.open_pauses[key] = True
            else:
                self.open_pauses.pop(key, None)
            self.feed(kind(request_id=key[0], attempt=key[1]))

    @rule(request_id=st.sampled_from(REQUESTS))
    def dissolve(self, request_id):
        key = (request_id, self.attempts[request_id])
        if key in self.formed_with:
            self.feed(DissolveGroup(request_id=key[0], attempt=key[1]))

    @rule(worker=st.sampled_from(WORKERS))
    def obey(self, worker):
        member = self.members[worker]
        if member.inbox:
            order = member.inbox.pop(0)
            if member.alive and (answer := member.obey(order, self.steps)) is not None:
                self.outbox[worker].append(answer)

    @rule(worker=st.sampled_from(WORKERS))
    def hear(self, worker):
        if self.outbox[worker]:
            self.feed(self.outbox[worker].pop(0))

    @rule(request_id=st.sampled_from(REQUESTS))
    def finish_prefill(self, request_id):
        key = (request_id, self.attempts[request_id])
        ranks = [self.members[name] for name in self.formed_with.get(key, ())]
        if ranks and all(member.held.get(key) == "running" and member.alive for member in ranks):
            for member in ranks:
                member.held[key] = "decoding"
                self.outbox[member.worker_id].append(
                    SegmentPrefilled(
                        worker_id=member.worker_id, request_id=key[0], attempt=key[1], steps=9, compute_s=1
                    )
                )

    @rule(request_id=st.sampled_from(REQUESTS))
    def finish(self, request_id):
        key = (request_id, self.attempts[request_id])
        ranks = [self.members[name] for name in self.formed_with.get(key, ())]
        if ranks and all(member.held.get(key) == "decoding" and member.alive for member in ranks):
            leader = ranks[0]
            del leader.held[key]
            self.outbox[leader.worker_id].append(
                SegmentFinished(
                    worker_id=leader.worker_id, request_id=key[0], attempt=key[1], finish_reason="length", generated=16
                )
            )

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker):
        if sum(member.alive for member in self.members.values()) > 1:
            self.members[worker].alive = False
            self.members[worker].held.clear()

    @precondition(lambda self: self.core.next_deadline_s() is not None)
    @rule()
    def wait(self):
        self.now_s = max(self.now_s, self.core.next_deadline_s())
        self.feed(TimePassed())

    @invariant()
    def consistent(self):
        if hasattr(self, "core"):
            self.core.check()

    def teardown(self):
        """Everything is heard and dissolved: then nothing is driven, held or owed."""
        if not hasattr(self, "core"):
            return
        for key in self.core.driving():
            self.feed(DissolveGroup(request_id=key[0], attempt=key[1]))
        for _ in range(1_000):
            busy = False
            for name in WORKERS:
                while self.members[name].inbox:
                    busy = True
                    self.obey(name)
                while self.outbox[name]:
                    busy = True
                    self.hear(name)
            if not busy and self.core.next_deadline_s() is not None:
                busy = True
                self.wait()
            if not busy:
                break
        self.core.check()
        assert self.core.driving() == ()
        assert set(self.endings) == set(self.formed_with)
        assert not self.open_pauses, "a pause was never answered"
        for member in self.members.values():
            assert member.held == {}


CoordinatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRandomSchedules = CoordinatorMachine.TestCase
