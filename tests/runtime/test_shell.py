"""The shell: order, deadlines, bounds, and an end when the core can no longer be trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from common.policy.core import InvariantViolated, TimePassed
from common.runtime.shell import CoreShell, Durations, MailboxFull
from common.runtime.supervisor import Supervisor
from common.runtime.virtual_time import virtual


class Echo:
    """Answers every event with itself, and with "due" when one of its deadlines has come."""

    def __init__(self, deadlines_s: Sequence[float] = ()) -> None:
        self.deadlines_s = sorted(deadlines_s)
        self.handled: list[tuple[float, object]] = []
        self.checks = 0

    def handle(self, event: str | TimePassed, now_s: float) -> list[str]:
        self.handled.append((now_s, event))
        if isinstance(event, TimePassed):
            self.deadlines_s = [d for d in self.deadlines_s if d > now_s]
            return ["due"]
        if event == "fail":
            raise InvariantViolated("told to fail")
        return [] if event == "nothing" else [event]

    def next_deadline_s(self) -> float | None:
        return self.deadlines_s[0] if self.deadlines_s else None

    def check(self) -> None:
        self.checks += 1


class Performed:
    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    async def __call__(self, commands: list[str]) -> None:
        await asyncio.sleep(0.001)
        self.batches.append(commands)


@virtual
async def test_commands_are_performed_in_the_order_of_events() -> None:
    core, performed = Echo(), Performed()
    shell = CoreShell("echo", core, performed)
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        for i in range(100):
            shell.tell(str(i))
        shell.tell("nothing")
        await shell.drained()
    assert performed.batches == [[str(i)] for i in range(100)]
    assert core.handled[-1][1] == "nothing"


@virtual
async def test_an_event_is_handled_only_after_the_commands_before_it_are_performed() -> None:
    core, gate = Echo(), asyncio.Event()

    async def perform(_: list[str]) -> None:
        await gate.wait()

    shell = CoreShell("echo", core, perform)
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        shell.tell("first")
        shell.tell("second")
        await asyncio.sleep(1.0)
        assert [event for _, event in core.handled] == ["first"]
        gate.set()
        await shell.drained()
    assert [event for _, event in core.handled] == ["first", "second"]


@virtual
async def test_deadlines_come_on_time_and_only_then() -> None:
    core, performed = Echo([2.0, 5.0]), Performed()
    shell = CoreShell("echo", core, performed)
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        await asyncio.sleep(10.0)
    assert [now_s for now_s, event in core.handled if isinstance(event, TimePassed)] == [2.0, 5.0]
    assert performed.batches == [["due"], ["due"]]


@virtual
async def test_an_event_may_bring_an_earlier_deadline() -> None:
    core = Echo([100.0])
    shell = CoreShell("echo", core, Performed())
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        await asyncio.sleep(1.0)
        core.deadlines_s.insert(0, 3.0)
        shell.tell("wake up")
        await asyncio.sleep(10.0)
    assert [now_s for now_s, event in core.handled if isinstance(event, TimePassed)] == [3.0]


@virtual
async def test_a_full_mailbox_does_not_hold_up_a_deadline() -> None:
    core = Echo([0.0])
    shell = CoreShell("echo", core, Performed())
    for i in range(50):
        shell.tell(str(i))
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        await shell.drained()
    assert isinstance(core.handled[0][1], TimePassed)
    assert len(core.handled) == 51


@virtual
async def test_deadlines_that_are_always_due_do_not_hold_up_the_mailbox() -> None:
    class Hurried(Echo):
        def next_deadline_s(self) -> float | None:
            return 0.0

    core = Hurried()
    shell = CoreShell("hurried", core, Performed())
    for i in range(5):
        shell.tell(str(i))
    with pytest.raises(InvariantViolated, match="stays due"):
        await shell.run()
    assert [event for _, event in core.handled if isinstance(event, str)] == ["0", "1", "2", "3", "4"]


@virtual
async def test_an_exception_in_the_core_ends_the_shell_and_its_owner() -> None:
    core, performed = Echo(), Performed()
    shell = CoreShell("echo", core, performed)
    with pytest.raises(InvariantViolated, match="told to fail"):  # noqa: PT012
        async with Supervisor() as tasks:
            tasks.spawn(shell.run(), name="shell")
            for event in ("before", "fail", "after"):
                shell.tell(event)
            await asyncio.sleep(100.0)
    assert asyncio.get_running_loop().time() < 1.0
    assert performed.batches == [["before"]]


@virtual
async def test_an_exception_while_performing_ends_the_shell() -> None:
    async def perform(_: list[str]) -> None:
        raise OSError("no store")

    shell = CoreShell("echo", Echo(), perform)
    shell.tell("event")
    with pytest.raises(OSError, match="no store"):
        await shell.run()


@virtual
async def test_the_mailbox_is_bounded() -> None:
    shell = CoreShell("echo", Echo(), Performed(), mailbox_max=3)
    for _ in range(3):
        shell.tell("event")
    with pytest.raises(MailboxFull, match="echo: 3 events wait already; str dropped"):
        shell.tell("one more")
    assert repr(shell) == "CoreShell('echo', waiting=3, decisions=0)"


@virtual
async def test_invariants_are_checked_at_idle_and_not_too_often() -> None:
    core = Echo()
    shell = CoreShell("echo", core, Performed(), check_every_s=1.0)
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        for _ in range(100):
            shell.tell("event")
            await asyncio.sleep(0.1)
    assert 8 <= core.checks <= 12


@virtual
async def test_a_broken_invariant_found_at_idle_ends_the_shell() -> None:
    class Broken(Echo):
        def check(self) -> None:
            raise InvariantViolated("two longs on one worker")

    with pytest.raises(InvariantViolated, match="two longs"):
        await CoreShell("broken", Broken(), Performed()).run()


@virtual
async def test_other_tasks_get_their_turn_while_the_mailbox_is_full() -> None:
    async def perform(_: list[str]) -> None:
        return

    shell = CoreShell("echo", Echo(), perform)
    for i in range(1_000):
        shell.tell(str(i))
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < shell.decisions.count < 1_000


@virtual
async def test_every_decision_is_journalled_with_its_time() -> None:
    class Sink:
        def __init__(self) -> None:
            self.entries: list[tuple[float, object, list[object]]] = []

        def append(self, now_s: float, event: object, commands: Sequence[object]) -> None:
            self.entries.append((now_s, event, list(commands)))

    sink = Sink()
    shell = CoreShell("echo", Echo([4.0]), Performed(), journal=sink)
    async with Supervisor() as tasks:
        tasks.spawn(shell.run(), name="shell")
        shell.tell("hello")
        await asyncio.sleep(5.0)
    assert sink.entries == [(0.0, "hello", ["hello"]), (4.0, TimePassed(), ["due"])]
    assert shell.decisions.count == 2
    assert 0.0 < shell.decision_p50_s <= shell.decision_p99_s


def test_quantiles_are_of_the_last_ones() -> None:
    durations = Durations(size=100)
    assert durations.quantile_s(0.5) == 0.0
    for i in range(1_000):
        durations.add(float(i))
    assert durations.count == 1_000
    assert (durations.quantile_s(0.0), durations.quantile_s(0.5), durations.quantile_s(0.99)) == (900.0, 950.0, 999.0)
    assert durations.quantile_s(1.0) == 999.0
