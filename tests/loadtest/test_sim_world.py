from __future__ import annotations

import dataclasses
import itertools
import random
from heapq import heappop

import pytest

from common.messages.cluster import StepCost
from common.policy.cost_model import StepCostModel
from common.policy.processors import Link
from common.policy.scheduler_config import SchedulerConfig
from loadtest.simulator.costs import SoloCosts
from loadtest.simulator.decode_batch import DecodeBatch
from loadtest.simulator.errors import SimulationError
from loadtest.simulator.group import Group
from loadtest.simulator.job import Job
from loadtest.simulator.kv_books import KvBooks
from loadtest.simulator.replica import Replica
from loadtest.simulator.result import SimResult
from loadtest.simulator.scenario import PRESETS
from loadtest.simulator.timeline import Countdown, Timeline
from loadtest.simulator.usage import Usage, is_denied
from loadtest.simulator.world import ClusterShape, World, simulate
from tests.loadtest.sim_cluster import (
    DECODE_S,
    HOP_S,
    LAYERS,
    LONG_CHUNK_S,
    LONG_DECODE_S,
    LONG_STEP_S,
    LONG_TOKEN_S,
    PASS_S,
    ROW_S,
    TOKEN_S,
    TRANSFER_S,
    build,
    events,
    outcomes,
    run,
    workload,
)

LONG = 5_000
PREFILL_S = LONG_TOKEN_S * LONG
ORDERED_S = 2 * HOP_S
"""From arrival to the worker's receipt of its order, if nothing is in the way: router, scheduler, worker."""
FORMED_S = 3 * HOP_S
"""From arrival to the start of a long on idle replicas: router, scheduler, coordinator, worker."""


def step_s(rows: int) -> float:
    return DECODE_S + ROW_S * rows


def run_all(timeline: Timeline) -> None:
    while timeline.heap:
        timeline.now_s, _, do, what = heappop(timeline.heap)
        do(what)


# --- time ------------------------------------------------------------------------------------------


def test_entries_at_the_same_time_come_in_the_order_they_were_made():
    timeline, seen = Timeline(), []
    for name in ("first", "second", "third"):
        timeline.at(1.0, seen.append, name)
    timeline.at(0.5, seen.append, "before")
    run_all(timeline)
    assert seen == ["before", "first", "second", "third"]
    assert timeline.now_s == 1.0


def test_a_countdown_ends_when_its_work_is_done_at_whatever_rates():
    timeline, ends = Timeline(), []
    countdown = Countdown(timeline, 10.0, lambda: ends.append(timeline.now_s))
    countdown.set_rate(1.0)
    timeline.at(4.0, countdown.set_rate, 0.0)  # 6 left
    timeline.at(9.0, countdown.set_rate, 0.5)  # 4 left at 13
    timeline.at(13.0, countdown.set_rate, 2.0)
    run_all(timeline)
    assert ends == [pytest.approx(15.0)]


def test_a_countdown_makes_no_entry_where_its_end_moves_away():
    timeline = Timeline()
    countdown = Countdown(timeline, 10.0, lambda: None)
    countdown.set_rate(1.0)
    entries = len(timeline.heap)
    for _ in range(50):
        countdown.set_rate(0.0)
        countdown.set_rate(0.9)
    assert len(timeline.heap) == entries


def job(name: str, tokens: int, output: int) -> Job:
    world = build()
    world._arrivals = workload((0.0, tokens, output)).arrivals
    world._arrive(0)
    made = world._jobs["r0"]
    made.request_id = name
    return made


