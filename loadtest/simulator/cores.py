"""Workers that share the cores of one machine: a port of the world that a cluster of GPUs leaves empty.

On a live cluster without GPUs there may be more busy workers than cores. A worker that computes has one thread
at work, so it gets at most one core; where there are more such workers than cores, the cores are shared by
weight, as Linux does it among runnable threads (the weights of niceness are the kernel's, `sched_prio_to_weight`: each
level a factor of 1.25). And cores are not independent of each other: with all of them at work each one is slower than
one alone, because they share caches and memory. `together` is how fast then, measured.

Who computes a step at a time, and sleeps in between, also waits for a core at every step where all have something to
do, though it is due the next one: `crowded` is how fast then, measured. Or it comes first more often than its weight
says, for it has just slept: `step_gain` is by how much its weight counts for more, measured. And it keeps a distance
between its steps there (`common/policy/decode_pace.py`), which bounds what it can use.
"""

from __future__ import annotations

import math
from typing import Protocol

from common.policy.decode_pace import HOLD_S
from loadtest.simulator.timeline import Timeline

NICE_FACTOR = 1.25
"""Between the weights of two neighbouring levels of niceness (Linux, sched(7))."""


class Task(Protocol):
    """A worker that computes now."""

    def set_speed(self, speed: float) -> None:
        """Its work runs at this rate from now on; 1: as it would by itself."""
        ...


class Cores:
    """Of one machine."""

    def __init__(
        self,
        count: int,
        *,
        together: float = 1.0,
        crowded: float = 1.0,
        background_nice: int = 0,
        step_nice: int = 0,
        step_gain: float = 1.0,
        step_distance_s: float = 0.0,
    ) -> None:
        """`count`: cores, 1 or more. `together`: the speed of a core when all are busy, of one that is alone; over 0,
        in between it is linear. `crowded`: beside that, of who steps while there are more busy workers than cores, over
        0. `background_nice`, `step_nice`: niceness of what computes in the background, and of who steps; whose weight
        counts `step_gain` times. `step_distance_s`: from the begin of a step to that of the next, while there are more
        busy workers than cores, and for a while after (`HOLD_S`), where time passes (`attach`).
        Raises: ValueError."""
        if count < 1 or together <= 0.0 or crowded <= 0.0 or step_gain <= 0.0:
            raise ValueError(f"{count} cores at {together} and {crowded} of their speed: one at least, and it must run")
        self._count = count
        self._together = together
        self._crowded = crowded
        self._background = NICE_FACTOR**-background_nice
        self._step = step_gain * NICE_FACTOR**-step_nice
        self._step_distance_s = step_distance_s
        self._timeline: Timeline | None = None
        self._shared_until_s = -math.inf
        """So long steps keep their distance, though there is a core for each."""
        self._weights: dict[Task, float] = {}
        self._speeds: dict[Task, float] = {}
        self._step_s: dict[Task, float] = {}

    def attach(self, timeline: Timeline) -> None:
        """Time passes, as this says."""
        self._timeline = timeline

    def use(self, task: Task, *, background: bool = False, step_s: float | None = None) -> None:
        """It computes from now on. Tells everyone whose speed this changes, the task itself at its first use. `step_s`:
        with a pause after each step, which takes so long by itself; infinite: such as keep no distance."""
        weight = self._background if background else self._step if step_s is not None else 1.0
        if self._weights.get(task) == weight and self._step_s.get(task) == step_s:
            return
        self._weights[task] = weight
        if step_s is not None:
            self._step_s[task] = step_s
        self._share_out()

    def leave(self, task: Task) -> None:
        """It computes no more."""
        if self._weights.pop(task, None) is not None:
            self._speeds.pop(task, None)
            self._step_s.pop(task, None)
            self._share_out()

    def _share_out(self) -> None:
        weights = self._weights
        busy = min(len(weights), self._count)
        core_speed = 1.0
        if self._count > 1:
            core_speed -= (1.0 - self._together) * max(0, busy - 1) / (self._count - 1)
        cores, total = float(self._count), sum(weights.values())
        keeps_distance = self._steps_keep_distance()
        usable = {task: self._usable(task, core_speed, keeps_distance) for task in weights}
        changed: list[tuple[Task, float]] = []
        # Whoever is due more than it can use leaves the rest to the others; the first are those due the most of that.
        for task in sorted(weights, key=lambda task: usable[task] / weights[task]):
            part = min(usable[task], cores * weights[task] / total)
            cores, total = cores - part, total - weights[task]
            speed = part * core_speed
            has_its_distance = part == usable[task] < 1.0  # within which it waits for a core, too
            if len(weights) > self._count and task in self._step_s and not has_its_distance:
                speed *= self._crowded
            if self._speeds.get(task) != speed:
                self._speeds[task] = speed
                changed.append((task, speed))
        for task, speed in changed:
            if self._speeds.get(task) == speed:  # who was told may have changed everything again
                task.set_speed(speed)

    def _usable(self, task: Task, core_speed: float, keeps_distance: bool) -> float:
        """Of a core at most: one thread has one, and who keeps a distance between its steps not all of that."""
        step_s = self._step_s.get(task)
        if step_s is None or not keeps_distance:
            return 1.0
        return min(1.0, step_s / (core_speed * self._step_distance_s))

    def _steps_keep_distance(self) -> bool:
        """There are too few cores, or were not long ago; has this asked again when that is over."""
        if not self._step_distance_s:
            return False
        if len(self._weights) > self._count:
            self._shared_until_s = math.inf
        elif self._timeline is not None and math.isinf(self._shared_until_s) and self._shared_until_s > 0.0:
            self._shared_until_s = self._timeline.now_s + HOLD_S
            self._timeline.at(self._shared_until_s, self._let_step, self._shared_until_s)
        return len(self._weights) > self._count or (
            self._timeline is not None and self._timeline.now_s < self._shared_until_s
        )

    def _let_step(self, until_s: float) -> None:
        if self._shared_until_s == until_s:
            self._shared_until_s = -math.inf
            self._share_out()
