from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="rewrite the golden scenario files")
    parser.addoption("--nightly", action="store_true", help="run the state machines with 10,000 examples")
