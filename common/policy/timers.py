"""Deadlines of a core: a heap with lazy cancellation."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


class Timers(Generic[KeyT]):
    """At most one deadline per key: setting it again moves it. Set, drop, due: O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, KeyT]] = []
        self._current: dict[KeyT, int] = {}
        """Serial of the entry that counts."""
        self._serial = 0

    def at(self, deadline_s: float, key: KeyT) -> None:
        self._serial += 1
        self._current[key] = self._serial
        heapq.heappush(self._heap, (deadline_s, self._serial, key))

    def drop(self, key: KeyT) -> None:
        self._current.pop(key, None)

    def due(self, now_s: float) -> Iterator[KeyT]:
        """Every key whose deadline has come, earliest first; each is taken off."""
        while self._heap and self._heap[0][0] <= now_s:
            _, serial, key = heapq.heappop(self._heap)
            if self._current.get(key) == serial:
                del self._current[key]
                yield key

    def next_s(self) -> float | None:
        heap = self._heap
        while heap:
            deadline_s, serial, key = heap[0]
            if self._current.get(key) == serial:
                return deadline_s
            heapq.heappop(heap)
        return None

    def __len__(self) -> int:
        return len(self._current)
