"""How one long is prefilled: what `sequence_plan.py` answers."""

from __future__ import annotations

from common.messages.base import Record
from common.policy.long_planner import Layout
from common.policy.sequence_costs import Ring, Scheme
from common.units import Seconds, Tokens


class SequencePlan(Record, frozen=True, kw_only=True):
    """How one long is prefilled."""

    tokens: Tokens
    layout: Layout
    attention: Scheme
    mlp: Scheme
    ring: Ring
    """Order of the tokens round the ring."""
    estimates: tuple[tuple[str, Seconds], ...]
    """Prefill by each combination that is possible, as "attention/MLP"; of a plain ring one."""
    refused: tuple[tuple[str, str], ...] = ()
    """Combinations that are not, and why."""
    prefill_s: Seconds
    """Undisturbed, from its first kernel to its first token."""
    step_s: Seconds
    """The longest piece between two points where it can pause."""
    why: str
    """One sentence."""
