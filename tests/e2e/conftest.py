from __future__ import annotations

from collections.abc import Callable

import pytest

_lines: list[str] = []


@pytest.fixture
def measured() -> Callable[[str], None]:
    """Figures that a person wants to see of a passed test, too: printed at the end of the run."""
    return _lines.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _lines:
        terminalreporter.write_sep("=", "measured")
    for line in _lines:
        terminalreporter.write_line(line)
