"""Every table of lives is obeyed the same way, and drawn whole."""

from __future__ import annotations

from enum import StrEnum

import pytest

from common.policy.core import InvariantViolated
from common.policy.transitions import Table, mermaid, require_legal


class Lamp(StrEnum):
    OFF = "off"
    ON = "on"
    BROKEN = "broken"


TABLE: Table[Lamp] = {
    Lamp.OFF: frozenset({Lamp.ON}),
    Lamp.ON: frozenset({Lamp.OFF, Lamp.BROKEN}),
    Lamp.BROKEN: frozenset(),
}


def test_a_step_of_the_table_is_legal_and_its_story_is_not_told() -> None:
    def story() -> list[str]:
        pytest.fail("a story is dear: it is told only for an illegal step")

    require_legal(TABLE, Lamp.OFF, Lamp.ON, who="lamp 1", story=story)


def test_any_other_step_raises_with_who_and_the_story() -> None:
    with pytest.raises(InvariantViolated, match=r"^lamp 1: off → broken is illegal; story:\n1\.0 bought\n2\.0 hung$"):
        require_legal(TABLE, Lamp.OFF, Lamp.BROKEN, who="lamp 1", story=lambda: ["1.0 bought", "2.0 hung"])


def test_the_state_that_is_gone_is_drawn_as_the_end() -> None:
    assert mermaid(TABLE, first=Lamp.OFF, gone=Lamp.BROKEN).splitlines() == [
        "stateDiagram-v2",
        "    [*] --> off",
        "    off --> on",
        "    on --> [*]",
        "    on --> off",
    ]


def test_ends_outside_of_the_table_are_drawn_with_their_remarks() -> None:
    drawn = mermaid(TABLE, first=Lamp.OFF, ends={Lamp.BROKEN: "", Lamp.ON: "stolen"})
    assert drawn.splitlines()[-2:] == ["    broken --> [*]", "    on --> [*]: stolen"]
