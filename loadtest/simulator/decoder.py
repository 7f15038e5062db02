"""A simulated decode worker: continuous batching of shorts whose KV was sent here.

It answers as `common.policy.decode_worker` does: `DecodeFinished` after the last token, `KvReleased` to every
`DropRequest`. The step time is taken anew whenever a
row joins or leaves.
"""

from __future__ import annotations

import math

from common.messages.decode import DecodeFinished
from common.messages.prefill import KvReleased
from common.policy.decode_pace import GATHERED_ROWS
from common.units import WorkerId
from loadtest.simulator.decode_batch import DecodeBatch
from loadtest.simulator.job import Job
from loadtest.simulator.kv_books import KvBooks
from loadtest.simulator.site import Site, Word


class Decoder:
    __slots__ = ("_batch", "_serial", "_site", "_speed", "_work_since_s", "busy_s", "kv", "node", "worker_id")

    def __init__(self, site: Site, worker_id: WorkerId, node: str, kv_capacity_tokens: int) -> None:
        self._site = site
        self.worker_id = worker_id
        self.node = node
        self.kv = KvBooks(worker_id, kv_capacity_tokens)
        self.busy_s = 0.0
        self._batch = DecodeBatch()
        self._serial = 0
        self._speed = 1.0
        self._work_since_s = 0.0

    def receive(self, job: Job) -> None:
        """Its KV is here."""
        now_s = self._site.timeline.now_s
        batch = self._batch
        batch.advance(now_s)
        if not batch:
            self._site.usage.add(now_s, 1, 0, 0)
            self._work_since_s = now_s
        batch.join(job, job.tokens, job.output_tokens - 1)
        self._pace()

    def set_speed(self, speed: float) -> None:
        """See `cores.Task`."""
        self._speed = speed
        if self._batch:
            self._batch.advance(self._site.timeline.now_s)
            self._pace()

    def drop(self, job: Job) -> None:
        """Ordered by the scheduler."""
        batch = self._batch
        if job in batch:
            batch.advance(self._site.timeline.now_s)
            batch.leave(job)
            self._pace()
        freed = self.kv.free(job.request_id)
        word = KvReleased(
            worker_id=self.worker_id, request_id=job.request_id, attempt=job.spec.attempt, kv_tokens=freed
        )
        self._site.tell(((job, word),))

    def _pace(self) -> None:
        """The batch changed: take its step time anew, and when the next row ends."""
        batch, site = self._batch, self._site
        self._serial = serial = self._serial + 1
        rows = len(batch)
        if rows:
            alone_s = site.costs.decode_step_s(rows, batch.kv_tokens)
            if site.cores is not None:
                # May say a new speed, by which this comes here again.
                site.cores.use(self, step_s=alone_s if rows < GATHERED_ROWS else math.inf)
                if self._serial != serial:
                    return
            batch.step_s = alone_s / self._speed
            site.timeline.at(batch.next_end_s(), self._due, self._serial)
            return
        now_s = site.timeline.now_s
        site.usage.add(now_s, -1, 0, 0)
        self.busy_s += now_s - self._work_since_s
        if site.cores is not None:
            site.cores.leave(self)

    def _due(self, serial: int) -> None:
        if serial != self._serial:
            return
        batch, site = self._batch, self._site
        now_s = site.timeline.now_s
        batch.advance(now_s)
        words: list[Word] = []
        for job in batch.take_finished():
            job.finished_s = now_s
            words.append(finished_word(self.worker_id, job, self.kv.free(job.request_id)))
            if site.recorder is not None and job.first_token_s is not None:
                lane = f"{self.worker_id} decode"
                site.recorder.span(lane, "short decode", job.first_token_s, now_s, job.request_id)
        self._pace()
        if words:
            site.tell(words)


def finished_word(worker_id: WorkerId, job: Job, kv_tokens: int) -> Word:
    """The last token is out, and its KV is free."""
    return job, DecodeFinished(
        worker_id=worker_id,
        request_id=job.request_id,
        attempt=job.spec.attempt,
        finish_reason="length",
        generated=job.output_tokens,
        kv_tokens=kv_tokens,
    )


def released_word(worker_id: WorkerId, job: Job, kv_tokens: int) -> Word:
    """Nothing of it is held on this worker any more."""
    return job, KvReleased(
        worker_id=worker_id, request_id=job.request_id, attempt=job.spec.attempt, kv_tokens=kv_tokens
    )
