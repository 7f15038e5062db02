"""`loadtest scale`: the keys, the clusters, bad input. What decisions cost is measured on a quiet machine, not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import scale
from loadtest.__main__ import main, parse
from loadtest.simulator.workload import Arrival, Workload


def test_the_command_writes_a_decisions_time_per_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scale.json"
    assert main(["scale", "--gpus", "64", "32", "--requests", "200", "--rounds", "2", "--json", str(file)]) == 0
    by_gpus = json.loads(file.read_text())["by_gpus"]
    assert list(by_gpus) == ["32", "64"]
    for found in by_gpus.values():
        assert 0.0 < found["decision_s"]["p50"] <= found["decision_s"]["p99"]
        assert found["sched_over_jct_p99"] == max(found["sched_over_jct_p99_of"].values())
        assert found["decisions"] > 200
    assert by_gpus["64"]["rate_rps"] == pytest.approx(2 * by_gpus["32"]["rate_rps"])
    assert "growth from 32 to 64 GPUs" in capsys.readouterr().out


def test_a_larger_cluster_has_more_of_everything() -> None:
    small, large = scale.scenario_of("mistral-7b", 32), scale.scenario_of("mistral-7b", 8192)
    assert (small.gpus, small.decode_replicas) == (32, 4)
    assert (large.gpus, large.decode_replicas) == (8192, 1024)
    assert large.replicas == 8192


def test_arrivals_come_as_much_faster_as_the_cluster_is_larger() -> None:
    workload = Workload("even", tuple(Arrival(float(at_s), 500, 3) for at_s in range(65)), threshold_tokens=2_000)
    found = scale.measure(scale.scenario_of("yi-34b", 128), workload, seed=0)
    assert found["arrivals_s"] == pytest.approx(16.0)
    assert found["sched_over_jct_p99_of"]["long"] is None


@pytest.mark.parametrize("wrong", [["--gpus", "33"], ["--gpus", "4"], ["--requests", "0"], ["--rounds", "0"]])
def test_bad_input_is_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *wrong]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("loadtest scale: --")


def test_a_figure_is_the_median_of_its_rounds() -> None:
    rounds = [
        {"decision_s": {"p50": 1.0, "p99": p99}, "sched_over_jct_p99_of": {"short": p99, "long": None}, "replicas": 32}
        for p99 in (9.0, 3.0, 4.0)
    ]
    found = scale.middle(rounds)
    assert found["decision_s"] == {"p50": 1.0, "p99": 4.0}
    assert found["sched_over_jct_p99_of"] == {"short": 4.0, "long": None}
    assert found["sched_over_jct_p99"] == 4.0


def test_sizes_reach_from_the_papers_cluster_to_8192() -> None:
    assert parse(["scale"]).gpus == [32, 128, 512, 2048, 8192]
