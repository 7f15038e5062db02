"""The diagrams in ARCHITECTURE.md are drawn from the transition tables, so they cannot lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.policy import decode_rows, lifecycle, prefill_jobs, sp_group
from common.policy.decode_rows import RowPhase
from common.policy.lifecycle import RequestState
from common.policy.prefill_jobs import LongState, ShortState
from common.policy.sp_group import GroupState
from common.policy.transitions import mermaid

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
BEGIN, END = "<!-- diagrams -->\n", "<!-- /diagrams -->"


def drawn() -> str:
    served = {RequestState.DECODING: "", RequestState.QUEUED: "cancelled, failed (legal in every state)"}
    diagrams = {
        "A short, in the scheduler": mermaid(lifecycle.SHORT_TRANSITIONS, first=RequestState.QUEUED, ends=served),
        "A long, in the scheduler": mermaid(lifecycle.LONG_TRANSITIONS, first=RequestState.QUEUED, ends=served),
        "A group, in the SP coordinator": mermaid(sp_group.TRANSITIONS, first=GroupState.FORMING, gone=GroupState.GONE),
        "A short, on a prefill worker": mermaid(
            prefill_jobs.SHORT_TRANSITIONS, first=ShortState.OPENING, gone=ShortState.GONE
        ),
        "A long, on a prefill worker": mermaid(
            prefill_jobs.LONG_TRANSITIONS, first=LongState.LOADING, gone=LongState.GONE
        ),
        "A sequence, on a decode worker": mermaid(
            decode_rows.TRANSITIONS, first=RowPhase.RESERVING, ends=dict.fromkeys(RowPhase, "")
        ),
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
