"""`python -m loadtest compare A.json B.json`: two runs side by side, and what became of each figure.

    python -m loadtest run --serve '--policy fifo' --json fifo.json
    python -m loadtest run --json pecsched.json
    python -m loadtest compare fifo.json pecsched.json

Takes what `run` and `sim` write, live beside simulated too. The ratio is B over A: below 1, B took less. Both must have
had the same arrivals, which a digest of all times and lengths tells; `--other-load` compares runs of different ones all
the same. A file with several runs (`--via both`) is compared run by run with one that has the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from common.errors import PecSchedError
from loadtest import report
from loadtest.run_report.record import SCHEMA, ClassFigures, RunFigures
from loadtest.run_report.table import PERCENTILES, SPREADS, seconds
from loadtest.stats import ratio


class CompareError(PecSchedError):
    """Two files that cannot be compared. Its text is one line."""


class _Document(msgspec.Struct):
    runs: list[RunFigures]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("a", metavar="A.json", help="what is compared with")
    parser.add_argument("b", metavar="B.json", help="what is compared")
    parser.add_argument("--other-load", action="store_true", help="also if they did not have the same arrivals")


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Raises: CompareError."""
    a, b = read_runs(flags.a), read_runs(flags.b)
    pairs = pairs_of(a, b, flags.a, flags.b)
    for one, other in pairs:
        if one.load.digest != other.load.digest and not flags.other_load:
            loads = f"{_told(one)} and {_told(other)}"
            raise CompareError(f"they had different arrivals, {loads}: compare them all the same with --other-load")
    return {
        "a": flags.a,
        "b": flags.b,
        "pairs": [
            {"a": msgspec.to_builtins(one), "b": msgspec.to_builtins(other), "b_to_a": ratios(one, other)}
            for one, other in pairs
        ],
    }


def read_runs(path: str) -> list[RunFigures]:
    """Raises: CompareError: no such file, not one of ours, a run in which nothing was answered."""
    try:
        runs = msgspec.json.decode(Path(path).expanduser().read_bytes(), type=_Document).runs
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise CompareError(f"{path}: not the --json of `loadtest run` or `loadtest sim`: {error}") from error
    if not runs:
        raise CompareError(f"{path}: there is no run in it")
    for each in runs:
        if each.schema != SCHEMA:
            raise CompareError(f"{path}: written by another version (schema {each.schema}, this is {SCHEMA})")
        if not each.answered:
            raise CompareError(f"{path}: no request of the run {each.label} was answered: nothing to compare")
    return runs


def pairs_of(a: list[RunFigures], b: list[RunFigures], a_path: str, b_path: str) -> list[tuple[RunFigures, RunFigures]]:
    """One with one, or each with its like. Raises: CompareError."""
    if len(a) == len(b) == 1:
        return [(a[0], b[0])]
    labels = [each.label for each in a]
    if labels != [each.label for each in b]:
        there = ", ".join(each.label for each in b)
        raise CompareError(f"{a_path} has runs over {', '.join(labels)}, {b_path} over {there}: they do not match")
    return list(zip(a, b, strict=True))


def ratios(one: RunFigures, other: RunFigures) -> dict[str, Any]:
    """B over A, where both have a figure: {class: {metric: {percentile: ratio}}, "pauses"}."""
    found: dict[str, Any] = {
        kind: {
            metric: {p: ratio(_figure(theirs, metric, p), _figure(ours, metric, p)) for p in PERCENTILES}
            for metric in SPREADS
        }
        for kind, ours, theirs in _classes(one, other)
    }
    return found | {"pauses": ratio(other.pauses, one.pauses)}


def show(figures: dict[str, Any]) -> None:
    """A table for each pair."""
    for pair in figures["pairs"]:
        one, other = (msgspec.convert(pair[side], RunFigures) for side in ("a", "b"))
        notes = ["", f"A: {figures['a']}: {_told(one)}", f"B: {figures['b']}: {_told(other)}"]
        if one.load.digest != other.load.digest:
            notes.append("they had different arrivals: the ratios tell of both")
        notes += [f"{side}: its client lagged" for side, each in (("A", one), ("B", other)) if each.lagged]
        report.table(f"A: {one.cluster}\nB: {other.cluster}", ("", "A", "B", "B / A"), list(_rows(one, other)), notes)


def _rows(one: RunFigures, other: RunFigures) -> Iterator[tuple[str, str, str, str]]:
    for kind, ours, theirs in _classes(one, other):
        yield (f"{kind}s", f"{ours.answered} answered", f"{theirs.answered} answered", "")
        if ours.failed or theirs.failed:
            yield ("  failed", str(ours.failed), str(theirs.failed), "")
        for metric, title in SPREADS.items():
            for percentile in PERCENTILES:
                a, b = _figure(ours, metric, percentile), _figure(theirs, metric, percentile)
                if a is not None or b is not None:
                    yield (f"  {title} {percentile}", seconds(a), seconds(b), report.times(ratio(b, a)))
    if one.pauses is not None and other.pauses is not None:
        yield ("pauses", str(one.pauses), str(other.pauses), report.times(ratio(other.pauses, one.pauses)))


def _classes(one: RunFigures, other: RunFigures) -> tuple[tuple[str, ClassFigures, ClassFigures], ...]:
    return (("short", one.short, other.short), ("long", one.long, other.long))


def _figure(own: ClassFigures, metric: str, percentile: str) -> float | None:
    value: float | None = getattr(getattr(own, metric), percentile)
    return value


def _told(run: RunFigures) -> str:
    return f"{run.label}, {run.load.name} ({run.load.shorts} shorts, {run.load.longs} longs)"
