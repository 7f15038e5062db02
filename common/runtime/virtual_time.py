"""An event loop that never waits: when nothing is ready, its clock jumps to the next timer.

Hours of a cluster's life run in milliseconds, the same way every time. Code under test takes its time
from `asyncio.get_running_loop().time()`, as all services do.
"""

from __future__ import annotations

import asyncio
import functools
import math
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class VirtualTimeError(RuntimeError):
    """Nothing is left that could wake the loop, or the clock ran past its horizon."""


class _JumpingSelector(selectors.DefaultSelector):
    """Hands the waiting time to `jump` instead of waiting."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and (timeout is None or timeout > 0):
            self._jump(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`horizon_s`: a test that still runs then hangs in truth, and fails."""

    def __init__(self, horizon_s: float = 86_400.0) -> None:
        self._now_s = 0.0
        self._horizon_s = horizon_s
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        return self._now_s

    @property
    def _clock_resolution(self) -> float:
        # asyncio fires timers that are due within its clock's resolution. A real clock has moved on by then; this
        # one has not, and who finds its deadline a hair in the future would set its timer again, for ever.
        return math.ulp(self._now_s)

    @_clock_resolution.setter
    def _clock_resolution(self, _of_the_real_clock: float) -> None:
        pass

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        # At once and on this thread: a thread's real duration has no place in virtual time.
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _jump(self, timeout_s: float | None) -> None:
        if timeout_s is None:
            raise VirtualTimeError("every task waits for something that no timer and no task will bring")
        self._now_s += timeout_s
        if self._now_s > self._horizon_s:
            raise VirtualTimeError(f"still running after {self._horizon_s} virtual seconds")


def run_virtual(main: Coroutine[Any, Any, T], *, horizon_s: float = 86_400.0) -> T:
    """Run to the end in virtual time; the clock starts at 0. Raises: VirtualTimeError, and whatever `main` raises."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(horizon_s)) as runner:
        return runner.run(main)


def virtual(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Decorator: an async test (fixtures and all) that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_virtual(test(*args, **kwargs))

    return run
