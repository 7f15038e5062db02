"""The diagrams in ARCHITECTURE.md are drawn from the transition tables, so they cannot lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.policy import decode_rows, lifecycle, prefill_jobs, sp_group

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
BEGIN, END = "<!-- diagrams -->\n", "<!-- /diagrams -->"


def drawn() -> str:
    diagrams = {
        "A short, in the scheduler": lifecycle.mermaid(long=False),
        "A long, in the scheduler": lifecycle.mermaid(long=True),
        "A group, in the SP coordinator": sp_group.mermaid(),
        "A short, on a prefill worker": prefill_jobs.mermaid(
            prefill_jobs.SHORT_TRANSITIONS, next(iter(prefill_jobs.SHORT_TRANSITIONS))
        ),
        "A long, on a prefill worker": prefill_jobs.mermaid(
            prefill_jobs.LONG_TRANSITIONS, next(iter(prefill_jobs.LONG_TRANSITIONS))
        ),
        "A sequence, on a decode worker": decode_rows.mermaid(),
    }
    return "".join(f"**{title}**\n\n```mermaid\n{text}\n```\n\n" for title, text in diagrams.items())


def test_architecture_shows_the_tables(request: pytest.FixtureRequest) -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    expected = before + BEGIN + drawn() + END + after
    if request.config.getoption("--golden-write"):
        ARCHITECTURE.write_text(expected, encoding="utf-8")
        return
    assert text == expected, "run `pytest tests/policy/test_diagrams.py --golden-write` and review the diff"
