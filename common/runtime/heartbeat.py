"""A sign of life: at once, then at intervals, and whenever it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


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
