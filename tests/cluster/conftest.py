from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from common.policy.decode_worker import DecodeWorkerCore
from common.policy.prefill_worker import PrefillWorkerCore
from common.policy.scheduler import Scheduler
from common.policy.sp_coordinator import SpCoordinator

NIGHTLY_TIMES = 25


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = getattr(metafunc.function, "seeds", None)
    if count is not None:
        times = NIGHTLY_TIMES if metafunc.config.getoption("--nightly") else 1
        metafunc.parametrize("seed", range(count * times))


@pytest.fixture(autouse=True)
def _checked_after_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Production checks a core when it idles; here, after every event."""

    def checked(handle: Callable[..., Any]) -> Callable[..., Any]:
        def handle_and_check(self: Any, event: Any, now_s: float) -> Any:
            commands = handle(self, event, now_s)
            self.check()
            return commands

        return handle_and_check

    for core in (Scheduler, SpCoordinator, PrefillWorkerCore, DecodeWorkerCore):
        monkeypatch.setattr(core, "handle", checked(core.handle))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Hundreds of clusters come and go; their log lines are for the failing one alone (`-s` shows none)."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    yield
    structlog.reset_defaults()
