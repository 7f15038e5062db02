"""The simulator's files: a CSV of requests, a trace for Perfetto; and `loadtest sim` from end to end."""

from __future__ import annotations

import csv
import gzip
import json
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import main
from loadtest.report import ReportError
from loadtest.simulator.outputs import trace_events, write_csv, write_perfetto
from loadtest.simulator.result import Outcome, SimResult, Span

SHORT = Outcome("r0", False, 0.0, 100, 5, prefill_started_s=1.0, first_token_s=1.5, finished_s=2.25, sched_s=1e-4)
LONG = Outcome("r1", True, 0.5, 200_000, 9, prefill_started_s=1.0, pauses=2, suspended_s=0.125)
REFUSED = Outcome("r2", False, 0.75, 300, 1, failure="refused, queue_full: try, again")
WAITING = Outcome("r3", False, 3.0, 50, 1)

SPANS = [
    Span("p2", "long prefill", 1.0, 2.0, "r1"),
    Span("p2", "paused", 2.0, 3.0, "r1"),
    Span("p2", "short prefill", 2.0, 2.75, "r0 r4"),
    Span("p2", "long prefill", 3.0, 4.0, "r1"),
    Span("p10", "short prefill", 0.0, 0.5, "r5"),
    Span("p10 decode", "short decode", 0.5, 3.0, "r5"),
    Span("p10 decode", "short decode", 1.0, 2.0, "r6"),
    Span("p10 decode", "short decode", 2.0, 2.5, "r7"),
]


def result(*outcomes: Outcome, spans: list[Span] | None = None) -> SimResult:
    return SimResult(
        policy="pecsched",
        outcomes=list(outcomes),
        arrivals_end_s=3.0,
        ended_s=4.0,
        gpus=2,
        gpu_idle=0.5,
        gpu_idle_arrivals=0.5,
        replica_busy_s={},
        counters={},
        decision_s=array("d"),
        spans=spans or [],
    )


def rows_of(events: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[str, float, float, str]]]:
    """(worker, row) → its spans: kind, begin and end in seconds, request."""
    workers = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            place = (workers[e["pid"]], rows[e["pid"], e["tid"]])
            found[place].append((e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["args"]["request"]))
    return dict(found)


def test_csv_has_a_line_per_request(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    write_csv(path, result(SHORT, LONG, REFUSED))
    with path.open(newline="") as file:
        short, long, refused = csv.DictReader(file)
    assert (short["request_id"], short["class"], long["class"]) == ("r0", "short", "long")
    assert (short["queueing_delay_s"], short["ttft_s"], short["jct_s"]) == ("1.000000", "1.500000", "2.250000")
    assert (short["sched_s"], short["starved"], short["failure"]) == ("0.000100", "0", "")
    assert (long["pauses"], long["suspended_s"], long["first_token_s"], long["jct_s"]) == ("2", "0.125000", "", "")
    assert (refused["failure"], refused["prefill_started_s"]) == ("refused, queue_full: try, again", "")


def test_a_pause_is_a_span_between_two_of_the_long_and_above_the_shorts() -> None:
    rows = rows_of(list(trace_events(result(spans=SPANS))))
    assert rows["p2", "long"] == [
        ("long prefill", 1.0, 2.0, "r1"),
        ("paused", 2.0, 3.0, "r1"),
        ("long prefill", 3.0, 4.0, "r1"),
    ]
    assert rows["p2", "shorts"] == [("short prefill", 2.0, 2.75, "r0 r4")]


def test_spans_that_overlap_lie_beside_one_another() -> None:
    rows = rows_of(list(trace_events(result(spans=SPANS))))
    assert rows["p10", "short decode 1"] == [("short decode", 0.5, 3.0, "r5")]
    assert [span[3] for span in rows["p10", "short decode 2"]] == ["r6", "r7"]
    assert sum(map(len, rows.values())) == len(SPANS)


def test_workers_stand_in_the_order_of_their_numbers() -> None:
    names = [e["args"]["name"] for e in trace_events(result(spans=SPANS)) if e["name"] == "process_name"]
    assert names == ["cluster", "p2", "p10"]


def test_counters_follow_what_waits() -> None:
    events = list(trace_events(result(SHORT, LONG, REFUSED, WAITING)))
    waiting = [
        (e["ts"] / 1e6, e["args"]["shorts"], e["args"]["longs"]) for e in events if e["name"] == "waiting requests"
    ]
    # The refused one never counts; the last one is never begun.
    assert waiting == [(0.0, 1, 0), (0.5, 1, 1), (1.0, 0, 0), (3.0, 1, 0)]
    tokens = [e["args"]["tokens"] for e in events if e["name"] == "waiting prompt tokens"]
    assert tokens == [100, 200_100, 0, 50]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_is_json_that_holds_all_events(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    made = result(SHORT, spans=SPANS)
    write_perfetto(path, made)
    data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    assert json.loads(data)["traceEvents"] == list(trace_events(made))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    for write in (write_csv, write_perfetto):
        with pytest.raises(ReportError, match="Is a directory"):
            write(tmp_path, result(SHORT))


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 500 * n, "input_length": 1_000 + n, "output_length": 20} for n in range(60)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    files = {name: tmp_path / name for name in ("out.json", "requests.csv", "run.json")}
    words = ["sim", "--model", "yi-34b", "--trace", str(trace), "--seed", "4", "--long-high", "150000"]
    written = ["--json", files["out.json"], "--csv", files["requests.csv"], "--perfetto", files["run.json"]]
    assert main([*words, *map(str, written)]) == 0
    figures = json.loads(files["out.json"].read_bytes())
    assert (figures["workload"]["shorts"], figures["workload"]["longs"]) == (57, 3)
    assert figures["figures"]["failed"] == figures["figures"]["unfinished"] == 0
    assert figures["scenario"]["model"] == "yi-34b"
    with files["requests.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert all(float(row["jct_s"]) > 0 for row in rows)
    events = json.loads(files["run.json"].read_bytes())["traceEvents"]
    told = {request for e in events if e["ph"] == "X" for request in e["args"]["request"].split()}
    assert told == {row["request_id"] for row in rows}
    assert "yi-34b on 4 nodes of 8 a100, tp 4" in capsys.readouterr().out
