"""A sign of life: at once, then at intervals, and whenever it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from common.errors import StartupError


class Heartbeat:
    def __init__(self, every_s: float, beat: Callable[[], Awaitable[None]]) -> None:
        self._every_s = every_s
        self._beat = beat
        self._asked = asyncio.Event()

    def now(self) -> None:
        """Do not wait for the next interval: the bus is back, say."""
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled. Raises whatever the beat raises."""
        while True:
            self._asked.clear()
            await self._beat()
            try:
                async with asyncio.timeout(self._every_s):
                    await self._asked.wait()
            except TimeoutError:
                continue


async def show_life(file: str, every_s: float) -> None:
    """Until cancelled, touch a file (none: ""), so that whoever watches from outside need only look at its time: the
    health check of a container, which is made every few seconds for each of many and must cost next to nothing.

    Raises: StartupError, if it cannot be written.
    """
    while file:
        _touch(Path(file))
        await asyncio.sleep(every_s)


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise StartupError(f"cannot touch {path}: {error.strerror or error}; pass another --alive-file") from error
