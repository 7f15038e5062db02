"""Plots as SVG text, to stand inside a page: what all of them share."""

from __future__ import annotations

import io

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 11.0
"""Inches."""
TITLE_Y = 1.0
"""Said, because to find a place for a title by itself takes a third of the time of drawing."""
RASTER_DPI = 160
"""Of what is too much for vectors."""


def panels_of(figure: Figure, rows: int, columns: int, *, sharey: bool = False) -> list[Axes]:
    """Row by row."""
    made = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return [panel for row in made for panel in row]


def svg(figure: Figure, name: str) -> str:
    """Without XML's head. Letters stay letters: small, and they can be searched."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=RASTER_DPI)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
