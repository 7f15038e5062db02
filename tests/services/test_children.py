"""Supervision of child processes, on real processes: restart, bound, stop, and no orphan ever."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from services.children import Children, ChildSpec, RestartBudget, describe_status, tail

PATIENCE_S = 20.0
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


class Voice:
    """What was said, to be waited for."""

    def __init__(self):
        self.lines = []
        self._said = asyncio.Event()

    def __call__(self, line):
        self.lines.append(line)
        self._said.set()

    async def hears(self, part):
        async with asyncio.timeout(PATIENCE_S):
            while not any(part in line for line in self.lines):
                self._said.clear()
                await self._said.wait()


@pytest.fixture
def spec(tmp_path):
    def make(name, code):
        return ChildSpec(
            name=name, command=(sys.executable, "-c", code), log=tmp_path / f"{name}.log", env=dict(os.environ)
        )

    return make


async def log_says(spec, text):
    """The child is a process of its own; its log file is the only thing it tells us."""
    async with asyncio.timeout(PATIENCE_S):
        while not any(text in line for line in tail(spec.log)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_restart_budget_counts_within_its_window_and_waits_longer_each_time():
    budget = RestartBudget(crashes_max=3, window_s=60.0)
    waits = [budget.crashed(now_s) for now_s in (0.0, 1.0, 2.0)]
    assert waits == sorted(waits)
    assert waits[0] < waits[2]
    assert budget.crashed(3.0) is None
    assert RestartBudget(crashes_max=0).crashed(0.0) is None


def test_old_crashes_are_forgiven():
    budget = RestartBudget(crashes_max=1, window_s=60.0)
    assert all(budget.crashed(now_s) is not None for now_s in (0.0, 61.0, 122.0))


def test_status_in_words():
    assert describe_status(-9) == "killed by SIGKILL"
    assert describe_status(3) == "exit status 3"


async def test_a_killed_child_is_restarted_under_a_new_pid_and_the_reason_is_said(spec):
    voice = Voice()
    sleeper = spec("role", SLEEPER)
    async with Children(voice, restarts_max=2) as children:
        first = await children.start(sleeper)
        await log_says(sleeper, "up")
        os.kill(first, signal.SIGKILL)
        await voice.hears("runs again")
        second = children.pids["role"]
        assert second != first
        assert any("killed by SIGKILL" in line for line in voice.lines)
        assert not children.given_up.is_set()
    assert not psutil.pid_exists(second)


async def test_a_child_that_keeps_crashing_is_given_up_with_its_last_words(spec):
    voice = Voice()
    async with Children(voice, restarts_max=2) as children:
        await children.start(spec("broken", "import sys; sys.exit('cannot find my hat')"))
        await asyncio.wait_for(children.given_up.wait(), PATIENCE_S)
        assert "broken crashed more than 2 times" in children.given_up_reason
        assert children.pids == {}
    assert sum("cannot find my hat" in line for line in voice.lines) >= 3
    assert sum("runs again" in line for line in voice.lines) == 2


async def test_a_command_that_does_not_exist_is_given_up(spec, tmp_path):
    voice = Voice()
    missing = ChildSpec(name="x", command=("no-such-command-here",), log=tmp_path / "x.log", env=dict(os.environ))
    async with Children(voice, restarts_max=0) as children:
        await children.start(missing)
        await asyncio.wait_for(children.given_up.wait(), PATIENCE_S)
    assert any("no-such-command-here" in line for line in voice.lines)


async def test_stop_asks_first_and_kills_what_does_not_obey(spec):
    voice = Voice()
    polite, stubborn = spec("polite", SLEEPER), spec("stubborn", STUBBORN)
    async with Children(voice, restarts_max=2) as children:
        for each in (polite, stubborn):
            await children.start(each)
            await log_says(each, "up")
        pids = children.pids
        assert await children.stop(["polite", "stubborn"], grace_s=0.3) == ["stubborn"]
        assert children.pids == {}
    assert not any(psutil.pid_exists(pid) for pid in pids.values())
    assert voice.lines == [], "an end that was asked for is no crash"


async def test_hurry_ends_a_stop_that_waits(spec):
    stubborn = spec("stubborn", STUBBORN)
    async with Children(Voice(), restarts_max=2) as children:
        await children.start(stubborn)
        await log_says(stubborn, "up")
        stopping = asyncio.ensure_future(children.stop(["stubborn"], grace_s=600.0))
        await asyncio.sleep(0)
        children.hurry()
        await asyncio.wait_for(stopping, PATIENCE_S)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_die_with_a_parent_that_is_killed_hard(tmp_path):
    parent = textwrap.dedent(f"""
        import asyncio, os, sys
        from pathlib import Path
        from services.children import Children, ChildSpec

        async def main():
            async with Children(print, 0) as children:
                command = (sys.executable, "-c", {SLEEPER!r})
                spec = ChildSpec("orphan", command, Path({str(tmp_path / "log")!r}), os.environ)
                print(await children.start(spec), flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    child.wait(timeout=PATIENCE_S)
    assert not child.is_running()
