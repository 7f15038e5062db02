"""A load that follows a trace: as many users as its rate wants.

A user asks `user_rps` times a second at most, so for a trace that has r requests per second about now (scaled by
`--trace-rate-scale`) there are r / user_rps users. Locust changes their number once a second. Their prompts are their
own, and they wait for their answers: exact arrivals and lengths are what `python -m loadtest run` replays.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from locust import LoadTestShape

WINDOW_S = 10.0
"""Over which the rate is counted, half of it to either side."""


class TraceShape(LoadTestShape):
    """Ends with the trace, or with `--run-time`."""

    def __init__(self, times_s: Sequence[float], user_rps: float, run_time_s: float | None = None) -> None:
        """`times_s`: arrivals in order, seconds after the start."""
        super().__init__()
        self._times_s = times_s
        self._user_rps = user_rps
        self._end_s = min(times_s[-1], run_time_s or math.inf)

    def tick(self) -> tuple[int, float] | None:
        """Users now, and how many to start or stop in a second."""
        now_s = self.get_run_time()
        if now_s > self._end_s:
            return None
        users = self.users_at(now_s)
        return users, float(max(users, 1))

    def users_at(self, now_s: float) -> int:
        """One at least: a trace's pauses are shorter than what it takes to start a user again."""
        low_s, high_s = max(0.0, now_s - WINDOW_S / 2), min(now_s + WINDOW_S / 2, self._times_s[-1])
        if high_s <= low_s:
            return 1
        arrived = bisect.bisect_left(self._times_s, high_s) - bisect.bisect_left(self._times_s, low_s)
        return max(1, math.ceil(arrived / (high_s - low_s) / self._user_rps))
