"""Workloads from trace files, read by path.

*Azure* (Azure Public Dataset, LLM inference traces of 2023 and 2024): CSV with a header and the columns `TIMESTAMP`
(ISO 8601; without a zone: UTC), `ContextTokens`, `GeneratedTokens`. Several files are merged by time, as the services
that they record ran at the same time.

*Mooncake* (FAST '25 traces): one JSON object per line with `timestamp` in milliseconds, `input_length`,
`output_length`; other fields are ignored.

Either way the first request arrives at 0 s. A file is refused as a whole, with the first line that is wrong: an order
of times that is not one, or a column that is another's, would make every figure of a simulation wrong.
"""

from __future__ import annotations

import csv
import heapq
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from loadtest.simulator.workload import Arrival, Workload, WorkloadError, make_workload

TIMESTAMP, PROMPT, OUTPUT = AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TOKENS_MAX = 1_000_000_000
_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0.0, le=1e15)]
    """Milliseconds."""
    input_length: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
    output_length: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]


def read_trace(paths: Sequence[str | Path]) -> Workload:
    """Azure or Mooncake, by the names of the files. Raises: WorkloadError with file and line."""
    if [Path(path).suffix.lower() for path in paths] == [".jsonl"]:
        return read_mooncake(paths[0])
    for path in paths:
        if Path(path).suffix.lower() == ".jsonl":
            raise WorkloadError(f"{path}: a Mooncake trace is read alone, not merged with others")
    return read_azure(*paths)


def read_azure(*paths: str | Path) -> Workload:
    """One file, several, or folders of them (each `*.csv` in it), merged by time.

    Raises: WorkloadError: no such file, a missing column, a value that is no number or below 1, times out of order.
    """
    files = [file for path in paths for file in _files_of(Path(path).expanduser())]
    merged = heapq.merge(*[_read_azure_file(file) for file in files])
    return make_workload(", ".join(file.stem for file in files), _from_zero(list(merged)))


def read_mooncake(path: str | Path) -> Workload:
    """Raises: WorkloadError: no such file, a line that is not such an object, times out of order."""
    file = Path(path).expanduser()
    decoder = msgspec.json.Decoder(_MooncakeLine)
    arrivals: list[Arrival] = []
    before_ms = 0.0
    for number, line in _lines(file):
        if line.isspace():
            continue
        try:
            said = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise WorkloadError(f"{file}:{number}: {error}") from error
        if said.timestamp < before_ms:
            raise WorkloadError(f"{file}:{number}: timestamp: {said.timestamp:g} is before the line above")
        before_ms = said.timestamp
        arrivals.append(Arrival(said.timestamp / 1e3, said.input_length, said.output_length))
    if not arrivals:
        raise WorkloadError(f"{file}: no requests")
    return make_workload(file.stem, _from_zero(arrivals))


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.csv"))
    if not files:
        raise WorkloadError(f"{path}: no *.csv in this folder")
    return files


def _read_azure_file(file: Path) -> list[Arrival]:
    """Times in seconds since `_EPOCH`."""
    rows = csv.reader((line for _, line in _lines(file)), strict=True)
    arrivals: list[Arrival] = []
    try:
        at, prompt, output = _azure_columns(file, next(rows, None))
        last = max(at, prompt, output)
        before_s = float("-inf")
        for row in rows:
            if len(row) <= last:
                if not row:
                    continue
                raise WorkloadError(f"{file}:{rows.line_num}: {len(row)} columns, and the header has more")
            at_s = _seconds(row[at], file, rows.line_num)
            if at_s < before_s:
                raise WorkloadError(f"{file}:{rows.line_num}: {TIMESTAMP}: {row[at]} is before the line above")
            before_s = at_s
            tokens = [
                _tokens(row[place], file, rows.line_num, name) for place, name in ((prompt, PROMPT), (output, OUTPUT))
            ]
            arrivals.append(Arrival(at_s, *tokens))
    except csv.Error as error:
        raise WorkloadError(f"{file}:{rows.line_num}: not CSV: {error}") from error
    if not arrivals:
        raise WorkloadError(f"{file}: a header and no requests")
    return arrivals


def _azure_columns(file: Path, head: list[str] | None) -> tuple[int, int, int]:
    """Where the three columns stand."""
    if head is None:
        raise WorkloadError(f"{file}: the file is empty")
    for column in AZURE_COLUMNS:
        if head.count(column) != 1:
            how = "there twice" if column in head else "missing"
            raise WorkloadError(f"{file}:1: column {column!r} is {how}; the header is {','.join(head)[:200]!r}")
    return head.index(TIMESTAMP), head.index(PROMPT), head.index(OUTPUT)


def _seconds(text: str, file: Path, line: int) -> float:
    """Since `_EPOCH`."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise WorkloadError(f"{file}:{line}: {TIMESTAMP}: {text[:40]!r} is not a time") from None
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH).total_seconds()


def _tokens(text: str, file: Path, line: int, column: str) -> int:
    """A whole number of 1 or more."""
    try:
        tokens = int(text)
    except ValueError:
        raise WorkloadError(f"{file}:{line}: {column}: {text[:40]!r} is not a whole number") from None
    if not 1 <= tokens <= TOKENS_MAX:
        raise WorkloadError(f"{file}:{line}: {column}: {tokens} is not between 1 and {TOKENS_MAX}")
    return tokens


def _from_zero(arrivals: Sequence[Arrival]) -> Iterator[Arrival]:
    start_s = arrivals[0].at_s
    return (Arrival(at_s - start_s, prompt, output) for at_s, prompt, output in arrivals)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines and their numbers."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            yield from enumerate(opened, start=1)
    except OSError as error:
        raise WorkloadError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from error