def test_the_virtual_token_clock_agrees_with_counting_tokens():
    """Rows join at random times; each ends when, counted in the small, it has had its tokens."""
    rng = random.Random(7)
    step_of = [0.0, *(0.01 + 0.003 * rows for rows in range(1, 20))]
    joins = sorted((rng.uniform(0.0, 2.0), rng.randint(1, 60)) for _ in range(12))
    counted: dict[int, float] = {}
    left: dict[int, float] = {}
    now, tick = 0.0, 2e-5
    waiting = list(enumerate(joins))
    while waiting or left:
        while waiting and waiting[0][1][0] <= now:
            number, (_, tokens) = waiting.pop(0)
            left[number] = float(tokens)
        done = tick / step_of[len(left)] if left else 0.0
        now += tick
        for number in list(left):
            left[number] -= done
            if left[number] <= 0.0:
                counted[number] = now
                del left[number]

    batch, ends = DecodeBatch(), {}
    jobs = [job(f"j{number}", 10, 2) for number in range(len(joins))]
    waiting = list(enumerate(joins))
    while waiting or batch:
        join_s = waiting[0][1][0] if waiting else float("inf")
        now = min(join_s, batch.next_end_s())
        batch.advance(now)
        for finished in batch.take_finished():
            ends[int(finished.request_id[1:])] = now
        if now == join_s:
            number, (_, tokens) = waiting.pop(0)
            batch.join(jobs[number], 10, tokens)
        batch.step_s = step_of[len(batch)] or float("inf")
    assert ends.keys() == counted.keys()
    assert all(ends[n] == pytest.approx(counted[n], abs=0.005) for n in ends)


def test_kv_of_a_batch_grows_with_its_tokens_and_leaves_with_its_rows():
    batch = DecodeBatch()
    first, second = job("a", 100, 11), job("b", 50, 5)
    batch.join(first, 100, 10)
    assert batch.kv_tokens == 105  # taken halfway to the next end
    batch.step_s = 1.0
    batch.advance(0.0)
    batch.advance(6.0)
    batch.join(second, 50, 2)
    assert batch.kv_tokens == (100 + 6) + 50 + 2 * 1
    batch.leave(first)
    assert batch.kv_tokens == 50 + 1
    batch.advance(8.0)
    assert [row.request_id for row in batch.take_finished()] == ["b"]
    assert len(batch) == 0
    assert batch.kv_tokens == 0


# --- shorts ----------------------------------------------------------------------------------------


def lone_replica(*tokens: int, **config: object) -> tuple[Replica, list[Job]]:
    """A replica and shorts for it; what it tells the scheduler is heard by nobody."""
    world = build(**config)
    world._site.hear = lambda words: None
    replica = world._replicas["p0"]
    jobs = [job(f"j{number}", length, 2) for number, length in enumerate(tokens)]
    for each in jobs:
        each.decode_worker_id = "d1"
        world._decoders["d1"].kv.reserve(each.request_id, each.spec.kv_tokens)
    return replica, jobs


def test_a_short_alone_takes_hops_a_pass_one_layer_of_transfer_and_its_steps():
    (short,) = outcomes([(1.0, 300, 11)])
    started = 1.0 + ORDERED_S
    first_token = started + PASS_S + 300 * TOKEN_S
    assert short.prefill_started_s == pytest.approx(started)
    assert short.first_token_s == pytest.approx(first_token)
    assert short.finished_s == pytest.approx(first_token + TRANSFER_S / LAYERS + 10 * step_s(1))
    assert short.queueing_delay_s == pytest.approx(ORDERED_S)
    assert not short.long
    assert short.sched_s > 0.0


def test_the_scheduler_hears_of_a_short_what_workers_say_in_their_order():
    result = run([(1.0, 300, 11)], record=True)
    assert [name for name in events(result, "r0") if name != "→ SaveRequest"] == [
        "RequestSubmitted",
        "→ RequestAccepted",
        "→ ExpectKv",
        "→ RunPrefill",
        "PrefillFinished",
        "KvReleased",
        "DecodeFinished",
        "→ ForgetRequest",
    ]


def test_a_short_whose_first_token_is_its_last_is_handed_over_to_nobody():
    result = run([(0.0, 300, 1)], record=True)
    (short,) = result.outcomes
    assert short.finished_s == short.first_token_s
    heard = [name for name in events(result, "r0") if not name.startswith("→")]
    assert heard[:3] == ["RequestSubmitted", "PrefillFinished", "KvReleased"]
    assert "DecodeFinished" not in heard
    assert "→ DropRequest" in events(result, "r0")
    assert result.replica_busy_s["d1"] == 0.0


