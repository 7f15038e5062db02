"""Tasks whose owner is an object rather than a block: they end by themselves or with their owner."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from common.logs import get_logger

log = get_logger(__name__)


class OwnedTasks:
    """An exception in one of them is logged; `cancel` ends all the others."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def cancel(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed", task=task.get_name(), error=repr(error), exc_info=error)
