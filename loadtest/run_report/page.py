"""The report: one HTML file with its plots inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from loadtest.pages import render
from loadtest.run_report import plots
from loadtest.run_report.record import Recorded, figures_of
from loadtest.run_report.table import notes_of, rows_of

TEMPLATE = "page.html.j2"


def page(runs: Sequence[Recorded]) -> str:
    """HTML of runs of the same load. One without answers says so, and has no plots."""
    figures = [figures_of(run) for run in runs]
    return render(
        "loadtest.run_report",
        TEMPLATE,
        title=f"{runs[0].load.name}: {' and '.join(run.label for run in runs)}",
        load=runs[0].load,
        figures=figures,
        rows=rows_of(figures),
        notes=notes_of(figures),
        latencies=Markup(plots.latencies(runs)) if any(each.answered for each in figures) else "",
        runs=[_drawn(run) for run in runs],
    )


def _drawn(run: Recorded) -> dict[str, Any]:
    answered = bool(run.good(long=False) or run.good(long=True))
    return {
        "label": run.label,
        "cluster": run.cluster,
        "over_time": Markup(plots.over_time(run)) if answered else "",
        "lanes": Markup(plots.lanes(run)) if answered and run.spans else "",
        "zoom": Markup(plots.lanes_around_pauses(run)) if answered and run.spans else "",
        "listened": run.listened,
    }
