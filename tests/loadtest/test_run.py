"""`loadtest run` and the locustfile on one live cluster with timed engines, and what they say to bad input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.messages.views import ClusterView
from loadtest.__main__ import main
from loadtest.run import room_of
from loadtest.run_report.record import RunFigures
from loadtest.runner import MeasurementFailed
from services.run_file import RunFile, read_run_file, run_file_path
from tests.serve_process import LAST_LINE, clean_environment, serve_process

ROOT = Path(__file__).parents[2]
LOCUST_S = 60.0
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{at_s:06.3f},{prompt},3\n"
    for at_s, prompt in [(0.0, 40), (0.1, 30), (0.15, 9000), (0.3, 50), (0.3, 60), (0.9, 20), (1.2, 3000), (1.3, 10)]
)
FITTED = ["--long-percentile", "80", "--long-low", "2100", "--long-high", "2200", "--warm-up", "2"]


class Cluster:
    def __init__(self, run: RunFile, env: Mapping[str, str]) -> None:
        self.run = run
        self.env = dict(env)

    @property
    def flags(self) -> list[str]:
        return ["--url", self.run.url, "--nats-url", self.run.nats_url]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    env = clean_environment() | {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("runtime"))}
    command = [sys.executable, "-m", "services.cli", "serve", "--port", "0", "--engine", "timed"]
    with serve_process(command, env) as serving:
        serving.until(LAST_LINE)
        run = read_run_file(run_file_path(env))
        assert run is not None
        yield Cluster(run, env)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE, encoding="utf-8")
    return str(path)


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loadtest ")]
    assert len(lines) == 1
    return lines[0]


# --- python -m loadtest run ----------------------------------------------------------------------------


def test_a_trace_is_replayed_over_both_doors(
    cluster: Cluster, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page, table = tmp_path / "out.json", tmp_path / "out.html", tmp_path / "out.csv"
    arguments = ["run", *cluster.flags, "--trace", trace, "--via", "both", *FITTED, "--first", "10"]
    assert main([*arguments, "--json", str(out), "--html", str(page), "--csv", str(table)]) == 0

    runs = msgspec.convert(msgspec.json.decode(out.read_bytes())["runs"], list[RunFigures])
    assert [run.label for run in runs] == ["http", "nats"]
    assert runs[0].load == runs[1].load
    for run in runs:
        assert run.failures == ()
        assert (run.short.answered, run.long.answered) == (6, 2)
        assert run.short.ttft_s.p50 is not None
        assert run.short.itl_s.p50 is not None
        assert run.short.queueing_delay_s.p50 is not None
        assert run.long.queueing_delay_s.p50 is not None
        assert 0 <= run.short.queueing_delay_s.p50 <= run.short.ttft_s.p50
        assert run.late_s.p50 is not None
        assert run.late_s.p50 >= 0
        assert not [note for note in run.notes if "--threshold-tokens" in note]
    assert "ends after 1 s of 10 s" in runs[0].load.name
    assert "2 prompts became longs of 2100 to 2200 tokens" in runs[0].load.notes

    html = page.read_text(encoding="utf-8")
    assert html.count("<h2>Lanes of the workers") == 2
    with (tmp_path / "out-nats.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["long" if int(row["prompt_tokens"]) > 2048 else "short" for row in rows]
    assert all(float(row["ttft_s"]) > 0 for row in rows)
    assert "the client was late at sending" in capsys.readouterr().out
    assert main(["compare", str(out), str(out)]) == 0


def test_a_deaf_run_knows_no_queueing_delays(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    load = ["--synthetic-s", "1", "--synthetic-rps", "8", "--prompt-scale", "0.05", "--output-scale", "0.02"]
    arguments = ["run", *cluster.flags, "--deaf", *load, "--without-longs", "--warm-up", "0", "--json", str(out)]
    assert main(arguments) == 0
    (run,) = msgspec.convert(msgspec.json.decode(out.read_bytes())["runs"], list[RunFigures])
    assert run.short.answered == run.load.shorts > 0
    assert run.short.queueing_delay_s.p50 is None
    assert run.pauses is None


def test_another_threshold_than_the_clusters_is_found_out(cluster: Cluster, trace: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["run", *cluster.flags, "--trace", trace, "--threshold-tokens", "900", "--long-low", "1000"]
    assert main([*arguments, "--long-high", "1100", "--warm-up", "0", "--json", str(out)]) == 0
    (run,) = msgspec.convert(msgspec.json.decode(out.read_bytes())["runs"], list[RunFigures])
    assert [note for note in run.notes if "were of the other class to the scheduler" in note]


def test_bad_input_is_one_line(
    cluster: Cluster, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "odd.csv"
    odd.write_text("TIMESTAMP,Prompt,GeneratedTokens\n2023-11-16 18:15:46,1,1\n", encoding="utf-8")
    here = ["run", *cluster.flags]
    refused = {
        "column 'ContextTokens' is missing": [*here, "--trace", str(odd)],
        "No such file": [*here, "--trace", str(tmp_path / "none.csv")],
        "rate_scale": [*here, "--rate-scale", "-1"],
        "do not fit": [*here, "--trace", trace, "--long-high", "900000"],
        "cannot be reached": ["run", "--url", "http://127.0.0.1:9", "--trace", trace],
        "cannot reach NATS": ["run", "--via", "nats", "--nats-url", "nats://127.0.0.1:9", "--trace", trace],
        "--nats-url is missing": ["run", "--via", "both", "--url", "http://127.0.0.1:9"],
        "leave it out with --url": ["run", "--url", "http://127.0.0.1:9", "--serve", "--policy fifo"],
        "tells of the cluster at --url": ["run", "--threshold-tokens", "100"],
        "there is no folder": ["run", "--html", str(tmp_path / "missing" / "x.html")],
    }
    for why, arguments in refused.items():
        assert why in said_by(arguments, capsys), why


def test_a_run_in_which_nothing_is_answered_is_one_line(
    cluster: Cluster, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", *cluster.flags, "--trace", trace, *FITTED[:-2], "--warm-up", "0", "--timeout-s", "0.0001"]
    assert "no request was answered: no whole answer within" in said_by(arguments, capsys)


def test_a_cluster_without_workers_is_refused() -> None:
    view = ClusterView(
        policy="pecsched",
        workers=(),
        routers=(),
        coordinator_present=True,
        queued_shorts=0,
        queued_longs=0,
        queued_tokens=0,
        requests=(),
        counters={},
    )
    with pytest.raises(MeasurementFailed, match="no prefill worker"):
        room_of(8192, view, 2048)


# --- locust ----------------------------------------------------------------------------------------------


def locust(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(env), capture_output=True, text=True, timeout=LOCUST_S)


def statistics(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["name"]): row for row in json.loads(path.read_text(encoding="utf-8"))}


def test_locust_asks_over_http_and_nats(cluster: Cluster, tmp_path: Path) -> None:
    page, out = tmp_path / "locust.html", tmp_path / "locust"
    load = ["--short-weight", "3", "--long-weight", "1", "--long-tokens", "2100-2200", "--short-tokens", "16-32"]
    run = ["-u", "4", "-r", "4", "-t", "3s", "--stop-timeout", "20", "--user-rps", "4", "--output-tokens", "4"]
    ended = locust(*run, *load, "--html", str(page), "--json-file", str(out), env=cluster.env)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    rows = statistics(out.with_suffix(".json"))
    for way in ("http", "nats"):
        for kind in ("TTFT", "ITL", "JCT"):
            row = rows[kind, f"short {way}"]
            assert row["num_requests"] > 0
            assert row["num_failures"] == 0
    assert any(name.startswith("long ") for _, name in rows)
    assert "TTFT" in page.read_text(encoding="utf-8")


def test_locust_follows_a_trace(cluster: Cluster, trace: str) -> None:
    load = ["--trace", trace, "--user-rps", "4", "--long-weight", "0", "--nats-weight", "0", "--output-tokens", "2"]
    ended = locust(*load, env=cluster.env)
    assert ended.returncode == 0, ended.stderr
    assert "Shape test updating to" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "http://127.0.0.1:9", "--nats-weight", "0"], "no router answers at http://127.0.0.1:9 (--host)"),
        (["--nats-url", "nats://127.0.0.1:9", "--http-weight", "0"], "cannot reach NATS at nats://127.0.0.1:9"),
        (["--trace", "none.csv"], "none.csv: No such file"),
        ([], "no `pecsched serve` runs here"),
    ],
)
def test_a_load_that_cannot_begin_is_one_line(arguments: list[str], why: str, tmp_path: Path) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    ended = locust("-u", "1", "-t", "1s", *arguments, env=env)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("locustfile: ")]
    assert len(said) == 1
    assert why in said[0]
    assert "Traceback" not in ended.stderr
