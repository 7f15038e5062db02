"""Reports as one HTML file each, their plots inside."""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from loadtest.report import ReportError


def check_plots(path: str) -> None:
    """Raises: ReportError if a report is asked for and nothing can draw its plots."""
    if path and importlib.util.find_spec("matplotlib") is None:
        raise ReportError(f"--html {path}: the plots need matplotlib: pip install 'pecsched[report]'")


def render(package: str, template: str, **values: Any) -> str:
    """A template of a package, with the style that all reports have (`{{ style }}`)."""
    source = resources.files(package).joinpath(template).read_text(encoding="utf-8")
    style = resources.files("loadtest").joinpath("pages.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(style=Markup(style), **values)


def write_html(path: str, html: str) -> None:
    """Raises: ReportError."""
    try:
        Path(path).expanduser().write_text(html, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--html {path}: {error.strerror}") from error