def test_shorts_are_packed_into_passes_and_a_longer_one_goes_alone():
    replica, jobs = lone_replica(900, 100, 250, 100, batch_tokens_max=400)
    for each in jobs:
        replica.take(each)
    run_all(replica._site.timeline)
    first, *others = jobs
    assert first.first_token_s == pytest.approx(PASS_S + 900 * TOKEN_S)
    packed_s = first.first_token_s + PASS_S + 350 * TOKEN_S
    assert [other.first_token_s for other in others[:2]] == [pytest.approx(packed_s)] * 2
    assert others[2].prefill_started_s == others[1].first_token_s, "450 tokens do not fit into one pass"
    assert others[2].first_token_s == pytest.approx(packed_s + PASS_S + 100 * TOKEN_S)


def test_rows_of_a_decode_worker_slow_each_other_down():
    alone = outcomes([(0.0, 100, 101)])[0]
    both = outcomes([(0.0, 100, 101), (0.5, 100, 21)])
    slowed_s = both[0].finished_s - alone.finished_s
    assert slowed_s == pytest.approx(20 * ROW_S, abs=1e-6)


# --- longs -----------------------------------------------------------------------------------------


def test_a_long_alone_prefills_and_decodes_on_its_group():
    result = run([(0.0, LONG, 11)], prefill=4, degree=4, record=True)
    (long,) = result.outcomes
    assert long.long
    assert long.prefill_started_s == pytest.approx(FORMED_S)
    assert long.first_token_s == pytest.approx(FORMED_S + PREFILL_S / 4)
    assert long.finished_s == pytest.approx(long.first_token_s + 10 * LONG_DECODE_S)
    assert [e for e in events(result, "r0") if not e.startswith("→")] == [
        "RequestSubmitted",
        "GroupFormed",
        "GroupPrefillFinished",
        "GroupFinished",
    ]
    busy_s = long.finished_s - long.prefill_started_s
    assert all(result.replica_busy_s[f"p{n}"] == pytest.approx(busy_s) for n in range(4))


def test_a_pause_takes_at_most_a_step_and_costs_the_long_just_its_length():
    alone = outcomes([(0.0, LONG, 11)])[0]
    for seed in range(5):
        result = run([(0.0, LONG, 11), (1.0, 300, 2)], seed=seed, record=True)
        long, short = result.outcomes
        told_s = 1.0 + 3 * HOP_S
        assert told_s <= short.prefill_started_s <= told_s + LONG_STEP_S
        assert long.pauses == 1
        assert long.suspended_s >= PASS_S + 300 * TOKEN_S
        assert long.jct_s - alone.jct_s == pytest.approx(long.suspended_s)
        assert [e for e in events(result, "r0") if "Pause" in e or "Resume" in e] == [
            "→ PauseGroup",
            "GroupPaused",
            "→ ResumeGroup",
            "GroupResumed",
        ]
    assert result.counters["pauses"] == 1


def test_a_pause_stops_every_member_and_shorts_run_on_all_of_them():
    result = run([(0.0, LONG, 11), (1.0, 390, 2), (1.0, 390, 2)], prefill=2, degree=2, record=True)
    long, *shorts = result.outcomes
    lanes = {span.lane for span in result.spans if span.kind == "short prefill"}
    assert lanes == {"p0", "p1"}
    assert long.pauses == 1
    paused = [span for span in result.spans if span.kind == "paused"]
    assert {span.lane for span in paused} == {"p0", "p1"}
    assert all(span.begin_s <= short.prefill_started_s <= span.end_s for span in paused for short in shorts)


def test_a_pause_that_meets_the_end_of_the_prefill_is_void():
    last_moment_s = FORMED_S + PREFILL_S - 3 * HOP_S - 0.0002
    result = run([(0.0, LONG, 11), (last_moment_s, 300, 2)], pause_remaining_min_s=0.0, record=True)
    long, short = result.outcomes
    assert "→ PauseGroup" in events(result, "r0")
    assert "GroupPaused" not in events(result, "r0")
    assert long.pauses == 0
    assert long.first_token_s == pytest.approx(FORMED_S + PREFILL_S)
    assert short.prefill_started_s == pytest.approx(long.first_token_s)


