"""Workers that share the cores of one machine: a port of the world that a cluster of GPUs leaves empty.

On a live cluster without GPUs there may be more busy workers than cores. A worker that computes has one thread
at work, so it gets at most one core; where there are more such workers than cores, the cores are shared by
weight, as Linux does it among runnable threads (the weights of niceness are the kernel's, `sched_prio_to_weight`: each
level a factor of 1.25). And cores are not independent of each other: with all of them at work each one is slower than
one alone, because they share caches and memory. `together` is how fast then, measured.

Who computes a step at a time, and sleeps in between, also waits for a core at every step where all have something to
do, though it is due the next one: `crowded` is how fast then, measured. Or it comes first more often than its weight
says, for it has just slept: `step_gain` is by how much its weight counts for more, measured.
"""

from __future__ import annotations

from typing import Protocol

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
    ) -> None:
        """`count`: cores, 1 or more. `together`: the speed of a core when all are busy, of one that is alone; over 0,
        in between it is linear. `crowded`: beside that, of who steps while there are more busy workers than cores, over
        0. `background_nice`, `step_nice`: niceness of what computes in the background, and of who steps; whose weight
        counts `step_gain` times.
        Raises: ValueError."""
        if count < 1 or together <= 0.0 or crowded <= 0.0 or step_gain <= 0.0:
            raise ValueError(f"{count} cores at {together} and {crowded} of their speed: one at least, and it must run")
        self._count = count
        self._together = together
        self._crowded = crowded
        self._background = NICE_FACTOR**-background_nice
        self._step = step_gain * NICE_FACTOR**-step_nice
        self._weights: dict[Task, float] = {}
        self._speeds: dict[Task, float] = {}
        self._steppers: set[Task] = set()

    def use(self, task: Task, *, background: bool = False, steps: bool = False) -> None:
        """It computes from now on. Tells everyone whose speed this changes, the task itself at its first use. `steps`:
        with a pause after each; the same at every use."""
        if steps:
            self._steppers.add(task)
        weight = self._background if background else self._step if steps else 1.0
        if self._weights.get(task) != weight:
            self._weights[task] = weight
            self._share_out()

    def leave(self, task: Task) -> None:
        """It computes no more."""
        if self._weights.pop(task, None) is not None:
            self._speeds.pop(task, None)
            self._share_out()

    def _share_out(self) -> None:
        weights = self._weights
        busy = min(len(weights), self._count)
        core_speed = 1.0
        if self._count > 1:
            core_speed -= (1.0 - self._together) * max(0, busy - 1) / (self._count - 1)
        cores, total = float(self._count), sum(weights.values())
        changed: list[tuple[Task, float]] = []
        # The heaviest first: whoever is due more than a core gets one, and leaves the rest to the others.
        for task in sorted(weights, key=weights.__getitem__, reverse=True):
            part = min(1.0, cores * weights[task] / total)
            cores, total = cores - part, total - weights[task]
            speed = part * core_speed
            if len(weights) > self._count and task in self._steppers:
                speed *= self._crowded
            if self._speeds.get(task) != speed:
                self._speeds[task] = speed
                changed.append((task, speed))
        for task, speed in changed:
            if self._speeds.get(task) == speed:  # who was told may have changed everything again
                task.set_speed(speed)
