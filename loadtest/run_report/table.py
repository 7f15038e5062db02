"""The figures on a console."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loadtest import report
from loadtest.run_report.record import LATE_S_MAX, ClassFigures, RunFigures, Spread

PERCENTILES = ("p50", "p90", "p99", "max")
SPREADS = {"queueing_delay_s": "queueing delay", "ttft_s": "TTFT", "itl_s": "ITL", "jct_s": "JCT"}

Rows = list[tuple[str, ...]]
Read = Callable[[ClassFigures], Spread]


def show(runs: Sequence[RunFigures]) -> None:
    """A table for runs of the same load, a pair of columns for each."""
    head = ("", *(f"{run.label}, {kind}" for run in runs for kind in ("shorts", "longs")))
    load = runs[0].load
    title = f"{load.name}: {load.shorts} shorts, {load.longs} longs in {load.duration_s:.0f} s; {runs[0].cluster}"
    report.table(title, head, rows_of(runs), ["", *notes_of(runs)])


def rows_of(runs: Sequence[RunFigures]) -> Rows:
    """Under a name and two columns per run."""
    rows: Rows = [
        ("requests", *(str(own.requests) for own in _classes(runs))),
        ("failed", *(str(own.failed) for own in _classes(runs))),
    ]
    if any(own.unfinished for own in _classes(runs)):
        rows.append(("without an end", *(str(own.unfinished) for own in _classes(runs))))
    rows.append(("answers per second", *(rps(own.rps) for own in _classes(runs))))
    for name, title in SPREADS.items():
        for percentile in PERCENTILES:
            cells = [seconds(getattr(getattr(own, name), percentile)) for own in _classes(runs)]
            if any(cell != report.MISSING for cell in cells):
                rows.append((f"{title} {percentile}", *cells))
    rows.append(("pauses", *_for_longs(runs, lambda run: count(run.pauses))))
    rows.append(("stood still, mean", *_for_longs(runs, lambda run: seconds(run.suspended_s.mean))))
    return rows


def notes_of(runs: Sequence[RunFigures]) -> list[str]:
    """Below the table: how well the client did, what was done to the load, what failed."""
    notes = [line for run in runs for line in _client_lines(run)]
    notes += runs[0].load.notes
    for run in runs:
        notes += [f"{run.label}: {note}" for note in run.notes]
        notes += [f"failed, {run.label}: {failure}" for failure in run.failures]
        if not run.answered:
            notes.append(f"{run.label}: no request was answered: there is nothing to tell of it")
    return notes


def _client_lines(run: RunFigures) -> list[str]:
    """Of a live run."""
    if run.late_s.p99 is None:
        return []
    late = report.target(f"{run.label}: the client was late at sending, p99", run.late_s.p99, LATE_S_MAX, report.ms)
    lines = [f"{late}; max {report.ms(run.late_s.max)}; busy {report.share(run.client_busy)} of a core"]
    if run.lagged:
        lines.append(
            f"{run.label}: the client itself lagged: latencies are too high by as much; give it a core of its own"
        )
    return lines


def seconds(value: float | None) -> str:
    """As people read it."""
    return report.s(value) if value is None or value >= 1.0 else report.ms(value)


def rps(value: float | None) -> str:
    return report.MISSING if value is None else f"{value:.2f}/s"


def count(value: int | None) -> str:
    return report.MISSING if value is None else f"{value:,}"


def _classes(runs: Sequence[RunFigures]) -> list[ClassFigures]:
    return [own for run in runs for own in (run.short, run.long)]


def _for_longs(runs: Sequence[RunFigures], read: Callable[[RunFigures], str]) -> list[str]:
    return [cell for run in runs for cell in ("", read(run))]
