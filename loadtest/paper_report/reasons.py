"""Why our figures differ from the paper's: written after seeing them, per figure of `paper_figures.py`."""

from __future__ import annotations

REASONS: dict[str, str] = {}

GENERAL: tuple[str, ...] = ()
"""What holds of all of them."""
