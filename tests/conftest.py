from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import browser


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="rewrite the golden scenario files")
    parser.addoption("--nightly", action="store_true", help="run the state machines with 10,000 examples")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Any]:
    """One browser for the tests of a module; they run on its loop (`asyncio(loop_scope="module")`)."""
    async with browser() as found:
        yield found
