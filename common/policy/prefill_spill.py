"""A paused long's KV moved out of a prefill worker's places, and brought back: orders obeyed, effects that ended.

The long stays paused all the time, and stands at the same step before and after. Whatever would end it meanwhile (an
order to drop it, a rank that is lost) ends the move, and waits for that: nothing may touch KV that is freed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from common.messages.sp import RestoreSegment, SpillSegment
from common.policy.prefill_events import (
    KvMoved,
    KvRestored,
    KvSpilled,
    RestoreFailed,
    RestoreKv,
    SpillFailed,
    SpillKv,
    StopMove,
)
from common.policy.prefill_jobs import MOVING, LongJob, LongState, Verdict
from common.policy.prefill_outbox import Outbox

if TYPE_CHECKING:
    from common.policy.prefill_books import PrefillBooks

MOVED = MOVING | {LongState.SPILLED}


def obey(books: PrefillBooks, long: LongJob, order: SpillSegment | RestoreSegment) -> None:
    if isinstance(order, SpillSegment):
        _spill(books, long)
    else:
        _restore(books, long)


def _spill(books: PrefillBooks, long: LongJob) -> None:
    match long.state:
        case LongState.PAUSED | LongState.LOADED:
            long.move(LongState.SPILLING)
            books.out.do(SpillKv(request_id=long.request_id, attempt=long.attempt))
        case LongState.SPILLED:
            books.out.segment_spilled(long, long.spilled_bytes)
        case LongState.SPILLING | LongState.RESTORING:
            return  # the answer is on its way
        case _:
            books.out.segment_not_spilled(long, f"it does not stand still: it is {long.state}")


def _restore(books: PrefillBooks, long: LongJob) -> None:
    match long.state:
        case LongState.SPILLED:
            long.move(LongState.RESTORING)
            books.out.do(RestoreKv(request_id=long.request_id, attempt=long.attempt))
        case LongState.PAUSED | LongState.LOADED:
            books.out.segment_paused(long)
        case _:
            return  # the answer is on its way, or was given


def stop_moving(out: Outbox, long: LongJob) -> None:
    if not long.leaves:
        long.leaves = True
        out.do(StopMove(request_id=long.request_id, attempt=long.attempt))


def ended(books: PrefillBooks, long: LongJob, event: KvMoved) -> None:
    """A move, well or badly."""
    match event:
        case KvSpilled():
            long.move(LongState.SPILLED)
            long.spilled_bytes = event.kv_bytes
        case SpillFailed() | KvRestored():
            long.move(LongState.PAUSED)
        case RestoreFailed():
            long.verdict = long.verdict or Verdict("failed", f"its KV was not brought back: {event.reason}")
        case _:
            assert_never(event)
    books.tell(long.request_id, f"{type(event).__name__} at step {long.steps_done}")
    if long.verdict is not None:
        books.close(long)
    else:
        _say(books.out, long, event)


def _say(out: Outbox, long: LongJob, event: KvMoved) -> None:
    if isinstance(event, KvSpilled):
        out.segment_spilled(long, event.kv_bytes)
        out.place_kv(long, "spilled", event.moved_to)
        return
    if isinstance(event, SpillFailed):
        out.segment_not_spilled(long, event.reason)
    else:
        out.segment_paused(long)
    out.place_kv(long, "paused")
