from __future__ import annotations

import pytest

from tests.engine.torch_group import Leads


@pytest.fixture
def leads(monkeypatch: pytest.MonkeyPatch) -> Leads:
    return Leads(monkeypatch)
