"""What prefills by so many workers really take, in times of what they were estimated to.

A worker measures itself while nothing else runs. In a group it computes beside others: on cores that they share, over
links that others use, in step with the slowest of them. Where that costs more than was estimated, groups are worth less
than they seem, and only their own prefills tell. So the planner hears how long each took, and multiplies.

What was heard of a degree fades with each prefill by another one: a degree that did badly is not chosen, and would else
never be heard of again.
"""

from __future__ import annotations

import math

HEARD = 0.5
"""Weight of the latest prefill."""
FADES = 0.05
"""Of the difference from the estimate, with each prefill of another degree: a degree that did half as well as estimated
gets another try after ten or twenty."""
TIMES_MIN, TIMES_MAX = 0.25, 8.0
"""A prefill that its machine held up for minutes says nothing of its degree."""


class Paces:
    def __init__(self) -> None:
        self._times: dict[int, float] = {}

    def __repr__(self) -> str:
        heard = ", ".join(f"{degree}: {times:.2f}" for degree, times in sorted(self._times.items()))
        return f"Paces({heard})"

    def of(self, degree: int) -> float:
        """Times of the estimate. A group of a degree that was never heard of is taken for one of the degree next to
        it; so is no group of one: it shares with nobody."""
        times = self._times.get(degree)
        if times is not None:
            return times
        groups = [known for known in self._times if known > 1]
        if degree == 1 or not groups:
            return 1.0
        return self._times[min(groups, key=lambda known: (abs(math.log(known / degree)), known))]

    def heard(self, degree: int, times: float) -> None:
        """A prefill by so many took so many times its estimate."""
        times = min(max(times, TIMES_MIN), TIMES_MAX)
        for other, known in self._times.items():
            if other != degree:
                self._times[other] = known + FADES * (1.0 - known)
        before = self._times.get(degree, times)
        self._times[degree] = before + HEARD * (times - before)
