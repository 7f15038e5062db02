"""What a run leaves in files: a CSV with a line per request, and a trace for https://ui.perfetto.dev.

The trace is Chrome's JSON (`traceEvents`), which Perfetto and chrome://tracing open. Each worker is a process with
rows for the longs it prefills (where a pause is a span of its own), the shorts it prefills, and what it decodes; spans
that overlap are laid into rows beside one another. Process 0, the cluster, has counters of what waits for its prefill.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol

import msgspec

from loadtest.report import ReportError
from loadtest.simulator.result import Outcome, Span

COLUMNS = (
    "request_id",
    "class",
    "prompt_tokens",
    "output_tokens",
    "arrived_s",
    "prefill_started_s",
    "first_token_s",
    "finished_s",
    "queueing_delay_s",
    "ttft_s",
    "jct_s",
    "pauses",
    "suspended_s",
    "sched_s",
    "starved",
    "failure",
)
"""Of the CSV. Times in simulated seconds (`sched_s`: real ones); an empty field: it did not come to that."""

ROWS = {"long prefill": "long", "paused": "long", "short prefill": "shorts"}
"""Kind of span → row of its worker; any other kind has a row of its own."""
MICROSECONDS = 1e6
CLUSTER_PID = 0

Event = dict[str, Any]


class Ran(Protocol):
    """What a run leaves behind, a simulated one or a live one."""

    @property
    def outcomes(self) -> Sequence[Outcome]: ...

    @property
    def spans(self) -> Sequence[Span]: ...


def write_csv(path: str | Path, result: Ran) -> None:
    """A line per request, in order of arrival. Raises: ReportError."""
    try:
        with Path(path).expanduser().open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            rows.writerows(_csv_row(outcome) for outcome in result.outcomes)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error


def write_perfetto(path: str | Path, result: Ran) -> None:
    """The trace of a recorded run; gzipped if the name ends in `.gz`. Raises: ReportError."""
    target = Path(path).expanduser()
    try:
        with gzip.open(target, "wb") if target.suffix == ".gz" else target.open("wb") as file:
            _write_events(file, trace_events(result))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error


def trace_events(result: Ran) -> Iterator[Event]:
    """The events of Chrome's trace format; times in microseconds."""
    yield _named(CLUSTER_PID, "cluster")
    yield from _waiting(result.outcomes)
    rows = _rows_by_worker(result.spans)
    for pid, worker in enumerate(sorted(rows, key=natural), start=CLUSTER_PID + 1):
        yield _named(pid, worker)
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        tid = 0
        for row, spans in sorted(rows[worker].items()):
            beside = _side_by_side(spans)
            for number, lane in enumerate(beside, start=1):
                tid += 1
                yield _named(pid, row if len(beside) == 1 else f"{row} {number}", tid)
                yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
                yield from (_complete(pid, tid, span) for span in lane)


def _csv_row(outcome: Outcome) -> tuple[object, ...]:
    return (
        outcome.request_id,
        "long" if outcome.long else "short",
        outcome.prompt_tokens,
        outcome.output_tokens,
        *map(
            _seconds,
            (
                outcome.arrived_s,
                outcome.prefill_started_s,
                outcome.first_token_s,
                outcome.finished_s,
                outcome.queueing_delay_s,
                outcome.ttft_s,
                outcome.jct_s,
            ),
        ),
        outcome.pauses,
        _seconds(outcome.suspended_s),
        _seconds(outcome.sched_s),
        int(outcome.starved),
        outcome.failure or "",
    )


def _seconds(time_s: float | None) -> str:
    return "" if time_s is None else f"{time_s:.6f}"


def _write_events(file: BufferedIOBase, events: Iterable[Event]) -> None:
    """One event per line, never all of them in memory."""
    encode = msgspec.json.encode
    file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
    for number, event in enumerate(events):
        file.write(b",\n" if number else b"\n")
        file.write(encode(event))
    file.write(b"\n]}\n")


def _named(pid: int, name: str, tid: int | None = None) -> Event:
    """The name of a process, or of one of its rows."""
    if tid is None:
        return {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(pid: int, tid: int, span: Span) -> Event:
    # Viewers colour by name: so the name is the kind, and the request stands in the arguments.
    return {
        "ph": "X",
        "name": span.kind,
        "pid": pid,
        "tid": tid,
        "ts": span.begin_s * MICROSECONDS,
        "dur": (span.end_s - span.begin_s) * MICROSECONDS,
        "args": {"request": span.request_id},
    }


def _rows_by_worker(spans: Iterable[Span]) -> dict[str, dict[str, list[Span]]]:
    """Worker → row → its spans. A lane is a worker, or a worker and what it does there after a blank."""
    rows: dict[str, dict[str, list[Span]]] = {}
    for span in spans:
        worker = span.lane.partition(" ")[0]
        rows.setdefault(worker, {}).setdefault(ROWS.get(span.kind, span.kind), []).append(span)
    return rows


def _side_by_side(spans: Iterable[Span]) -> list[list[Span]]:
    """The fewest rows in which no two spans overlap: each goes into the row that was free first."""
    rows: list[list[Span]] = []
    free: list[tuple[float, int]] = []
    """(end of its last span, row), a heap."""
    for span in sorted(spans, key=lambda span: (span.begin_s, span.end_s)):
        if free and free[0][0] <= span.begin_s:
            row = heapq.heappop(free)[1]
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(span)
        heapq.heappush(free, (span.end_s, row))
    return rows


def _waiting(outcomes: Sequence[Outcome]) -> Iterator[Event]:
    """Counters of requests and prompt tokens that have arrived and whose prefill has not begun.

    A request that was refused, or failed before its prefill, is left out: when it left is not known.
    """
    changes: list[tuple[float, int, int, int]] = []  # time, shorts, longs, tokens
    for outcome in outcomes:
        if outcome.failure is not None and outcome.prefill_started_s is None:
            continue
        longs, shorts = int(outcome.long), int(not outcome.long)
        changes.append((outcome.arrived_s, shorts, longs, outcome.prompt_tokens))
        if outcome.prefill_started_s is not None:
            changes.append((outcome.prefill_started_s, -shorts, -longs, -outcome.prompt_tokens))
    changes.sort()
    shorts = longs = tokens = 0
    for number, (at_s, more_shorts, more_longs, more_tokens) in enumerate(changes):
        shorts, longs, tokens = shorts + more_shorts, longs + more_longs, tokens + more_tokens
        if number + 1 == len(changes) or changes[number + 1][0] != at_s:
            yield _counter("waiting requests", at_s, {"longs": longs, "shorts": shorts})
            yield _counter("waiting prompt tokens", at_s, {"tokens": tokens})


def _counter(name: str, at_s: float, values: dict[str, int]) -> Event:
    return {"ph": "C", "name": name, "pid": CLUSTER_PID, "ts": at_s * MICROSECONDS, "args": values}


def natural(name: str) -> list[str | int]:
    """Sorts worker-2 before worker-10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name))]
