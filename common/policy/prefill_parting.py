"""What a prefill worker does when rank 0 of a group goes on alone: it takes in the KV of the others, who are free.

A common chunk *gathers*: in each of its steps every follower brings that layer's KV to rank 0. It is the last chunk of
the prompt, or the next one after rank 0 was told so (`PartSegment`). When it is done the long is rank 0's like any
other; a follower waits to be told to drop what it holds, and minds nobody's loss.
"""

from __future__ import annotations

from common.messages.sp import PartSegment
from common.policy.prefill_books import PrefillBooks
from common.policy.prefill_jobs import LongJob, LongState


def part(books: PrefillBooks, order: PartSegment) -> None:
    """With the next chunk that begins; or say again that it is done."""
    job = books.jobs.get(order.request_id)
    if not isinstance(job, LongJob) or job.attempt != order.attempt or job.verdict is not None or job.follows:
        return
    job.parts = order.growth
    if not job.is_shared and order.growth == job.growth:
        books.out.segment_parted(job)


def gathered(books: PrefillBooks, job: LongJob) -> None:
    """A chunk that gathers is done."""
    job.chunk_gathers = False
    if job.follows:
        job.move(LongState.GATHERED)
        books.tell(job.request_id, f"rank 0 has gathered {job.prefilled} tokens, and goes on alone")
        return
    job.size = 1
    books.tell(job.request_id, f"gathered {job.prefilled} tokens; alone from here on")
    if job.remaining:
        books.out.segment_parted(job)