def test_what_is_queued_on_a_replica_goes_before_a_long_that_comes_later_and_nothing_else():
    replica, (running, queued, later) = lone_replica(900, 300, 200)
    long = job("long", LONG, 2)
    timeline = replica._site.timeline
    group = Group(replica._site, long, (replica,))
    timeline.at(0.00, replica.take, running)
    timeline.at(0.01, replica.take, queued)
    timeline.at(0.02, Group.form, group)
    timeline.at(0.03, replica.take, later)
    run_all(timeline)
    assert queued.prefill_started_s == running.first_token_s
    assert long.prefill_started_s == pytest.approx(queued.first_token_s)
    assert later.prefill_started_s == pytest.approx(long.first_token_s)


def test_a_long_starts_when_the_last_of_its_members_is_free_and_goes_on_likewise():
    replica, (first, second) = lone_replica(900, 900)
    site = replica._site
    other = Replica(site, "p9", "n0", 100_000, replica._decoders)
    long = job("long", LONG, 2)
    group = Group(site, long, (replica, other))
    timeline = site.timeline
    timeline.at(0.00, replica.take, first)
    timeline.at(0.01, Group.form, group)
    timeline.at(1.00, Group.pause, group)
    timeline.at(1.20, other.take, second)
    timeline.at(1.21, Group.resume, group)
    run_all(timeline)
    assert long.prefill_started_s == pytest.approx(first.first_token_s)
    assert second.prefill_started_s == pytest.approx(1.20)
    ran_s = PREFILL_S / 2
    assert long.first_token_s == pytest.approx(long.prefill_started_s + ran_s + long.suspended_s)
    assert 1.0 <= second.first_token_s - long.suspended_s <= 1.0 + LONG_STEP_S


def test_a_dissolved_group_leaves_its_members_free():
    replica, (short,) = lone_replica(300)
    long = job("long", LONG, 2)
    group = Group(replica._site, long, (replica,))
    timeline = replica._site.timeline
    timeline.at(0.0, Group.form, group)
    timeline.at(0.5, replica.take, short)
    timeline.at(1.0, Group.dissolve, group)
    run_all(timeline)
    assert long.first_token_s is None
    assert short.prefill_started_s == pytest.approx(1.0)
    assert replica.busy_s == pytest.approx(1.0 + PASS_S + 300 * TOKEN_S)


def test_decodes_of_a_long_share_their_steps_with_shorts_or_stand_still():
    output = 101
    decode_s = (output - 1) * LONG_DECODE_S
    at_s = FORMED_S + PREFILL_S + 0.5
    short_tokens = 250  # three steps of at most 100 tokens
    shared = run([(0.0, LONG, output), (at_s, short_tokens, 2)], record=True)
    long, short = shared.outcomes
    assert shared.counters["placed_colocate"] == 1
    # a member's own part of the step is DECODE_S + ROW_S; what it adds is the tokens
    full_s, last_s = LONG_DECODE_S + 100 * TOKEN_S, LONG_DECODE_S + 50 * TOKEN_S
    pass_s = 2 * full_s + last_s
    assert short.first_token_s - short.prefill_started_s == pytest.approx(pass_s)
    gained = 3  # tokens of the long during the pass
    assert long.finished_s - long.first_token_s == pytest.approx(decode_s + pass_s - gained * LONG_DECODE_S)

    apart = run([(0.0, LONG, output), (at_s, short_tokens, 2)], colocation=False)
    long, short = apart.outcomes
    pass_s = PASS_S + short_tokens * TOKEN_S
    assert short.first_token_s - short.prefill_started_s == pytest.approx(pass_s)
    assert long.finished_s - long.first_token_s == pytest.approx(decode_s + pass_s)


