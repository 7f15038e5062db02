"""Child processes under supervision: started, restarted a bounded number of times, stopped for certain.

Each child writes to its own log file, never to a pipe that somebody must read. It runs in a session
of its own, so that Ctrl-C in the terminal reaches only the parent, which then stops the children in
the order it wants; and it dies with the parent (`launch.py`), also when that is killed hard.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from common.runtime.supervisor import Supervisor

LAUNCHER = Path(__file__).with_name("launch.py")
BACKOFF_S = 0.1
BACKOFF_MAX_S = 5.0
TAIL_LINES = 12
TAIL_BYTES_MAX = 8_192
EXIT_NOT_STARTED = 2
"""What our roles return when they cannot start, with one line on stderr that says why."""
REAP_S = 5.0
"""How long a process may take to vanish after SIGKILL."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run, and how."""

    name: str
    command: tuple[str, ...]
    log: Path
    env: Mapping[str, str] = field(repr=False)
    """The whole environment; it may hold secrets."""


class RestartBudget:
    """How often one child may crash: `crashes_max` within `window_s`, with a growing wait before each restart."""

    def __init__(self, crashes_max: int, window_s: float = 60.0) -> None:
        self._crashes_max = crashes_max
        self._window_s = window_s
        self._crashes_s: deque[float] = deque()

    def crashed(self, now_s: float) -> float | None:
        """Seconds to wait before the restart; None: it crashed too often."""
        self._crashes_s.append(now_s)
        while self._crashes_s[0] < now_s - self._window_s:
            self._crashes_s.popleft()
        count = len(self._crashes_s)
        return None if count > self._crashes_max else min(BACKOFF_S * 2 ** (count - 1), BACKOFF_MAX_S)


@dataclass(slots=True, eq=False)
class _Child:
    spec: ChildSpec
    process: asyncio.subprocess.Process
    budget: RestartBudget
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def runs(self) -> bool:
        return self.process.returncode is None


class Children:
    """`async with Children(say, restarts_max) as children:` — none of them outlives the block.

    `say` is told of every crash and restart, in words for a person. `given_up` is set, with
    `given_up_reason`, when a child crashed too often, or when one says, before `started()`, that it
    cannot start: trying again would not help then. The others run on until they are stopped.
    """

    def __init__(self, say: Callable[[str], None], restarts_max: int) -> None:
        self._say = say
        self._restarts_max = restarts_max
        self._children: dict[str, _Child] = {}
        self._tasks = Supervisor()
        self._in_a_hurry = False
        self._at_start = True
        self.given_up = asyncio.Event()
        self.given_up_reason = ""

    def __repr__(self) -> str:
        states = (
            f"{name}={child.process.pid}{'' if child.runs else ' ended'}" for name, child in self._children.items()
        )
        return f"<Children {', '.join(states)}>"

    async def start(self, spec: ChildSpec) -> int:
        """Start a child and watch it from now on; its process id. Raises: OSError."""
        process = await _spawn(spec)
        child = _Child(spec, process, RestartBudget(self._restarts_max))
        self._children[spec.name] = child
        self._tasks.spawn(self._watch(child), name=f"watch {spec.name}")
        return process.pid

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that run, by name."""
        return {name: child.process.pid for name, child in self._children.items() if child.runs}

    def started(self) -> None:
        """All is well so far: from now on, every end counts as a crash and is followed by a restart."""
        self._at_start = False

    async def stop(self, names: Iterable[str], grace_s: float) -> list[str]:
        """Ask these children to end, all at once, and kill those that have not within `grace_s`: their names."""
        children = [self._children[name] for name in names if name in self._children]
        outcomes = await asyncio.gather(*(self._stop(child, grace_s) for child in children))
        return [child.spec.name for child, obeyed in zip(children, outcomes, strict=True) if not obeyed]

    def hurry(self) -> None:
        """Kill every child now; a `stop` that waits has nothing to wait for any more."""
        self._in_a_hurry = True
        for child in self._children.values():
            child.stopping.set()
            _kill(child.process)

    async def _stop(self, child: _Child, grace_s: float) -> bool:
        child.stopping.set()
        if not child.runs:
            return True
        with suppress(ProcessLookupError):
            child.process.terminate()
        try:
            async with asyncio.timeout(0.0 if self._in_a_hurry else grace_s):
                await child.process.wait()
            return True
        except TimeoutError:
            await _kill_and_reap(child.process)
            return self._in_a_hurry  # it was given no time

    async def _watch(self, child: _Child) -> None:
        while await self._ended(child):
            if self._at_start and child.process.returncode == EXIT_NOT_STARTED:
                self._give_up(next(reversed(tail(child.spec.log, 1)), f"{child.spec.name} cannot start"))
                return
            delay_s = child.budget.crashed(asyncio.get_running_loop().time())
            if delay_s is None:
                self._give_up(f"{child.spec.name} crashed more than {self._restarts_max} times within a minute")
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await child.stopping.wait()
            if child.stopping.is_set():
                return
            try:
                child.process = await _spawn(child.spec)
            except OSError as error:
                self._give_up(f"{child.spec.name} cannot be started again: {error}")
                return
            if child.stopping.is_set():  # told to stop while it was being started
                _kill(child.process)
                return
            self._say(f"{child.spec.name} runs again (pid {child.process.pid})")

    async def _ended(self, child: _Child) -> bool:
        """Wait for the child's end; True: nobody asked for it."""
        status = await child.process.wait()
        if child.stopping.is_set():
            return False
        self._say(
            f"{child.spec.name} (pid {child.process.pid}) ended: {describe_status(status)}; log: {child.spec.log}"
        )
        for line in tail(child.spec.log):
            self._say(f"  | {line}")
        return True

    def _give_up(self, reason: str) -> None:
        self.given_up_reason = self.given_up_reason or reason
        self.given_up.set()

    async def __aenter__(self) -> Children:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hurry()
        await self._tasks.__aexit__(kind, error, trace)
        for child in self._children.values():
            await _kill_and_reap(child.process)


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a file; none if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES_MAX))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]


async def _spawn(spec: ChildSpec) -> asyncio.subprocess.Process:
    with spec.log.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *spec.command),
            env=dict(spec.env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )


async def _kill_and_reap(process: asyncio.subprocess.Process) -> None:
    _kill(process)
    async with asyncio.timeout(REAP_S):
        await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    """With all that it started: it leads a process group of its own."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
