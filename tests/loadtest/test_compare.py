"""`loadtest compare`: ratios of what can be compared, one line for what cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.__main__ import main
from loadtest.run_report.record import Recorded, RunFigures, figures_of, load_facts
from loadtest.simulator.result import Outcome
from loadtest.simulator.workload import Arrival, Workload

WORKLOAD = Workload("w", (Arrival(0.0, 10, 5), Arrival(1.0, 100, 5)), 50)


def figures(
    ttft_s: float, *, label: str = "http", workload: Workload = WORKLOAD, failure: str | None = None
) -> RunFigures:
    outcomes = [
        Outcome("s", False, 0.0, 10, 5, 0.1, ttft_s, None if failure else 2 * ttft_s, failure),
        Outcome("l", True, 1.0, 100, 5, 1.1, 1.0 + 4 * ttft_s, None if failure else 9.0, failure, pauses=2),
    ]
    return figures_of(
        Recorded(label=label, kind="live", cluster="c", load=load_facts(workload, 0), outcomes=outcomes, spans=[])
    )


def written(path: Path, *runs: RunFigures, **changes: Any) -> str:
    documents = [msgspec.to_builtins(run) | changes for run in runs]
    path.write_bytes(msgspec.json.encode({"runs": documents, "took_s": 1.0}))
    return str(path)


def test_ratios_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(tmp_path / "a.json", figures(0.4)), written(tmp_path / "b.json", figures(0.2))
    out = tmp_path / "out.json"
    assert main(["compare", a, b, "--json", str(out)]) == 0
    (pair,) = msgspec.json.decode(out.read_bytes())["pairs"]
    assert pair["b_to_a"]["short"]["ttft_s"]["p50"] == pytest.approx(0.5)
    assert pair["b_to_a"]["long"]["ttft_s"]["p99"] == pytest.approx(0.5)
    assert pair["b_to_a"]["pauses"] == 1.0
    assert "0.50x" in capsys.readouterr().out


def test_runs_over_two_ways_are_compared_each_with_its_like(tmp_path: Path) -> None:
    both = (figures(0.4), figures(0.3, label="nats"))
    a, b = written(tmp_path / "a.json", *both), written(tmp_path / "b.json", *both)
    out = tmp_path / "out.json"
    assert main(["compare", a, b, "--json", str(out)]) == 0
    pairs = msgspec.json.decode(out.read_bytes())["pairs"]
    assert [(pair["a"]["label"], pair["b"]["label"]) for pair in pairs] == [("http", "http"), ("nats", "nats")]


def test_a_run_over_http_is_compared_with_one_over_nats(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a.json", figures(0.4)), written(tmp_path / "b.json", figures(0.4, label="nats"))
    assert main(["compare", a, b]) == 0


def test_other_arrivals_are_refused_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = dataclasses.replace(WORKLOAD, name="other", arrivals=(Arrival(0.0, 11, 5), *WORKLOAD.arrivals[1:]))
    a, b = written(tmp_path / "a.json", figures(0.4)), written(tmp_path / "b.json", figures(0.4, workload=other))
    assert main(["compare", a, b]) == 1
    said = capsys.readouterr().err
    assert "different arrivals" in said
    assert said.count("\n") == 1
    assert main(["compare", a, b, "--other-load"]) == 0
    assert "they had different arrivals" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = written(tmp_path / "good.json", figures(0.4))
    bad = {
        str(tmp_path / "missing.json"): "No such file",
        written(tmp_path / "empty.json"): "there is no run in it",
        written(tmp_path / "failed.json", figures(0.4, failure="status 503")): "nothing to compare",
        written(tmp_path / "old.json", figures(0.4), schema=99): "another version (schema 99",
        written(tmp_path / "odd.json", figures(0.4), pauses="many"): "$.runs[0].pauses",
        written(tmp_path / "two.json", figures(0.4), figures(0.4, label="nats")): "they do not match",
    }
    (tmp_path / "mixed.json").write_bytes(b'{"fifo": {}}')
    bad[str(tmp_path / "mixed.json")] = "not the --json of `loadtest run`"
    for path, why in bad.items():
        assert main(["compare", good, path]) == 1
        said = capsys.readouterr().err
        assert why in said, path
        assert said.count("\n") == 1, path


def test_simulated_runs_have_the_report_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--synthetic-s", "20", "--long-percentile", "90", "--long-low", "30000", "--long-high", "60000"]
    a, b, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "sim.html"
    assert main(["sim", *load, "--policy", "fifo", "--json", str(a)]) == 0
    assert main(["sim", *load, "--json", str(b), "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "simulated (simulated): mistral-7b on 4 nodes of 8 a100" in html
    assert "Queueing delay over the run" in html
    assert "Lanes of the workers" in html
    capsys.readouterr()
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "policy fifo" in out
    assert "policy pecsched" in out
    assert "queueing delay p99" in out
