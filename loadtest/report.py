"""What the person at the console sees, and the JSON file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.errors import PecSchedError

MISSING = "–"
PIPE_COLUMNS = 160
"""Where there is no terminal to fit into, nothing is cut off."""


class ReportError(PecSchedError):
    """The figures could not be written down."""


class Bars:
    """Progress of the stages of a benchmark, and lines in between."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    @contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar; call what it gives once per thing done. Where no terminal shows it: a line at the end."""
        begun_s = time.monotonic()
        bar = self._progress.add_task(title, total=total)
        yield lambda: self._progress.advance(bar)
        self._progress.stop_task(bar)
        if not self._progress.console.is_terminal:
            self.say(f"{title}: {time.monotonic() - begun_s:.1f} s")

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """For a stage that does not say how far it is."""
        with self.counting(title, 1) as step:
            yield
            step()


@contextmanager
def progress(console: Console | None = None) -> Iterator[Bars]:
    # A few redraws a second: the measured machine draws them.
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = console or Console(stderr=True)
    drawn = shown.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=shown, refresh_per_second=2, disable=not drawn) as bars:
        yield Bars(bars)


def check_writable(path: str, flag: str = "--json") -> None:
    """Before minutes are spent on figures. Empty: nothing is to be written. Raises: ReportError."""
    parent = Path(path).expanduser().resolve().parent
    if path and not parent.is_dir():
        raise ReportError(f"{flag} {path}: there is no folder {parent}")


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """Raises: ReportError."""
    try:
        Path(path).expanduser().write_bytes(msgspec.json.format(msgspec.json.encode(figures)) + b"\n")
    except OSError as error:
        raise ReportError(f"--json {path}: {error.strerror}") from error


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table: names on the left, figures on the right, and lines below."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(f"\n{title}\n", markup=False, highlight=False, soft_wrap=True)
    shown = Table(box=None, pad_edge=False)
    for number, column in enumerate(head):
        shown.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def ms(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds * 1e3:.1f} ms"


def s(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:.2f} s"


def share(part: float | None) -> str:
    return MISSING if part is None else f"{part:.0%}"


def times(factor: float | None) -> str:
    return MISSING if factor is None else f"{factor:.2f}x"


def target(name: str, value: float | None, bound: float, show: Callable[[float | None], str]) -> str:
    """A line that compares a figure with what was promised."""
    verdict = "not measured" if value is None else "met" if value <= bound else "MISSED"
    return f"{name}: {show(value)}, target {show(bound)}: {verdict}"
