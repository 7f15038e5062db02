"""A life as a table: from each state, the states that may follow. How every table is obeyed, and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from common.policy.core import InvariantViolated
from common.policy.story import Story

StateT = TypeVar("StateT", bound=StrEnum)
Table = Mapping[StateT, frozenset[StateT]]


def require_legal(table: Table[StateT], current: StateT, target: StateT, *, who: str, story: Story) -> None:
    """Raises: InvariantViolated, with the story of `who`, if the table does not allow the step."""
    if target not in table[current]:
        raise InvariantViolated.told(f"{who}: {current} → {target} is illegal", story())


def mermaid(
    table: Table[StateT], *, first: StateT, gone: StateT | None = None, ends: Mapping[StateT, str] | None = None
) -> str:
    """The table as a Mermaid state diagram. `gone` is drawn as the end; a table without such a state names
    those that `ends` can follow, each with a remark (or "")."""
    lines = ["stateDiagram-v2", f"    [*] --> {first}"]
    for source, targets in table.items():
        lines += [f"    {source} --> {'[*]' if target is gone else target}" for target in sorted(targets)]
    for source, remark in (ends or {}).items():
        lines.append(f"    {source} --> [*]" + (f": {remark}" if remark else ""))
    return "\n".join(lines)
