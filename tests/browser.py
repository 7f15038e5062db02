"""Headless Chromium, where there is one, and the live page in it. Screenshots lie in `artifacts/page/`."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENSHOTS = Path(__file__).parent.parent / "artifacts" / "page"
WAIT_MS = 30_000

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")


class Tab:
    """One page, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))

    async def until(self, expression: str, argument: Any = None) -> Any:
        """Wait until this JavaScript is true; it may use `window.pecsched`."""
        handle = await self.page.wait_for_function(expression, arg=argument, timeout=WAIT_MS)
        return await handle.json_value()

    async def ask(self, expression: str, argument: Any = None) -> Any:
        return await self.page.evaluate(expression, argument)

    async def text(self, selector: str) -> str:
        return str(await self.page.inner_text(selector))

    async def shot(self, name: str) -> bytes:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        return bytes(await self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True))


@asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        try:
            yield found
        finally:
            await found.close()


@asynccontextmanager
async def tab(found: Any, url: str, **context: Any) -> AsyncIterator[Tab]:
    """The page at this URL. At the end, nothing may have gone wrong in it."""
    made = await found.new_context(viewport={"width": 1440, "height": 900}, **context)
    try:
        page = Tab(await made.new_page())
        await page.page.goto(url, wait_until="load", timeout=WAIT_MS)
        yield page
        assert not page.errors, page.errors
    finally:
        await made.close()
