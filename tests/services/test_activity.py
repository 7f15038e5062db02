"""The page's lanes, folded from messages: golden scenarios, disorder, bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router import activity as module
from services.router.activity import SEGMENTS_MAX, Activity
from services.router.activity_times import SAMPLES_MAX, WINDOW_S, FirstTokens
from tests.services.activity_scenario import MAKERS, Player, replay, request_view, view

SCENARIOS = sorted((Path(__file__).parent / "golden_activity").glob("*.txt"))
LONG = [request_view("L", "long", "running", "p1")]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    answered = replay(text)
    if request.config.getoption("--golden-write"):
        path.write_text(answered, encoding="utf-8")
        return
    assert answered == text, f"{path.name} differs; review `pytest --golden-write` and its diff"


def play(*lines: str) -> tuple[Player, list[str]]:
    player = Player()
    told = [row for line in lines for row in player.play(line)]
    return player, told


def open_kinds(activity: Activity) -> list[tuple[str, str]]:
    return [(lane.worker_id, span.kind) for lane in activity._lanes.values() for span in lane.open.values()]


def test_a_pause_is_a_gap_between_two_parts_of_a_long():
    player, _ = play(
        "0 form L on=p1 tokens=7000",
        "1 running L on=p1",
        "2 paused L on=p1 done=3000",
        "2.5 running L on=p1",
        "4 segment-prefilled L on=p1",
    )
    rows = [(row.kind, row.begin_s, row.end_s) for row in player.activity.whole(5.0).segments]
    assert rows == [
        ("forming", 0.0, 1.0),
        ("part", 1.0, 2.0),
        ("pause", 2.0, 2.5),
        ("part", 2.5, 4.0),
        ("long_decode", 4.0, None),
    ]


def test_a_prefill_is_as_long_as_its_worker_says_and_begins_no_earlier_than_its_order():
    _, told = play("1 run a on=p1", "2 prefilled a on=p1 waited=0.2 in_worker=0.5 compute=0.1")
    assert "→ p1 prefill a 1.7–2 100" in told
    _, told = play("1 run a on=p1", "2 prefilled a on=p1 in_worker=9 compute=9")
    assert "→ p1 prefill a 1–2 100" in told


def test_time_to_first_token_is_counted_once_and_not_for_what_was_submitted_unheard():
    player, _ = play(
        "0 submitted a",
        "0.1 submitted a",
        "0.2 run a on=p1",
        "0.5 prefilled a on=p1 in_worker=0.1",
        "0.6 submitted a attempt=1 before=3",
        "0.7 run a on=p2 attempt=1",
        "9.0 prefilled a on=p2 in_worker=0.1 attempt=1",
        "9.1 run b on=p1",
        "9.2 prefilled b on=p1 in_worker=0.1",
        "9.3 submitted L tokens=9000",
        "9.4 form L on=p1",
        "12.3 group-prefilled L",
        "13 view p1=",
    )
    assert list(player.activity.history)[-1].short_ttft_p99_s == 0.5
    assert list(player.activity.history)[-1].long_ttft_p99_s == 3.0


def test_a_handoff_whose_end_is_heard_with_its_begin_is_still_one():
    _, told = play("1 run a on=p1", "2 prefilled a on=p1 in_worker=0.1", "2 released a on=p1")
    assert "→ p1 handoff a 2–2.0001 d1" in told


def test_a_submission_that_is_heard_after_its_order_counts_and_is_told():
    player, told = play(
        "1 run a on=p1",
        "1.001 submitted a",
        "1.2 prefilled a on=p1 in_worker=0.1",
        "2 form L on=p1",
        "2.001 submitted L tokens=5000",
        "2.1 running L on=p1",
        "3 view p1=L",
    )
    assert "→ request a short 100 1.001" in told
    assert "→ request L long 100 2.001" in told
    assert list(player.activity.history)[-1].short_ttft_p99_s == 0.199


def test_a_new_page_is_told_what_goes_on_and_what_ended_within_the_last_minute():
    player, _ = play(
        "0 run old on=p1 to=p1",
        "1 prefilled old on=p1 in_worker=0.5",
        "2 decoded old on=p1",
        "3 form L on=p1",
        "3 running L on=p1",
        "100 run new on=p1",
    )
    whole = player.activity.whole(101.0)
    assert {row.request_id for row in whole.requests} == {"L", "new"}
    assert [row.kind for row in whole.segments if row.end_s is None] == ["part", "waiting"]


def test_a_view_that_is_older_than_what_was_heard_changes_nothing():
    player, _ = play("0 view p1=", "9 form L on=p1", "9.5 running L on=p1", "9.6 paused L on=p1")
    player.activity.reconcile(view({"p1": ""}, LONG), 10.0)
    assert open_kinds(player.activity) == [("p1", "pause")]
    player.activity.reconcile(view({"p1": "L"}, LONG), 12.0)  # for longer than the grace: then the word was lost
    assert open_kinds(player.activity) == [("p1", "part")]


def test_what_is_unchanged_is_not_told_again():
    player, _ = play("0 run a on=p1")
    assert not player.activity.is_changed
    assert player.activity.take_change(1.0).segments == ()
    assert player.play("2 released unknown on=p1") == []


def test_everything_kept_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REQUESTS_MAX", 50)
    monkeypatch.setattr(module, "LANES_MAX", 20)
    player = Player()
    for i in range(SEGMENTS_MAX + 100):
        player.play(f"{i} run r{i} on=p1")
        player.play(f"{i}.5 prefilled r{i} on=p1 in_worker=0.1")
        player.play(f"{i}.6 run q{i} on=w{i}")
    activity = player.activity
    assert len(activity._requests) == 50
    assert len(activity._lanes) == 20
    assert all(len(lane.ended) <= SEGMENTS_MAX for lane in activity._lanes.values())
    assert len(activity._changed) == 0


def test_p99_is_of_the_last_minute_and_of_one_class():
    times = FirstTokens()
    assert times.p99_s("short", 0.0) is None
    for i in range(1, 201):
        times.add("short", 1.0, i / 1_000)
    assert times.p99_s("short", 2.0) == 0.198
    assert times.p99_s("long", 2.0) is None
    assert times.p99_s("short", 1.1 + WINDOW_S) is None
    for _ in range(SAMPLES_MAX + 10):
        times.add("short", 100.0, 1.0)
    assert len(times._samples["short"]) == SAMPLES_MAX


VERBS = st.sampled_from(sorted(set(MAKERS) - {"form", "left"}))
LINES = st.one_of(
    st.builds(
        lambda verb, name, worker, to, attempt: f"{verb} {name} on={worker} to={to} attempt={attempt}",
        VERBS,
        st.sampled_from("abL"),
        st.sampled_from(["p1", "p2", "d1"]),
        st.sampled_from(["p1", "d1", "d2"]),
        st.integers(0, 1),
    ),
    st.sampled_from(["form L on=p1,p2", "left p1", "left d1", "silence", "view p1=a d1=", "view p1=L p2=L,b d2=b"]),
)


@given(st.lists(st.tuples(LINES, st.floats(0.0, 3.0)), max_size=40))
@settings(max_examples=150, deadline=None)
def test_whatever_is_heard_in_whatever_order_a_segment_ends_once_and_after_it_began(lines: list[tuple[str, float]]):
    player, now_s, open_rows = Player(), 0.0, dict[int, tuple[int, int]]()
    ended: set[int] = set()
    for line, wait_s in lines:
        now_s += wait_s
        player.play(f"{now_s} {line}")
        whole = player.activity.whole(now_s)
        open_rows = {row.segment: (row.lane, row.request) for row in whole.segments if row.end_s is None}
        assert not ended & open_rows.keys(), "what ended goes on"
        assert len(set(open_rows.values())) == len(open_rows), "a request does two things at once on one worker"
        ended |= {row.segment for row in whole.segments if row.end_s is not None}
        assert all(row.end_s >= row.begin_s for row in whole.segments if row.end_s is not None)
    kept = {id(span) for request in player.activity._requests.values() for span in request.open.values()}
    assert {id(span) for lane in player.activity._lanes.values() for span in lane.open.values()} == kept