def test_a_long_that_prefills_where_another_decodes_alternates_with_it():
    output = 1_001
    first, second = outcomes([(0.0, LONG, output), (0.001, LONG, 2)], long_order="arrival")
    step_alone_s = DECODE_S + ROW_S
    rate = LONG_CHUNK_S / (LONG_CHUNK_S + step_alone_s)
    assert second.first_token_s - second.prefill_started_s == pytest.approx(PREFILL_S / rate)
    meanwhile_s = second.first_token_s - second.prefill_started_s
    gained = meanwhile_s / (LONG_DECODE_S + LONG_CHUNK_S)
    between_s = second.prefill_started_s - first.first_token_s
    # after the second's prefill both decode for a moment, in shared steps: one row more
    last_s = second.finished_s - second.first_token_s
    rest = 1_000 - gained - between_s / LONG_DECODE_S - last_s / (LONG_DECODE_S + ROW_S)
    ended = second.finished_s + rest * LONG_DECODE_S
    assert first.finished_s == pytest.approx(ended, abs=LONG_DECODE_S)


def test_without_disaggregation_a_short_decodes_where_it_prefilled():
    result = run([(0.0, 300, 11)], decode=0, disaggregation=False, record=True)
    (short,) = result.outcomes
    assert short.failure is None
    assert short.finished_s == pytest.approx(short.first_token_s + 10 * step_s(1))
    assert "→ ExpectKv" not in events(result, "r0")
    assert [e for e in events(result, "r0") if not e.startswith("→")] == [
        "RequestSubmitted",
        "PrefillFinished",
        "DecodeFinished",
    ]


def test_without_disaggregation_nobody_misses_a_decode_worker():
    late_s = SchedulerConfig().no_worker_s + 2.0
    (short,) = outcomes([(late_s, 300, 11)], decode=0, disaggregation=False)
    assert short.failure is None
    assert short.finished_s is not None
    (refused,) = outcomes([(late_s, 300, 11)], decode=0)
    assert "no decode worker" in refused.failure


def test_without_disaggregation_prefills_share_the_steps_of_what_decodes():
    first, second = outcomes([(0.0, 100, 101), (0.5, 300, 2)], decode=0, disaggregation=False)
    pass_s = DECODE_S + ROW_S + 300 * TOKEN_S
    assert second.first_token_s - second.prefill_started_s == pytest.approx(pass_s)
    # the first gained one token in that pass, and one in a step of two rows
    slowed_s = (pass_s - step_s(1)) + (step_s(2) - step_s(1))
    assert first.finished_s - first.first_token_s == pytest.approx(100 * step_s(1) + slowed_s)


# --- the run ---------------------------------------------------------------------------------------


def serve_at_random(world: World, seed: int) -> SimResult:
    """A hundred requests: all end well, and nothing is held anywhere."""
    arrivals = [(at_s * 4, tokens, output) for at_s, tokens, output in random_arrivals(100, seed=seed)]
    result = world.run(workload(*arrivals))
    assert not result.stalled
    assert [outcome.failure for outcome in result.outcomes] == [None] * 100
    for worker in (*world._replicas.values(), *world._decoders.values()):
        assert worker.kv._held == {}
    assert all(not worker.held for worker in world._core.cluster.workers())
    return result


def random_arrivals(count: int, seed: int, *, longs: float = 0.1) -> list[tuple[float, int, int]]:
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(20.0)
        long = rng.random() < longs
        arrivals.append((now, rng.randint(2_000, 8_000) if long else rng.randint(10, 900), rng.randint(1, 40)))
    return arrivals


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"colocation": False},
        {"preemption": False},
        {"disaggregation": False, "prefill": 8, "decode": 0},
        {"policy": "fifo"},
        {"policy": "reservation", "reserved_long_tokens": 8_000},
        {"policy": "priority"},
    ],
)
def test_everything_ends_nothing_is_held_and_the_books_are_exact_throughout(switches):
    world = build(**{"prefill": 6, "decode": 2, "per_node": 4, "degree": 2, **switches})
    result = world.run(workload(*random_arrivals(100, seed=3)))
    assert not result.stalled
    assert [outcome.failure for outcome in result.outcomes] == [None] * 100
    for outcome in result.outcomes:
        assert outcome.arrived_s < outcome.prefill_started_s < outcome.first_token_s <= outcome.finished_s
    for worker in (*world._replicas.values(), *world._decoders.values()):
        assert worker.kv._held == {}
    assert not world._core.cluster.requests
    assert all(not worker.held for worker in world._core.cluster.workers())
    assert result.counters["finished"] == 100
    assert result.counters.get("pauses", 0) == sum(outcome.pauses for outcome in result.outcomes)


