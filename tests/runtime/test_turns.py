"""Longer turns on shared cores."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import StartupError
from common.runtime import turns
from common.runtime.bus import Bus
from common.runtime.process import EXIT_NOT_STARTED, EXIT_OK, run_role
from common.runtime.process import turns as asked_for
from common.runtime.store import Store
from common.settings import CommonSettings
from services.embedded import EmbeddedServer

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in turns.SCHED_SETATTR,
    reason="turns are set by a Linux system call, whose number is known for some machines",
)

SCHED_GETATTR = {number: number + 1 for number in turns.SCHED_SETATTR.values()}
SLICE_MS = 30
SLICES_SINCE = (6, 12)


def policy_and_slice_ms() -> tuple[int, float]:
    """Of this thread, as the kernel tells them."""
    buffer = ctypes.create_string_buffer(turns.SCHED_ATTR.size)
    number = SCHED_GETATTR[turns.SCHED_SETATTR[platform.machine()]]
    assert ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, buffer, len(buffer), 0) == 0
    _size, policy, _flags, _nice, _priority, runtime_ns, *_ = turns.SCHED_ATTR.unpack(buffer.raw)
    return policy, runtime_ns / 1e6


def kernel() -> tuple[int, int]:
    major, minor, *_ = platform.release().split(".")
    return int(major), int(minor)


def test_turns_are_taken_for_a_block_and_given_back() -> None:
    before = policy_and_slice_ms()
    with turns.long_turns(SLICE_MS):
        policy, slice_ms = policy_and_slice_ms()
        assert policy == os.SCHED_BATCH
        if kernel() >= SLICES_SINCE:
            assert slice_ms == SLICE_MS
    assert policy_and_slice_ms() == before


def test_nothing_changes_unless_asked() -> None:
    before = policy_and_slice_ms()
    with turns.long_turns(0):
        assert policy_and_slice_ms() == before


def test_politeness_is_kept() -> None:
    """`sched_setattr` sets niceness as well, and raising it again would be forbidden."""
    asks = "import os; from common.runtime.turns import take_turns; os.nice(5); take_turns(20); print(os.nice(0))"
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert done.stdout == "5\n"


def test_a_role_takes_turns_while_it_runs_its_threads_too() -> None:
    seen: list[tuple[int, float]] = []

    async def start(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        seen.extend((policy_and_slice_ms(), await asyncio.to_thread(policy_and_slice_ms)))

    async def servers_up() -> tuple[EmbeddedServer, EmbeddedServer]:
        nats, redis = EmbeddedServer.nats(), EmbeddedServer.redis()
        await nats.start()
        await redis.start()
        return nats, redis

    with asyncio.Runner() as runner:
        nats, redis = runner.run(servers_up())
        try:
            settings = CommonSettings(nats_url=nats.url, redis_url=redis.url)
            assert run_role("test", settings, start, cpu_slice_ms=SLICE_MS) == EXIT_OK
        finally:
            runner.run(nats.stop())
            runner.run(redis.stop())
    assert [policy for policy, _ in seen] == [os.SCHED_BATCH] * 2
    assert os.sched_getscheduler(0) != os.SCHED_BATCH


def test_a_system_that_does_not_allow_it_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns, "SCHED_SETATTR", {})

    async def never(bus: Bus, store: Store, stop: asyncio.Event) -> None:
        raise AssertionError("started all the same")

    assert run_role("router", CommonSettings(), never, cpu_slice_ms=SLICE_MS) == EXIT_NOT_STARTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pecsched router: cannot take turns of {SLICE_MS} ms: not known on ")
    assert line.endswith("leave --cpu-slice-ms at 0")
    with pytest.raises(StartupError), asked_for(SLICE_MS):
        pass


def test_an_error_in_the_block_is_the_blocks() -> None:
    """Only what asking for turns raises is about turns."""
    with pytest.raises(OSError, match="the disk is full"), asked_for(SLICE_MS):
        raise OSError("the disk is full")


def test_a_program_becomes_another_that_takes_turns(tmp_path: Path) -> None:
    """As an embedded NATS is started: by path, without the site's packages."""
    tells = "import os; print(os.getpid(), os.sched_getscheduler(0) == os.SCHED_BATCH)"
    command = [sys.executable, "-I", "-S", turns.__file__, str(SLICE_MS), sys.executable, "-c", tells]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.read() == f"{process.pid} True\n"


def test_a_program_that_is_not_there_is_named() -> None:
    command = [sys.executable, "-I", "-S", turns.__file__, "0", "/no/such/server"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "/no/such/server: No such file or directory\n")
