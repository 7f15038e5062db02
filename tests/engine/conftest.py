from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.model import LoadedModel, load_model
from tests.engine.models import tiny_model
from tests.engine.torch_group import Leads


@pytest.fixture
def leads(monkeypatch: pytest.MonkeyPatch) -> Leads:
    return Leads(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a llama of a few layers."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32", device="cpu")
