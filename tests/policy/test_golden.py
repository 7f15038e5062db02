from __future__ import annotations

from pathlib import Path

import pytest

from tests.policy.scenario import replay

SCENARIOS = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    answered = replay(text)
    if request.config.getoption("--golden-write"):
        path.write_text(answered, encoding="utf-8")
        return
    assert answered == text, f"{path.name} differs; review `pytest --golden-write` and its diff"


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10
