"""A simulated prefill worker: a local queue of shorts, a long that prefills, longs that decode, and (without
disaggregation) shorts that decode where they prefilled.

The rules are those of `common.policy.prefill_passes`, whole passes at a time:

- A long that may run holds back every short but those that came before it; a pass that has begun is
  finished first. While it is paused, shorts run.
- Shorts go first come first served, packed into passes of `batch_tokens_max` tokens; a longer one goes alone.
- Where something decodes, passes share its steps. With a long's decode, a step takes `colocated_tokens_max` short
  tokens, a longer short several steps. An *exclusive* short shares none: the whole group's decode stands still.
- While one long prefills, it and the steps of whatever else decodes here take turns. Its turn is a chunk, or what a
  step leaves of `long_itl_s_max`, if that is less: a decode step takes a turn longer, and the prefill runs at
  turn / (turn + step) of its rate. (So does the live worker.)

Simplified: no pass takes shorts that come after it has begun; the steps of a pass take as long as they would at its
start; of a group's step, only the members that make it longest count.
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from common.messages.prefill import PrefillFinished
from common.units import WorkerId
from loadtest.simulator.decode_batch import DecodeBatch
from loadtest.simulator.decoder import Decoder, finished_word, released_word
from loadtest.simulator.job import Job
from loadtest.simulator.kv_books import KvBooks
from loadtest.simulator.site import Site, Word
from loadtest.simulator.timeline import Countdown

if TYPE_CHECKING:
    from loadtest.simulator.group import Group


class Pass:
    """Of shorts, running."""

    __slots__ = ("began_s", "exclusive", "jobs", "step_s", "work")

    def __init__(self, jobs: list[Job], began_s: float, step_s: float, *, exclusive: bool) -> None:
        self.jobs = jobs
        self.began_s = began_s
        self.step_s = step_s
        """Of one of its steps: what shares them decodes at this pace."""
        self.exclusive = exclusive
        self.work: Countdown | None = None
        """What is left of it, where cores are shared: when it ends is then not known at its start."""


class Replica:
    __slots__ = (
        "_alone_s",
        "_decoders",
        "_group_kv",
        "_groups",
        "_longs",
        "_queue",
        "_rows",
        "_rows_serial",
        "_running",
        "_seat",
        "_shorts",
        "_site",
        "_work_since_s",
        "ahead",
        "busy_s",
        "kv",
        "node",
        "speed",
        "worker_id",
    )

    def __init__(
        self, site: Site, worker_id: WorkerId, node: str, kv_capacity_tokens: int, decoders: dict[str, Decoder]
    ) -> None:
        self._site = site
        self._decoders = decoders
        self.worker_id = worker_id
        self.node = node
        self.kv = KvBooks(worker_id, kv_capacity_tokens)
        self.busy_s = 0.0
        self.ahead = 0
        """Shorts in the queue that came before the long in the seat."""
        self._queue: deque[Job] = deque()
        self._running: Pass | None = None
        self._seat: Group | None = None
        """Whose long prefills here, running or paused."""
        self._groups: list[Group] = []
        """Whose longs decode here."""
        self._group_kv = 0
        self._alone_s = 0.0
        """Of a decode step of the longs here, if nothing else decodes; 0: not known."""
        self._rows = DecodeBatch()
        """Shorts that decode here."""
        self._rows_serial = 0
        self._shorts = self._longs = 0
        """Activities that keep it busy."""
        self._work_since_s = 0.0
        self.speed = 1.0
        """Of whatever computes here; see `cores.py`."""

    # --- orders of the scheduler -----------------------------------------------------------------

    def take(self, job: Job) -> None:
        """A short joins the local queue."""
        stays = job.decode_worker_id == self.worker_id
        self.kv.reserve(job.request_id, job.spec.kv_tokens if stays else job.tokens)
        job.received_s = self._site.timeline.now_s
        self._queue.append(job)
        if self._running is None:
            self.start_pass()

    def drop(self, job: Job) -> None:
        """Wherever it stands. In a pass, its tokens are computed for nobody."""
        if job in self._queue:
            if self._seat is not None and self._queue.index(job) < self.ahead:
                self.ahead -= 1
            self._queue.remove(job)
        running = self._running
        if running is not None and job in running.jobs:
            running.jobs.remove(job)
        if job in self._rows:
            self._rows.advance(self._site.timeline.now_s)
            self._rows.leave(job)
            self._rows_changed()
        self._site.tell((self._released(job),))

    def _released(self, job: Job) -> Word:
        return released_word(self.worker_id, job, self.kv.free(job.request_id))

    # --- passes of shorts ------------------------------------------------------------------------

    def start_pass(self) -> None:
        """The next one, if there is anything to run and nothing in its way."""
        queue, seat = self._queue, self._seat
        if self._running is not None or not queue or (seat is not None and not seat.stands and not self.ahead):
            return
        timeline = self._site.timeline
        now_s = timeline.now_s
        exclusive = queue[0].exclusive and bool(self._groups)
        jobs = self._pack(exclusive=exclusive)
        pass_s, step_s = self._times(jobs, exclusive=exclusive)
        self._running = running = Pass(jobs, now_s, step_s, exclusive=exclusive)
        self._short_begins()
        if self._site.cores is None:
            timeline.at(now_s + pass_s, self._pass_ended, running)
        else:
            running.work = Countdown(timeline, pass_s, partial(self._pass_ended, running))
            running.work.set_rate(self.speed)
        for job in jobs:
            job.prefill_started_s = now_s
        if self._groups or self._rows:
            self.pace()

    def _pack(self, *, exclusive: bool) -> list[Job]:
        limits, queue, seat = self._site.limits, self._queue, self._seat
        shared = bool(self._groups) and not exclusive
        room = limits.colocated_tokens_max if shared else limits.batch_tokens_max
        most = len(queue) if seat is None or seat.stands else self.ahead
        first = queue.popleft()
        jobs = [first]
        room -= first.tokens
        while len(jobs) < most and queue[0].tokens <= room and queue[0].exclusive is first.exclusive:
            job = queue.popleft()
            room -= job.tokens
            jobs.append(job)
        self.ahead = max(0, self.ahead - len(jobs))
        return jobs

    def _times(self, jobs: list[Job], *, exclusive: bool) -> tuple[float, float]:
        """Of the pass, and of one of its steps (which may be the pass)."""
        costs = self._site.costs
        rows = len(self._rows) + len(self._groups)
        if exclusive or not rows:
            pass_s = costs.batch_s([job.tokens for job in jobs])
            return pass_s, pass_s
        limits = self._site.limits
        cap = limits.colocated_tokens_max if self._groups else limits.batch_tokens_max
        tokens = sum(job.tokens for job in jobs)
        kv_tokens = self._group_kv + self._rows.kv_tokens
        network_s = max((group.network_s for group in self._groups), default=0.0)
        steps = math.ceil(tokens / cap)
        step_s = costs.shared_step_s(min(tokens, cap), rows, kv_tokens)
        last_s = step_s if steps == 1 else costs.shared_step_s(tokens - (steps - 1) * cap, rows, kv_tokens)
        pass_s = (steps - 1) * step_s + last_s + steps * network_s
        return pass_s, pass_s / steps - network_s

    def _pass_ended(self, ended: Pass) -> None:
        self._running = None
        self._short_rests()
        site = self._site
        now_s = site.timeline.now_s
        words: list[Word] = []
        for job in ended.jobs:
            job.first_token_s = now_s
            last = job.output_tokens <= 1
            word = PrefillFinished(
                worker_id=self.worker_id,
                request_id=job.request_id,
                attempt=job.spec.attempt,
                compute_s=now_s - ended.began_s,
                last_layer_computed_s=now_s,
                waited_s=ended.began_s - job.received_s,
                in_worker_s=now_s - job.received_s,
                finish_reason="length" if last else None,
            )
            words.append((job, word))
            if last:
                job.finished_s = now_s
                words.append(self._released(job))
            else:
                self._hand_over(job)
        site.tell(words)
        if site.recorder is not None:
            ids = " ".join(job.request_id for job in ended.jobs)
            site.recorder.span(self.worker_id, "short prefill", ended.began_s, now_s, ids)
        self._next_after_pass()

    def _next_after_pass(self) -> None:
        seat = self._seat
        if seat is not None and not seat.stands and not self.ahead:
            seat.member_free()
        else:
            self.start_pass()
        if self._running is None and (self._groups or self._rows):
            self.pace()

    # --- handing over ----------------------------------------------------------------------------

    def _hand_over(self, job: Job) -> None:
        """Its KV follows the computation layer by layer: when the pass ends, the last layer is still to go."""
        site = self._site
        now_s = site.timeline.now_s
        if job.decode_worker_id == self.worker_id:
            self._rows.advance(now_s)
            if not self._rows:
                self._short_begins()
            self._rows.join(job, job.tokens, job.output_tokens - 1)
            self._rows_changed()
            return
        decoder = self._decoders[job.decode_worker_id]
        whole_s = site.costs.kv_transfer_s(job.tokens, same_node=decoder.node == self.node)
        site.timeline.at(now_s + whole_s / site.limits.layers, self._handed_over, job)

    def _handed_over(self, job: Job) -> None:
        """The decode worker has verified it."""
        decoder = self._decoders[job.decode_worker_id]
        if job.request_id not in decoder.kv:
            return  # dropped meanwhile, here too
        decoder.receive(job)
        self._site.tell((self._released(job),))

    # --- what decodes here -----------------------------------------------------------------------

    def pace(self) -> None:
        """Something changed that decode steps or the prefilling long depend on: what pace everybody has now."""
        rows, groups, seat, running = self._rows, self._groups, self._seat, self._running
        if rows:
            rows.advance(self._site.timeline.now_s)
        count = len(rows) + len(groups)
        if not count:
            if seat is not None:
                seat.set_drag(self, 0.0)
            return
        alone_s = self._alone_s
        if alone_s == 0.0 or rows:
            alone_s = self._site.costs.shared_step_s(0, count, self._group_kv + rows.kv_tokens)
            self._alone_s = 0.0 if rows else alone_s
        step_s = alone_s if running is None else running.step_s
        if seat is not None and seat.runs:
            step_s += seat.turn_s(alone_s)
        for group in groups:
            group.set_extra(self, math.inf if running is not None and running.exclusive else step_s - group.alone_s)
        if rows:
            rows.step_s = step_s / self.speed
            self._rows_serial += 1
            self._site.timeline.at(rows.next_end_s(), self._rows_due, self._rows_serial)
        if seat is not None:
            seat.set_drag(self, alone_s)

    def _rows_changed(self) -> None:
        """A row joined or left; the clock is at now."""
        if not self._rows:
            self._rows_serial += 1
            self._short_rests()
        self.pace()

    def _rows_due(self, serial: int) -> None:
        if serial != self._rows_serial:
            return
        site = self._site
        now_s = site.timeline.now_s
        self._rows.advance(now_s)
        words: list[Word] = []
        finished = self._rows.take_finished()
        for job in finished:
            job.finished_s = now_s
            words.append(finished_word(self.worker_id, job, self.kv.free(job.request_id)))
            if site.recorder is not None and job.first_token_s is not None:
                site.recorder.span(f"{self.worker_id} decode", "short decode", job.first_token_s, now_s, job.request_id)
        if finished:
            self._rows_changed()
        else:
            self.pace()
        if words:
            site.tell(words)

    # --- longs (called by their groups) ----------------------------------------------------------

    @property
    def is_held_up(self) -> bool:
        """Shorts run here that a long must wait for."""
        return self._running is not None or self.ahead > 0

    def seat(self, group: Group) -> None:
        """Its long prefills here from now on; what is queued goes before it."""
        self._seat = group
        self.ahead = len(self._queue)

    def unseat(self) -> None:
        self._seat = None
        self.ahead = 0

    def join_decode(self, group: Group) -> None:
        self._groups.append(group)
        self._alone_s = 0.0
        self._group_kv += group.kv_share

    def leave_decode(self, group: Group) -> None:
        self._groups.remove(group)
        self._alone_s = 0.0
        self._group_kv -= group.kv_share

    @property
    def decodes(self) -> bool:
        """Anything at all."""
        return bool(self._groups) or bool(self._rows)

    # --- shared cores ----------------------------------------------------------------------------

    def set_speed(self, speed: float) -> None:
        """See `cores.Task`."""
        self.speed = speed
        if self._running is not None and self._running.work is not None:
            self._running.work.set_rate(speed)
        if self._seat is not None:
            self._seat.speed_changed()
        for group in self._groups:
            group.speed_changed()
        if self._rows:
            self.pace()

    def _use_cores(self) -> None:
        """What computes here may have changed. The prefill of a long is in the background."""
        cores, seat = self._site.cores, self._seat
        if cores is None:
            return
        if self._shorts or self._longs:
            cores.use(self, background=seat is not None and seat.runs)
        else:
            cores.leave(self)

    # --- busy time -------------------------------------------------------------------------------

    def _short_begins(self) -> None:
        self._shorts += 1
        if self._shorts == 1:
            now_s = self._site.timeline.now_s
            self._site.usage.add(now_s, 0 if self._longs else 1, 1, 0)
            if not self._longs:
                self._work_since_s = now_s
        self._use_cores()

    def _short_rests(self) -> None:
        self._shorts -= 1
        if not self._shorts:
            now_s = self._site.timeline.now_s
            self._site.usage.add(now_s, 0 if self._longs else -1, -1, 0)
            if not self._longs:
                self.busy_s += now_s - self._work_since_s
        self._use_cores()

    def long_begins(self) -> None:
        """A long computes here from now on."""
        self._longs += 1
        if self._longs == 1:
            now_s = self._site.timeline.now_s
            self._site.usage.add(now_s, 0 if self._shorts else 1, 0, 1)
            if not self._shorts:
                self._work_since_s = now_s
        self._use_cores()

    def long_rests(self) -> None:
        """It stands still, or left."""
        self._longs -= 1
        if not self._longs:
            now_s = self._site.timeline.now_s
            self._site.usage.add(now_s, 0 if self._shorts else -1, 0, -1)
            if not self._shorts:
                self.busy_s += now_s - self._work_since_s
        self._use_cores()