def test_the_same_seed_gives_a_byte_identical_log_and_another_seed_another():
    arrivals = random_arrivals(60, seed=5)
    logs = [run(arrivals, prefill=3, decode=1, seed=seed, record=True).event_log for seed in (1, 1, 2)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2], "pauses end at other moments"
    assert logs[0].count(b"\n") > 60 * 10
    without = run(arrivals, prefill=3, decode=1, seed=1)
    assert without.event_log == b""
    assert without.spans == []


def test_recording_changes_nothing():
    arrivals = random_arrivals(80, seed=6)
    plain, recorded = (run(arrivals, prefill=3, decode=1, record=record) for record in (False, True))
    assert [o.finished_s for o in plain.outcomes] == [o.finished_s for o in recorded.outcomes]


def test_a_lane_of_prefills_never_does_two_things_at_once():
    result = run(random_arrivals(150, seed=8), prefill=4, decode=1, per_node=5, degree=2, record=True)
    for lane in {span.lane for span in result.spans if not span.lane.endswith("decode")}:
        spans = [span for span in result.spans if span.lane == lane and span.kind != "paused"]
        spans.sort(key=lambda span: span.begin_s)
        for before, after in itertools.pairwise(spans):
            assert after.begin_s >= before.end_s - 1e-9, (before, after)


def test_what_the_scheduler_refuses_is_a_failed_outcome_with_the_reason():
    long, short = outcomes([(0.0, 99_000_000, 2), (0.1, 300, 2)])
    assert long.failure is not None
    assert "too_long" in long.failure
    assert long.finished_s is None
    assert not long.starved
    assert short.failure is None


def test_a_long_that_never_finds_a_place_leaves_the_run_stalled_and_is_starved():
    result = run([(0.0, LONG, 5), (0.1, 300, 2)], prefill=2, degree=3)
    long, short = result.outcomes
    assert result.stalled
    assert long.prefill_started_s is None
    assert long.starved
    assert short.finished_s is not None
    assert result.ended_s == short.finished_s


def test_a_paused_long_keeps_nobody_busy():
    result = run([(0.0, LONG, 2), (1.0, 900, 2)], decode=1)
    long, short = result.outcomes
    prefilled_s = PREFILL_S + LONG_DECODE_S
    busy_s = prefilled_s + PASS_S + 900 * TOKEN_S
    assert result.replica_busy_s["p0"] == pytest.approx(busy_s)
    decode_s = result.replica_busy_s["d1"]
    assert decode_s == pytest.approx(step_s(1))
    end_s = max(long.finished_s, short.finished_s)
    assert result.gpu_idle == pytest.approx(1.0 - (busy_s + decode_s) / (2 * end_s))
    assert result.gpus == 4


def test_decisions_are_timed_and_kept_per_request():
    result = run(random_arrivals(50, seed=2), prefill=3)
    about_requests = sum(outcome.sched_s for outcome in result.outcomes)
    assert 0.0 < about_requests <= sum(result.decision_s) + 1e-12
    assert len(result.decision_s) >= 50 * 4


def test_progress_is_told_and_rises_to_the_end():
    told: list[tuple[int, int]] = []
    build(prefill=3).run(workload(*random_arrivals(60, seed=4)), lambda *so_far: told.append(so_far))
    assert told == sorted(told)
    assert told[-1] == (60, 60)


