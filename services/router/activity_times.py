"""Times to the first token of the last minute, by length class."""

from __future__ import annotations

import math
from collections import deque

from common.messages.requests import LengthClass

WINDOW_S = 60.0
SAMPLES_MAX = 4_096
"""Of one class; beyond, the window is as long as these reach back."""


class FirstTokens:
    def __init__(self) -> None:
        self._samples: dict[LengthClass, deque[tuple[float, float]]] = {
            "short": deque(maxlen=SAMPLES_MAX),
            "long": deque(maxlen=SAMPLES_MAX),
        }

    def add(self, length_class: LengthClass, now_s: float, ttft_s: float) -> None:
        self._samples[length_class].append((now_s, ttft_s))

    def p99_s(self, length_class: LengthClass, now_s: float) -> float | None:
        """The smallest time that at least 99 % of the window's took no longer than; None: there is none."""
        samples = self._samples[length_class]
        while samples and now_s - samples[0][0] > WINDOW_S:
            samples.popleft()
        if not samples:
            return None
        times = sorted(ttft_s for _, ttft_s in samples)
        return round(times[math.ceil(0.99 * len(times)) - 1], 4)
