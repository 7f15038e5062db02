"""The files that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadtest import pages
from loadtest.run_report.record import Recorded
from loadtest.simulator import outputs


def write_files(runs: Sequence[Recorded], *, html: str = "", csv: str = "", perfetto: str = "") -> None:
    """Of several runs, one page for all, and other files for each (`NAME-nats.csv`). Raises: ReportError."""
    for run in runs:
        if csv:
            outputs.write_csv(_own(csv, run, runs), run)
        if perfetto:
            outputs.write_perfetto(_own(perfetto, run, runs), run)
    if html:
        from loadtest.run_report.page import page  # its matplotlib is an extra, and slow to import

        pages.write_html(html, page(runs))


def _own(path: str, run: Recorded, runs: Sequence[Recorded]) -> Path:
    """A name for each, if there are several."""
    given = Path(path)
    name, dot, rest = given.name.partition(".")
    return given if len(runs) == 1 else given.with_name(f"{name}-{run.label}{dot}{rest}")
