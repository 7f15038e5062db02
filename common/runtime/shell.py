"""Runs any core on an event loop: mailbox in, `handle`, commands out.

One event at a time: the core decides synchronously, then the commands are performed, then the next
event is taken. So a command that depends on the store is sent after the store was written, and the
order of effects is the order of decisions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from common.errors import PecSchedError
from common.policy.core import Core, InvariantViolated, TimePassed

EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")

YIELD_EVERY = 16
"""Events handled in one go before other tasks get their turn."""

IDLE_DEADLINES_MAX = 10_000
"""Deadlines in a row at one reading of the clock; a core that asks for more will never be satisfied."""


class MailboxFull(PecSchedError):
    """The core is further behind than its mailbox allows; the event was not taken."""


class JournalSink(Protocol):
    """Records what went in and what came out (`journal.py`)."""

    def append(self, now_s: float, event: object, commands: Sequence[object]) -> None: ...


class Durations:
    """The last `size` measured durations, in seconds."""

    def __init__(self, size: int = 4_096) -> None:
        self._last: deque[float] = deque(maxlen=size)
        self.count = 0
        """How many were measured in all."""

    def add(self, duration_s: float) -> None:
        self._last.append(duration_s)
        self.count += 1

    def quantile_s(self, q: float) -> float:
        """The q-quantile (0 ≤ q ≤ 1) of what is kept; 0.0 before the first."""
        ordered = sorted(self._last)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


class CoreShell(Generic[EventT, CommandT]):
    """Owns a core: nobody else calls its `handle`.

    `perform` carries out the commands of one event, in order; what can fail there ends in an event of
    its own, told back. An exception in the core or in `perform` ends `run`: the process must not go on
    with a state nobody can vouch for. `on_decision` is told how long each call of `handle` took, in seconds.
    """

    def __init__(
        self,
        name: str,
        core: Core[EventT | TimePassed, CommandT],
        perform: Callable[[list[CommandT]], Awaitable[None]],
        *,
        mailbox_max: int = 10_000,
        journal: JournalSink | None = None,
        check_every_s: float = 1.0,
        on_decision: Callable[[float], None] = lambda _duration_s: None,
    ) -> None:
        self.name = name
        self.core = core
        self.decisions = Durations()
        """Time spent inside `handle`."""
        self._perform = perform
        self._mailbox: deque[EventT] = deque()
        self._mailbox_max = mailbox_max
        self._journal = journal
        self._check_every_s = check_every_s
        self._on_decision = on_decision
        self._checked_s = float("-inf")
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()

    def __repr__(self) -> str:
        return f"CoreShell({self.name!r}, waiting={len(self._mailbox)}, decisions={self.decisions.count})"

    @property
    def decision_p50_s(self) -> float:
        return self.decisions.quantile_s(0.5)

    @property
    def decision_p99_s(self) -> float:
        return self.decisions.quantile_s(0.99)

    def tell(self, event: EventT) -> None:
        """Put an event into the mailbox. From the loop's thread only. Raises: MailboxFull."""
        if len(self._mailbox) >= self._mailbox_max:
            raise MailboxFull(f"{self.name}: {self._mailbox_max} events wait already; {type(event).__name__} dropped")
        self._mailbox.append(event)
        self._idle.clear()
        self._wake.set()

    async def drained(self) -> None:
        """Wait until the mailbox is empty and the commands of its last event are performed. For tests and shutdown."""
        await self._idle.wait()

    async def run(self) -> None:
        """Serve until cancelled. Raises whatever the core or `perform` raised."""
        loop = asyncio.get_running_loop()
        since_yield = in_a_row = 0
        while True:
            now_s = loop.time()
            deadline_s = self.core.next_deadline_s()
            if deadline_s is not None and deadline_s <= now_s and (in_a_row == 0 or not self._mailbox):
                in_a_row += 1
                if in_a_row > IDLE_DEADLINES_MAX:
                    raise InvariantViolated(f"{self.name}: deadline {deadline_s} stays due at {now_s}")
                await self._step(TimePassed(), now_s)
            elif self._mailbox:
                in_a_row = 0
                await self._step(self._mailbox.popleft(), now_s)
            else:
                in_a_row = since_yield = 0
                await self._rest(loop, now_s, deadline_s)
                continue
            since_yield += 1
            if since_yield >= YIELD_EVERY:
                since_yield = 0
                await asyncio.sleep(0)

    async def _step(self, event: EventT | TimePassed, now_s: float) -> None:
        started_s = perf_counter()
        commands = self.core.handle(event, now_s)
        took_s = perf_counter() - started_s
        self.decisions.add(took_s)
        self._on_decision(took_s)
        if self._journal is not None:
            self._journal.append(now_s, event, commands)
        if commands:
            await self._perform(commands)

    async def _rest(self, loop: asyncio.AbstractEventLoop, now_s: float, deadline_s: float | None) -> None:
        """Nothing to do: check the invariants (not more often than `check_every_s`), then sleep until told or due."""
        if now_s - self._checked_s >= self._check_every_s:
            self._checked_s = now_s
            self.core.check()
        self._idle.set()
        self._wake.clear()
        timer = None if deadline_s is None else loop.call_at(deadline_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()
