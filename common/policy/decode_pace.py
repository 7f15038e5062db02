"""When the next decode step may begin, on cores that are shared with others.

A step costs nearly the same for one row as for eight: it reads the weights once. A decode worker that has a processor
of its own begins each step as the last one ends. One that had to wait for a core takes from others what it uses,
and the fewer steps it computes the tokens of its rows in, the less that is. So while there are more threads at work
than cores, steps begin no closer together than `crowded_itl_s`: rows that arrive meanwhile share the next one, and
nobody's tokens come more slowly than that, or than one step at a time allows. Where enough rows are together there is
nothing to gather: these go on at once, for to hold them back would fill the batch and keep new shorts out.
"""

from __future__ import annotations

from common.units import Seconds

WAITED_SHARE = 0.3
"""Of a step's time, spent ready to run without a core: from here on the cores are shared. Two threads that prefill
longs on two cores make a step wait for more than half of its time; what runs in the background of an idle machine, for
less than a tenth."""
GATHERED_ROWS = 8
"""A step of so many is worth its while."""
HOLD_S = 2.0
"""Having waited, for how long the cores count as shared. A step that begins after a rest often gets a core at once and
makes somebody else wait."""


class Pace:
    """Of one decode worker; `crowded_itl_s` 0: steps follow each other at once."""

    def __init__(self, crowded_itl_s: Seconds) -> None:
        self._crowded_itl_s = crowded_itl_s
        self._begun_s = float("-inf")
        self._crowded_until_s = float("-inf")

    def step_began(self, now_s: Seconds) -> None:
        self._begun_s = now_s

    def step_ended(self, core_wait_s: Seconds, now_s: Seconds) -> None:
        """`core_wait_s`: of the step that began last, how long it was ready to run and had no core."""
        if core_wait_s > WAITED_SHARE * (now_s - self._begun_s):
            self._crowded_until_s = now_s + HOLD_S

    def next_step_s(self, rows: int, now_s: Seconds) -> Seconds:
        """When the next step, of so many rows, may begin; not after `now_s`: at once."""
        gathers = now_s < self._crowded_until_s and rows < GATHERED_ROWS
        return self._begun_s + self._crowded_itl_s if gathers else now_s
