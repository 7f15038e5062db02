"""Simulated time: a heap of what happens next, and work that runs down at a changing rate.

Entries are plain tuples and handlers bound methods: this is the innermost loop of a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappush
from typing import Any, TypeVar

T = TypeVar("T")

EPSILON = 1e-7
"""Work below this is done: rounding of times of some hours, at any rate met here, stays below it."""


class Timeline:
    """What happens next, in order of time; at equal times, in the order in which it was entered."""

    __slots__ = ("_serial", "heap", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        """(when, serial, what to call, with what). Whoever runs it takes entries off and sets `now_s`."""
        self._serial = 0

    def at(self, when_s: float, do: Callable[[T], None], what: T) -> None:
        """Call `do(what)` then."""
        self._serial += 1
        heappush(self.heap, (when_s, self._serial, do, what))


class Countdown:
    """Work that runs down at a rate which others change, and a word when it is done.

    One entry of the timeline stands for its end. When the rate falls, that entry comes too early and is
    entered again then: a change costs no entry unless it brings the end nearer.
    """

    __slots__ = ("_done", "_due_s", "_serial", "_since_s", "_timeline", "left", "rate")

    def __init__(self, timeline: Timeline, work: float, done: Callable[[], None]) -> None:
        self._timeline = timeline
        self._done = done
        self.left = work
        self.rate = 0.0
        self._since_s = timeline.now_s
        self._due_s = math.inf
        self._serial = 0

    def set_rate(self, rate: float) -> None:
        """Work per second from now on; 0: it stands still."""
        now_s = self._timeline.now_s
        self.left -= (now_s - self._since_s) * self.rate
        self._since_s = now_s
        self.rate = rate
        self._aim(now_s)

    def change_to(self, work: float) -> None:
        """So much is left; it stands still."""
        self.left = work
        self._due_s = math.inf
        self._serial += 1

    def _aim(self, now_s: float) -> None:
        if self.rate <= 0.0:
            return
        end_s = now_s + max(0.0, self.left) / self.rate
        if end_s < self._due_s:
            self._due_s = end_s
            self._serial += 1
            self._timeline.at(end_s, self._due, self._serial)

    def _due(self, serial: int) -> None:
        if serial != self._serial:
            return
        self._due_s = math.inf
        now_s = self._timeline.now_s
        self.left -= (now_s - self._since_s) * self.rate
        self._since_s = now_s
        if self.left > EPSILON:
            self._aim(now_s)
        elif self.rate > 0.0:
            self.rate = 0.0
            self._done()
