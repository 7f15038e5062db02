"""Continuous batching without an event per token.

All rows of a batch gain one token per step, so one *virtual token clock* serves them all: it counts the steps
the batch has done since the beginning. A row that joins when the clock shows v and has n tokens to go ends when
it shows v + n, however often the step time changes in between. A join or a leave costs O(log rows).
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from loadtest.simulator.job import Job
from loadtest.simulator.timeline import EPSILON


class DecodeBatch:
    __slots__ = ("_heap", "_kv_base", "_rows", "_serial", "_since_s", "_steps", "step_s")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        """(clock at which the row ends, serial, row); may hold rows that left."""
        self._rows: dict[str, float] = {}
        """Request → its KV less the clock, both as it joined."""
        self._kv_base = 0.0
        self._serial = 0
        self._steps = 0.0
        """The clock, as of `_since_s`."""
        self._since_s = 0.0
        self.step_s = math.inf
        """Of one step now."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, job: Job) -> bool:
        return job.request_id in self._rows

    def advance(self, now_s: float) -> None:
        """Bring the clock to now. Before any change."""
        if self._rows:
            self._steps += (now_s - self._since_s) / self.step_s
        self._since_s = now_s

    def join(self, job: Job, kv_tokens: int, tokens: int) -> None:
        """A row with `kv_tokens` of KV and `tokens` still to come."""
        base = kv_tokens - self._steps
        self._rows[job.request_id] = base
        self._kv_base += base
        self._serial += 1
        heappush(self._heap, (self._steps + tokens, self._serial, job))

    def leave(self, job: Job) -> None:
        """Before its end."""
        self._kv_base -= self._rows.pop(job.request_id)

    def take_finished(self) -> list[Job]:
        """Rows whose last token is out, as of the last `advance`; they leave."""
        finished: list[Job] = []
        heap, rows = self._heap, self._rows
        while heap and (heap[0][0] <= self._steps + EPSILON or heap[0][2].request_id not in rows):
            job = heappop(heap)[2]
            if job.request_id in rows:
                self.leave(job)
                finished.append(job)
        return finished

    @property
    def kv_tokens(self) -> int:
        """KV of all rows halfway to the next row's end: the step time is taken there and kept until the batch
        changes."""
        rows = len(self._rows)
        if not rows:
            return 0
        ahead = (self._heap[0][0] - self._steps) / 2
        return int(self._kv_base + rows * (self._steps + ahead))

    def next_end_s(self) -> float:
        """When the next row ends at this pace; infinite without rows."""
        if not self._rows:
            return math.inf
        return self._since_s + max(0.0, self._heap[0][0] - self._steps) * self.step_s
