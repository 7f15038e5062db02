"""What every core is: synchronous, deterministic, one door.

A core takes an event and the time and returns commands. It reads no clock, awaits nothing, and draws
no random number of its own; so one object is tested without a network, simulated at any scale, and
run for real. `common.runtime.shell` runs any core on an event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from common.messages.base import Record

EventT = TypeVar("EventT", contravariant=True)
CommandT = TypeVar("CommandT")


class InvariantViolated(AssertionError):
    """A core found its own state inconsistent, or was asked for an illegal transition."""

    @classmethod
    def told(cls, what: str, story: Iterable[str]) -> InvariantViolated:
        """With what led to it."""
        return cls(f"{what}; story:\n" + "\n".join(story))


def require(holds: bool, what: str) -> None:
    """Raises: InvariantViolated."""
    if not holds:
        raise InvariantViolated(what)


class TimePassed(Record, frozen=True, kw_only=True):
    """The event a shell hands in when `next_deadline_s` has come."""


class Core(Protocol[EventT, CommandT]):
    """A pure state machine. `now_s` is a monotonic clock and never goes back."""

    def handle(self, event: EventT, now_s: float) -> list[CommandT]:
        """Take one event; return what is to be done, in order."""
        ...

    def next_deadline_s(self) -> float | None:
        """When `handle(TimePassed(), now_s)` must be called at the latest; None: not needed."""
        ...

    def check(self) -> None:
        """Verify every invariant. Raises: InvariantViolated."""
        ...
