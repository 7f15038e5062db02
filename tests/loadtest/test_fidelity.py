"""The pure parts of `loadtest fidelity`: what follows from probes, the replay, and the comparison. No live cluster."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from common.messages.cluster import StepCost, WorkerProfile, WorkerRole
from common.messages.requests import LengthClass
from common.policy.scheduler_config import SchedulerConfig
from common.settings import DecodeWorkerSettings, PrefillWorkerSettings
from common.units import WorkerId
from loadtest import fidelity
from loadtest.__main__ import main, parse
from loadtest.fidelity import Pair, compare, figures_of, workload_of
from loadtest.fidelity_model import (
    Calibration,
    LiveCluster,
    LiveCosts,
    Probe,
    Probes,
    calibrate,
    line,
    mean_of,
    replay,
)
from loadtest.runner import MeasurementFailed, Sample
from loadtest.simulator.result import Outcome
from loadtest.simulator.workload import Arrival, Workload
from loadtest.workload import OUTPUT_TOKENS, make_schedule

PREFILL = StepCost(pass_s=0.020, token_s=1e-3, pair_s=1e-7)
DECODE = StepCost(pass_s=0.010, token_s=1e-3, pair_s=1e-6)
LAYERS = 10
PLAIN = Calibration(
    short_pass_s=0.020,
    short_token_s=1e-3,
    long_pass=1.0,
    decode_step=1.0,
    long_decode_step=1.0,
    beside_short_s=0.006,
    beside_long_s=0.010,
    handover_s=0.004,
    together=1.0,
    crowded=1.0,
)


def profile(name: str, role: WorkerRole, cost: StepCost) -> WorkerProfile:
    return WorkerProfile(
        worker_id=WorkerId(name),
        role=role,
        incarnation="1",
        node="n0",
        replica=name,
        model_id="made up",
        model_fingerprint="made up",
        layers=LAYERS,
        kv_bytes_per_token=1_000,
        kv_capacity_tokens=32_768,
        context_tokens=8_192,
        rows_max=32,
        data_address=f"{name}:1",
        step_cost=cost,
    )


def cluster(*, cores: int = 0, prefill: int = 2, decode_nice: int = 0, crowded_itl_ms: float = 0.0) -> LiveCluster:
    return LiveCluster(
        config=SchedulerConfig(),
        prefill=tuple(profile(f"p{i}", "prefill", PREFILL) for i in range(prefill)),
        decode=(profile("d0", "decode", DECODE),),
        worker=PrefillWorkerSettings(),
        decoder=DecodeWorkerSettings(decode_nice=decode_nice, crowded_itl_ms=crowded_itl_ms),
        cores=cores,
    )


def probe_short(tokens: int, output: int, *, slower: float = 1.0, decode_slower: float = 1.0) -> Probe:
    """Of a machine with passes of 30 ms and 2 ms a token, steps of 25 ms, 5 ms of handover, 8 ms beside."""
    compute_s = (0.030 + 0.002 * tokens) * slower
    decode_s = (0.005 + (output - 1) * 0.025) * decode_slower
    return Probe(tokens, output, compute_s + 0.008, compute_s + 0.008 + decode_s, compute_s)


def probes(**more: tuple[Probe, ...]) -> Probes:
    alone = tuple(probe_short(tokens, 2 if tokens % 20 else OUTPUT_TOKENS) for tokens in range(30, 250, 10))
    return Probes(alone, Probe(6_000, OUTPUT_TOKENS, 12.05, 12.05 + 15 * 0.040, 12.0), **more)


# --- what follows from probes --------------------------------------------------------------------


def test_a_line_is_found_though_some_points_are_far_off() -> None:
    points = [(float(x), 3.0 + 2.0 * x) for x in range(10)]
    points[4] = (4.0, 90.0)
    assert line(points) == pytest.approx((3.0, 2.0))


def test_a_line_neither_falls_nor_begins_below_zero() -> None:
    assert line([(1.0, 5.0), (2.0, 4.0), (3.0, 3.0)]) == (4.0, 0.0)
    assert line([(1.0, 1.0), (2.0, 3.0), (3.0, 5.0)]) == (0.0, 2.0)


def test_points_in_one_place_make_no_line() -> None:
    with pytest.raises(MeasurementFailed, match="different lengths"):
        line([(1.0, 1.0), (1.0, 2.0)])


def test_a_known_machine_is_found_again_from_its_probes() -> None:
    live = cluster(cores=2)
    found = calibrate(live, probes())
    assert (found.short_pass_s, found.short_token_s) == pytest.approx((0.030, 0.002))
    assert found.beside_short_s == pytest.approx(0.008)
    assert found.beside_long_s == pytest.approx(0.05)
    assert found.handover_s == pytest.approx(0.005)
    costs = LiveCosts(live.costs(), found)
    assert costs.decode_step_s(1, 140) == pytest.approx(0.025, rel=0.01)
    assert costs.shared_step_s(0, 1, 6_000) == pytest.approx(0.040)
    assert costs.batch_s([100, 50]) == pytest.approx(0.030 + 0.002 * 150)
    assert (found.together, found.crowded) == (1.0, 1.0), "nothing was said about company"


def test_how_much_slower_cores_are_together_and_decode_in_a_crowd() -> None:
    beside = tuple(probe_short(n, OUTPUT_TOKENS, slower=1.25, decode_slower=1.25) for n in (40, 120, 200))
    crowded = tuple(probe_short(n, OUTPUT_TOKENS, slower=1.25, decode_slower=2.0) for n in (40, 120, 200))
    found = calibrate(cluster(cores=2), probes(beside_long=beside, crowded=crowded))
    assert found.together == pytest.approx(0.8)
    assert found.crowded == pytest.approx(1.25 / 2.0)


def test_what_a_nice_decode_worker_waits_for_longs_is_not_counted_as_slowness() -> None:
    share = 2 / (2 * 1.25**8 + 1)  # of a core: two longs of niceness 8 beside it, of 16, on two cores
    crowded = tuple(probe_short(n, OUTPUT_TOKENS, decode_slower=2.0 / share) for n in (40, 120, 200))
    found = calibrate(cluster(cores=2, decode_nice=16), probes(crowded=crowded))
    assert found.crowded == pytest.approx(1 / 2.0)


def test_a_nice_decode_worker_that_gets_more_than_its_weight_counts_for_more_at_the_cost_of_longs() -> None:
    crowded = tuple(probe_short(n, OUTPUT_TOKENS, decode_slower=1 / 0.6) for n in (40, 120, 200))
    live = cluster(cores=2, decode_nice=16)
    found = calibrate(live, probes(crowded=crowded))
    assert found.crowded == 1.0
    cores, decoder, longs = live.shared_cores(found), Counted(), [Counted(), Counted()]
    assert cores is not None
    for task in (*longs, decoder):
        cores.use(task, background=task is not decoder, step_s=0.025 if task is decoder else None)
    assert [task.speed for task in (decoder, *longs)] == pytest.approx([0.6, 0.7, 0.7])


def test_a_decode_worker_that_keeps_its_distance_uses_no_more_than_that_and_is_not_held_up() -> None:
    paced = tuple(probe_short(n, OUTPUT_TOKENS, decode_slower=4.05) for n in (40, 120, 200))
    live = cluster(cores=2, decode_nice=16, crowded_itl_ms=100.0)
    found = calibrate(live, probes(crowded=paced))
    cores, decoder, longs = live.shared_cores(found), Counted(), [Counted(), Counted()]
    assert cores is not None
    for task in (*longs, decoder):
        cores.use(task, background=task is not decoder, step_s=0.025 if task is decoder else None)
    assert [task.speed for task in (decoder, *longs)] == pytest.approx([0.25, 0.875, 0.875])
    late = tuple(probe_short(n, OUTPUT_TOKENS, decode_slower=5.0) for n in (40, 120, 200))
    held_up = calibrate(live, probes(crowded=late))
    assert held_up.step_gain == pytest.approx(0.2 * 2 * 1.25**8 / (2 - 0.2), rel=0.02), "by its weight"


class Counted:
    speed = 0.0

    def set_speed(self, speed: float) -> None:
        self.speed = speed


def test_a_machine_that_is_faster_in_company_counts_as_equally_fast() -> None:
    beside = tuple(probe_short(n, OUTPUT_TOKENS, slower=0.5, decode_slower=0.5) for n in (40, 120))
    assert calibrate(cluster(cores=2), probes(beside_long=beside)).together == 1.0


def test_a_machine_that_slowed_down_meanwhile_counts_as_its_mean() -> None:
    live, fast = cluster(), probes()
    slow = Probes(
        tuple(
            dataclasses.replace(p, ttft_s=2 * p.ttft_s, jct_s=2 * p.jct_s, compute_s=2 * p.compute_s)
            for p in fast.alone
        ),
        fast.long_alone,
    )
    before, after = calibrate(live, fast), calibrate(live, slow)
    between = mean_of([before, after])
    assert between.short_token_s == pytest.approx(1.5 * before.short_token_s)
    assert between.decode_step == pytest.approx(1.5 * before.decode_step)
    assert between.long_pass == before.long_pass
    assert between.short_spread == before.short_spread + after.short_spread
    assert mean_of([before]) == before


def test_passes_differ_as_the_probes_did() -> None:
    live, found = cluster(), calibrate(cluster(), probes())
    assert found.short_spread == pytest.approx([1.0] * len(probes().alone))
    spread = msgspec.structs.replace(found, short_spread=(1.0, 1.0, 3.0))
    passes = [LiveCosts(live.costs(), spread, seed=seed).batch_s([100]) for seed in range(40)]
    plain_s = found.short_pass_s + 100 * found.short_token_s
    assert {round(pass_s / plain_s, 6) for pass_s in passes} == {1.0, 3.0}
    assert passes == [LiveCosts(live.costs(), spread, seed=seed).batch_s([100]) for seed in range(40)]


@pytest.mark.parametrize(
    ("alone", "reason"),
    [
        ((probe_short(40, 8), probe_short(50, 8)), "two lengths"),
        ((probe_short(40, 1), probe_short(50, 8)), "two lengths"),
        ((probe_short(40, 2, decode_slower=99.0), probe_short(50, 8)), "too busy"),
    ],
)
def test_probes_that_tell_no_decode_step_are_refused(alone: tuple[Probe, ...], reason: str) -> None:
    with pytest.raises(MeasurementFailed, match=reason):
        calibrate(cluster(), Probes(alone, probes().long_alone))


def test_a_cluster_without_a_role_is_refused() -> None:
    with pytest.raises(MeasurementFailed, match="no prefill or no decode worker"):
        cluster(prefill=0).costs()


# --- replay --------------------------------------------------------------------------------------


def workload(*arrivals: Arrival) -> Workload:
    return Workload("made up", arrivals, SchedulerConfig().threshold_tokens)


def test_a_single_short_takes_what_its_parts_take() -> None:
    (short,) = replay(cluster(), PLAIN, workload(Arrival(0.0, 100, 11)), seed=0)
    assert short.ttft_s is not None
    assert short.ttft_s == pytest.approx(0.020 + 100e-3 + 0.006)
    step_s = 0.010 + 1e-3 + 1e-6 * 105
    assert short.jct_s == pytest.approx(short.ttft_s + 0.004 + 10 * step_s, rel=0.01)


def test_a_single_long_takes_its_chunks_and_its_steps() -> None:
    live = cluster()
    (long,) = replay(live, PLAIN, workload(Arrival(0.0, 6_000, 11)), seed=0)
    measured, done, seconds = live.costs(), 0, 0.0
    while done < 6_000:
        chunk = min(measured.chunk_tokens(done), 6_000 - done)
        seconds += measured.pass_s(chunk, done)
        done += chunk
    assert long.ttft_s is not None
    assert long.ttft_s == pytest.approx(seconds + 0.010)
    assert long.jct_s == pytest.approx(long.ttft_s + 10 * (0.020 + 1e-3 + 1e-7 * 6_005), rel=1e-3)


def test_shared_cores_slow_a_short_beside_longs_and_their_lack_does_not() -> None:
    arrivals = (Arrival(0.0, 6_000, 16), Arrival(0.1, 6_000, 16), Arrival(1.0, 100, 16))
    crowd = msgspec.structs.replace(PLAIN, together=0.5, crowded=0.5)
    free = replay(cluster(cores=0), crowd, workload(*arrivals), seed=0)[2]
    shared = replay(cluster(cores=2), crowd, workload(*arrivals), seed=0)[2]
    assert free.jct_s is not None
    assert shared.jct_s is not None
    assert shared.jct_s > 1.9 * free.jct_s


def test_a_replay_is_the_same_for_the_same_seed_and_keeps_the_order_of_arrivals() -> None:
    schedule = make_schedule(3, short_rps=4.0, long_rps=0.2, shorts_min=60, longs_min=3)
    same = workload_of(schedule, 2_048, "made up")
    runs = [replay(cluster(cores=2), PLAIN, same, seed=1) for _ in range(2)]
    times = [[(o.first_token_s, o.finished_s, o.pauses) for o in run] for run in runs]
    assert times[0] == times[1]
    assert [(o.arrived_s, o.prompt_tokens, o.output_tokens) for o in runs[0]] == [tuple(a) for a in same.arrivals]
    assert all(o.finished_s is not None for o in runs[0])
    assert any(o.pauses for o in runs[0]), "a load without a pause shows little"


# --- comparison ----------------------------------------------------------------------------------


def pair(kind: LengthClass, predicted_s: float, measured_s: float, failure: str | None = None) -> Pair:
    """Both times to first token; completion twice that."""
    arrived_s = 7.0
    sample = Sample(kind, arrived_s, arrived_s, arrived_s + measured_s, arrived_s + 2 * measured_s, failure)
    ends = arrived_s + predicted_s, arrived_s + 2 * predicted_s
    return Pair(sample, Outcome("r", kind == "long", arrived_s, 9, 9, None, *ends))


def test_a_prediction_is_judged_by_its_distance_from_what_was_measured() -> None:
    figures = compare([pair("short", 1.14, 1.0), pair("short", 1.14, 1.0), pair("long", 20.0, 30.0)])
    short, long = figures["short"], figures["long"]
    assert (short["requests"], short["failed"]) == (2, 0)
    assert short["ttft_s"]["p50"] == {
        "predicted": pytest.approx(1.14),
        "measured": pytest.approx(1.0),
        "ratio": pytest.approx(1.14),
        "within": True,
    }
    assert short["jct_s"]["p99"]["within"] is True
    assert long["jct_s"]["p50"]["ratio"] == pytest.approx(2 / 3)
    assert (long["jct_s"]["p50"]["within"], long["ttft_s"]["p99"]["within"]) == (False, False)


def test_the_bound_of_p99_is_wider() -> None:
    figures = compare([pair("short", 1.2, 1.0)])["short"]["ttft_s"]
    assert (figures["p50"]["within"], figures["p99"]["within"]) == (False, True)


def test_failed_requests_are_counted_and_not_compared() -> None:
    figures = compare([pair("short", 1.0, 1.0), pair("short", 1.0, 50.0, failure="lost")])["short"]
    assert (figures["requests"], figures["failed"]) == (2, 1)
    assert figures["ttft_s"]["p99"]["measured"] == pytest.approx(1.0)


def test_a_class_without_requests_has_no_figures() -> None:
    assert compare([pair("short", 1.0, 1.0)])["long"]["jct_s"]["p50"] == {
        "predicted": None,
        "measured": None,
        "ratio": None,
        "within": None,
    }


def test_all_seeds_together_are_judged_by_their_pooled_requests(capsys: pytest.CaptureFixture[str]) -> None:
    loads = {0: [pair("short", 1.0, 1.0), pair("long", 9.0, 9.0)], 1: [pair("short", 3.0, 1.0)]}
    figures = figures_of(loads)
    assert figures["by_seed"]["0"]["short"]["ttft_s"]["p50"]["within"] is True
    assert figures["by_seed"]["1"]["short"]["ttft_s"]["p50"]["within"] is False
    assert figures["all"]["short"]["ttft_s"]["p50"]["predicted"] == pytest.approx(2.0)
    run = {"policy": "pecsched", "engine": "torch", "prefill_workers": 2, "decode_workers": 1, "cores": 2}
    found = {name: getattr(PLAIN, name) for name in Calibration.__struct_fields__}
    fidelity.show(figures | {"run": run, "calibration": found})
    shown = capsys.readouterr().out
    assert "4 of 8 figures are within 15% (p50) and 25% (p99)" in shown
    assert shown.count("OUTSIDE") == 8


# --- flags ---------------------------------------------------------------------------------------


def test_seeds_are_a_list() -> None:
    assert parse(["fidelity", "--seeds", "3,1"]).seeds == (3, 1)


@pytest.mark.parametrize("wrong", ["", "1,1", "-1", "a"])
def test_wrong_seeds_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["fidelity", f"--seeds={wrong}"])
    assert "--seeds: must be" in capsys.readouterr().err


def test_longs_that_are_short_are_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fidelity", "--long-tokens", "1000-3000"]) == 1
    assert "prompts above 2048 are long" in capsys.readouterr().err


def test_a_wrong_serve_flag_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fidelity", "--serve", "--no-such-flag 1"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
