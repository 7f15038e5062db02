"""What a prefill worker does when the group of one of its longs grows.

It meets the ranks of the larger group while it computes with those of the smaller one. When the group stands at the end
of a chunk, the order to run on says that the larger one does: the worker goes over to it, if it has met the others, and
has done what the group has. A newcomer takes the group's count of tokens and steps for its own. What a worker has set
aside for the KV stays what it was.
"""

from __future__ import annotations

from common.messages.sp import MeetRanks, RunSegment
from common.policy.prefill_books import PrefillBooks
from common.policy.prefill_events import EnterGroup, MeetOthers, OthersMet
from common.policy.prefill_jobs import LongJob, LongState, Meeting, Verdict

STANDING = (LongState.LOADED, LongState.PAUSED)


def meet(books: PrefillBooks, order: MeetRanks) -> None:
    """Begin to; or say again that it is done."""
    job = books.jobs.get(order.request_id)
    if not isinstance(job, LongJob) or job.attempt != order.attempt or job.verdict is not None:
        books.out.ranks_met(order.request_id, order.attempt, order.growth, "not held by this worker")
        return
    known = job.meets
    if known is None or known.growth < order.growth:
        job.meets = Meeting(order.growth, order.rank, len(order.addresses))
        books.out.do(
            MeetOthers(
                request_id=job.request_id,
                attempt=job.attempt,
                growth=order.growth,
                rank=order.rank,
                addresses=order.addresses,
            )
        )
    elif known.growth == order.growth and known.over:
        books.out.ranks_met(job.request_id, job.attempt, known.growth)


def others_met(books: PrefillBooks, event: OthersMet) -> None:
    job = books.jobs.get(event.request_id)
    if not isinstance(job, LongJob) or job.attempt != event.attempt:
        return
    meeting = job.meets
    if meeting is not None and meeting.growth == event.growth:
        meeting.over = not event.reason
        books.out.ranks_met(job.request_id, job.attempt, event.growth, event.reason)


def enter_group(books: PrefillBooks, job: LongJob, order: RunSegment) -> bool:
    """Go over to the larger group. False: it cannot, and that ends the job; or it is still being opened."""
    if job.state is LongState.LOADING:
        return False
    if refusal := _why_not(job, order):
        books.end(job, Verdict("failed", refusal))
        return False
    assert job.meets is not None
    job.rank, job.size, job.growth = job.meets.rank, job.meets.size, order.growth
    if not job.started:
        job.prefilled, job.steps = order.start, order.step
    books.tell(job.request_id, f"rank {job.rank} of {job.size} from token {order.start} on")
    books.out.do(
        EnterGroup(
            request_id=job.request_id,
            attempt=job.attempt,
            growth=order.growth,
            rank=job.rank,
            size=job.size,
            start=order.start,
            kept=order.kept,
            scheme=job.scheme,
        )
    )
    return True


def _why_not(job: LongJob, order: RunSegment) -> str:
    meeting = job.meets
    if meeting is None or meeting.growth != order.growth or not meeting.over:
        return f"told to go over to growth {order.growth} of its group without having met its ranks"
    if len(order.kept) != meeting.size:
        return f"told what {len(order.kept)} ranks keep, of {meeting.size}"
    if job.state not in STANDING or job.chunk_tokens:
        return f"told to go over to a larger group while it is {job.state}, {job.chunk_steps} steps into a chunk"
    if job.started and (job.prefilled, job.steps) != (order.start, order.step):
        return f"the group grows at token {order.start}, step {order.step}; here it is {job.prefilled}, {job.steps}"
    return ""
