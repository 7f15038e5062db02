"""The report: one HTML file with its plots inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from loadtest.pages import render
from loadtest.paper_report import plots
from loadtest.paper_report.comparison import Compared, compare_all, orders, show, show_paper, summary_of
from loadtest.paper_report.reasons import GENERAL
from loadtest.paper_report.table import COLUMNS, cells
from loadtest.paper_report.targets import Figures, check_all, verdict
from loadtest.paper_report.variants import SWEEP_SHARES

TEMPLATE = "page.html.j2"


def page(figures: Figures, sweep: Mapping[str, Mapping[str, Sequence[Any]]], about: Mapping[str, Any]) -> str:
    """HTML. `sweep`: model → policy → figures per share of capacity. `about`: see `loadtest.paper`."""
    compared = compare_all(figures)
    checks = check_all(figures)
    return render(
        "loadtest.paper_report",
        TEMPLATE,
        about=about,
        general=GENERAL,
        checks=checks,
        verdict=verdict,
        missed=sum(check.met is False for check in checks),
        directions=list(summary_of(compared)),
        orders=orders(figures),
        groups=_groups(compared),
        columns=COLUMNS,
        models=[_model(model, loads, sweep.get(model, {})) for model, loads in figures.items()],
    )


def _model(model: str, loads: Mapping[str, Any], sweep: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {
        "name": model,
        "loads": [(load, [cells(name, found) for name, found in policies.items()]) for load, policies in loads.items()],
        "delays": Markup(plots.delays(loads)) if loads else "",
        "bars": Markup(plots.bars(loads)) if loads else "",
        "sweep": Markup(plots.sweep(SWEEP_SHARES, sweep)) if sweep else "",
    }


def _groups(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """group → the paper's figures in it → rows per model."""
    figures: dict[str, dict[str, list[Compared]]] = {}
    for one in compared:
        figures.setdefault(one.group, {}).setdefault(one.title, []).append(one)
    return [
        {"title": group, "figures": [_figure(title, members) for title, members in own.items()]}
        for group, own in figures.items()
    ]


def _figure(title: str, members: Sequence[Compared]) -> dict[str, Any]:
    loads = list(dict.fromkeys(one.load for one in members))
    models = list(dict.fromkeys(one.model for one in members))
    by_place = {(one.model, one.load): one for one in members}
    rows = []
    for model in models:
        own = [by_place[model, load] for load in loads]
        rows.append((model, show_paper(own[0].paper, own[0].unit), [show(one.ours, one.unit) for one in own]))
    sentences: dict[str, list[str]] = {}
    for one in members:
        sentences.setdefault(one.sentence, []).append(f"{one.model} at {one.load}")
    everywhere = len(sentences) == 1
    said = [(sentence, [] if everywhere else where) for sentence, where in sentences.items()]
    return {
        "title": title,
        "plot": Markup(plots.beside_paper(title, members)),
        "loads": loads,
        "rows": rows,
        "sentences": said,
    }