def test_an_empty_workload_ends_at_once():
    result = build().run(workload())
    assert result.outcomes == []
    assert not result.stalled
    assert result.gpu_idle == 0.0


# --- books -----------------------------------------------------------------------------------------


def test_more_kv_than_fits_is_found_out():
    books = KvBooks("p0", 100)
    books.reserve("a", 60)
    with pytest.raises(SimulationError, match=r"KV for 101 tokens is ordered on p0, which holds 100: .* b with 41"):
        books.reserve("b", 41)
    with pytest.raises(SimulationError, match="p0 was told twice to hold KV of a"):
        books.reserve("a", 1)
    books = KvBooks("p0", 100)
    books.reserve("a", 60)
    assert books.free("a") == 60
    assert books.free("a") == 0
    books.reserve("b", 100)


def test_usage_is_the_integral_of_who_is_busy():
    usage = Usage()
    usage.add(1.0, 2, 1, 1)
    usage.add(3.0, -1, -1, 0)
    usage.advance(10.0)
    assert (usage.any_s, usage.short_s, usage.long_s) == (4.0 + 7.0, 2.0, 2.0 + 7.0)


@pytest.mark.parametrize(
    ("short_s", "long_s", "denied"),
    [
        (0.0, 400.0, False),  # overloaded with longs, and they are served
        (380.0, 19.0, False),  # shorts need nearly all; longs get what is left
        (380.0, 1.0, True),  # and here they do not
        (20.0, 0.0, True),  # most stands idle, and longs wait
        (400.0, 0.0, False),  # nothing is left over: that is load
    ],
)
def test_starving_is_getting_little_of_what_shorts_leave(short_s, long_s, denied):
    assert is_denied(100.0, 4, short_s, long_s) is denied


# --- with the models of the project ----------------------------------------------------------------


def test_workers_that_measured_themselves_make_groups_of_one():
    """As `loadtest fidelity` needs it: no planner, costs of passes as a live worker announces them."""
    cost = StepCost(pass_s=0.02, token_s=0.0007, pair_s=8e-8)
    link = Link(latency_s=0.0002, bytes_s=2e9)
    costs = StepCostModel(
        cost,
        cost,
        layers=30,
        kv_capacity_tokens=32_768,
        kv_bytes_per_token=20_000,
        link=link,
        step_s_max=0.03,
        chunk_tokens_max=512,
    )
    shape = ClusterShape(nodes=1, replicas_per_node=3, decode_replicas=1, gpus_per_replica=1, layers=30)
    world = World(shape, SchedulerConfig(), costs, SoloCosts(costs, 30), None)
    result = world.run(dataclasses.replace(workload((0.0, 6_000, 16), (1.0, 200, 16)), threshold_tokens=2_048))
    long, short = result.outcomes
    assert long.first_token_s - long.prefill_started_s == pytest.approx(SoloCosts(costs, 30).prefill_s(6_000, (1,)))
    assert short.first_token_s - short.prefill_started_s == pytest.approx(costs.batch_s([200]))
    assert short.finished_s < long.first_token_s
    with pytest.raises(ValueError, match="groups of one"):
        SoloCosts(costs, 30).prefill_s(6_000, (2,))


def test_a_preset_runs_with_the_projects_own_costs():
    scenario = PRESETS["mistral-7b"]
    rng = random.Random(1)
    arrivals = [(0.2 * n, rng.randint(200, 3_000), rng.randint(1, 100)) for n in range(100)]
    arrivals += [(0.5 + 5.0 * n, rng.randint(100_000, 300_000), 20) for n in range(3)]
    made = workload(*arrivals)
    made = dataclasses.replace(made, threshold_tokens=5_000)
    result = simulate(scenario, made, policy="pecsched", seed=1)
    assert not result.stalled
    assert all(outcome.finished_s is not None for outcome in result.outcomes)
    assert result.gpus == 32
    slow = simulate(scenario, made, policy="pecsched", fast_sp=False, seed=1)
    longs = [[o.jct_s for o in r.outcomes if o.long] for r in (result, slow)]
    assert sum(longs[0]) < sum(longs[1])
