"""Which pass a prefill worker runs next. The engine runs one pass at a time; this is the choice at each end.

In order:

1. A short that a pass has begun and not finished goes first: its stream is open and must not fall silent.
2. A long that its coordinator lets run holds back every short, except, before its first step, those that came
   before it. It continues in the very pass where it was stopped, otherwise with its next chunk.
3. What decodes here takes part in every pass of shorts with one row each, so that weights are read once for both and
   the tokens keep coming. Where a long decodes, of the shorts' tokens only as many as keep its inter-token latency
   (`colocation.py`). While another long prefills, the rows and parts of its chunks alternate: a chunk that has held up
   rows for as long as their inter-token latency allows (`chunk_turn_s`) is stopped at its next step, like one that is
   paused, and continues after a pass of the rows.
4. An *exclusive* short shares no pass with a long's decode: its passes run without rows, one decode step at least
   between two such shorts (or packs of them).
5. Otherwise shorts, first come first served, packed into one ragged batch of `batch_tokens_max`; one that is longer
   is split over several passes.

Of shared longs (see `prefill_jobs.py`) a pass has one at most, since all ranks must take them in the same order. A
follower's chunk or row is there when rank 0 has called it, and then stands where one of its own would. Between two
chunks it holds back shorts all the same. Between two rows it does so for as long as the next call takes to come
(`CALL_S`): so shorts are computed in the group's passes, on all members at once, and these may be as long as the bound
allows. When no call comes, rank 0 has something else to do; then shorts go on in small passes, since it may call at
any time and waits for whoever is in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from common.messages.cluster import StepCost
from common.policy import costs
from common.policy.colocation import tokens_beside, turn_s
from common.policy.prefill_events import PassSegment, PrefillWorkerConfig
from common.policy.prefill_jobs import LongJob, LongState, ShortJob, ShortState

CALL_S = 0.05
"""After a pass with a row of a group, so long do followers wait for the call to the next. (A few milliseconds where a
core is free; several ranks and a decode worker on two cores: some tens.)"""

PassKind = Literal["shorts", "chunk", "decode"]


@dataclass(frozen=True, slots=True)
class PassPlan:
    kind: PassKind
    segments: tuple[PassSegment, ...]
    resumed: LongJob | None = None
    """The pass is this long's stopped one."""


def next_pass(
    config: PrefillWorkerConfig,
    shorts: Sequence[ShortJob],
    longs: Iterable[LongJob],
    last_kind: PassKind | None,
    now_s: float,
) -> PassPlan | None:
    """What to run now; None: nothing to do, or not yet (`call_due_s`). Called when no pass runs."""
    ready = sorted((short for short in shorts if short.state is ShortState.READY), key=_turn)
    held = list(longs)
    decoding = [long for long in held if long.state is LongState.DECODING]
    rows = _rows_of_longs(decoding)
    alone = _alone(ready, last_kind) if rows else []
    rows += _rows_of_shorts(shorts)
    long = running_long(held, ready)
    if long is not None and _is_there(long) and not (rows and last_kind == "chunk"):
        return _chunk(config, long)
    rows_left = max(0, config.rows_max - len(rows))
    if long is None and alone and rows_left:
        packed = pack(alone[:rows_left], config.batch_tokens_max, split_any=False)
        return PassPlan(kind="shorts", segments=packed)
    if rows:
        return _decode(config, rows, [] if long is not None else ready[:rows_left], decoding)
    if ready and long is None and (ready[0].exclusive or now_s >= call_due_s(decoding)):
        return _shorts(config, ready[: config.rows_max], decoding)
    return None


def call_due_s(longs: Iterable[LongJob]) -> float:
    """Until then a follower waits for the call to the next row of a group; -inf: for none."""
    rows = (long for long in longs if long.state is LongState.DECODING and long.follows and long.called is None)
    return max((long.advanced_s + CALL_S for long in rows), default=-math.inf)


def chunk_turn_s(config: PrefillWorkerConfig, shorts: Iterable[ShortJob], longs: Iterable[LongJob]) -> float | None:
    """How long a chunk may run on while what decodes here waits for its next step; None: nothing waits."""
    rows = _rows_of_longs([long for long in longs if long.state is LongState.DECODING]) + _rows_of_shorts(shorts)
    if not rows:
        return None
    step_s = config.step_cost.pass_s + sum(_row_s(config.step_cost, row) for row in rows)
    return turn_s(step_s, config.long_itl_s_max)


def _rows_of_longs(decoding: Sequence[LongJob]) -> list[ShortJob | LongJob]:
    """Of those that could have one now."""
    return [*(long for long in decoding if not long.is_shared), *_shared_row(decoding)]


def _rows_of_shorts(shorts: Iterable[ShortJob]) -> list[ShortJob | LongJob]:
    return [short for short in shorts if short.state is ShortState.DECODING]


def _is_there(long: LongJob) -> bool:
    """Whether a pass of it can begin."""
    return not long.follows or long.called is not None


def _shared_row(decoding: Sequence[LongJob]) -> list[LongJob]:
    """At most one of those that could have a row now: they take turns."""
    ready = [long for long in decoding if long.is_shared and _is_there(long)]
    return [min(ready, key=lambda long: long.row_pass_id)] if ready else []


def _alone(ready: Sequence[ShortJob], last_kind: PassKind | None) -> list[ShortJob]:
    """The exclusive shorts at the head, unless the last pass was of such: now it is the decode's turn, but not in the
    middle of a short."""
    if not ready or (last_kind == "shorts" and not ready[0].begun):
        return []
    return list(takewhile(lambda short: short.exclusive, ready))


def _shorts(config: PrefillWorkerConfig, ready: Sequence[ShortJob], decoding: Sequence[LongJob]) -> PassPlan:
    """Shorts and nothing else, though rank 0 may call for the row of a long that decodes here."""
    room, split_any = config.batch_tokens_max, False
    if decoding and not ready[0].exclusive:
        room, split_any = _room(config, [], ready, decoding, uncalled=True), True
        ready = list(takewhile(lambda short: not short.exclusive, ready))
    return PassPlan(kind="shorts", segments=pack(ready, room, split_any=split_any))


def _decode(
    config: PrefillWorkerConfig,
    rows: list[ShortJob | LongJob],
    ready: Sequence[ShortJob],
    decoding: Sequence[LongJob],
) -> PassPlan:
    """One token for everything that decodes, and what shorts may share that step."""
    room = config.batch_tokens_max
    if decoding:
        room = _room(config, rows, ready, decoding)
        ready = list(takewhile(lambda short: not short.exclusive, ready))
    # Fewest tokens first: more rows than the engine takes (never seen) would take turns. Rank 0 waits for no turn.
    rows.sort(key=lambda row: (not (isinstance(row, LongJob) and row.is_shared), row.generated))
    segments = tuple(_row(row) for row in rows[: config.rows_max])
    return PassPlan(kind="decode", segments=segments + pack(ready, room, split_any=bool(decoding)))


def _room(
    config: PrefillWorkerConfig,
    rows: Sequence[ShortJob | LongJob],
    ready: Sequence[ShortJob],
    decoding: Sequence[LongJob],
    *,
    uncalled: bool = False,
) -> int:
    """Tokens of shorts in a pass with these rows where these longs decode. `uncalled`: rank 0 of none of them takes
    part in it; it waits for one rank after another, each of which may just have begun such a pass."""
    if not ready:
        return 0
    sizes = [long.size for long in decoding if long.is_shared]
    return tokens_beside(
        config.step_cost,
        sum(_row_s(config.step_cost, row) for row in rows),
        itl_s_max=config.long_itl_s_max,
        passes=max(1, len(sizes)) * (max(sizes, default=1) if uncalled else 1),
        past=ready[0].prefilled,
        tokens_max=config.colocated_tokens_max,
    )


def _row_s(cost: StepCost, row: ShortJob | LongJob) -> float:
    return costs.row_s(cost, row.next_position, row.size if isinstance(row, LongJob) else 1)


def running_long(longs: Sequence[LongJob], ready: Sequence[ShortJob]) -> LongJob | None:
    """The long whose turn it is to prefill, also if rank 0 has not called it yet. `ready`: shorts that wait, in their
    order."""
    running = [long for long in longs if long.state is LongState.RUNNING]
    if not running or any(short.begun for short in ready):
        return None
    first = min(running, key=lambda long: (long.called is None, not _is_there(long), not long.started, long.order))
    if not first.started and any(short.order < first.order for short in ready):
        return None
    return first


def pack(ready: Sequence[ShortJob], room: int, *, split_any: bool) -> tuple[PassSegment, ...]:
    """Shorts in their order until `room` tokens are full. The first is cut to fit; others only if `split_any`."""
    segments: list[PassSegment] = []
    for short in ready:
        if room == 0 or (segments and not split_any and short.remaining > room):
            break
        tokens = min(short.remaining, room)
        segments.append(
            PassSegment(
                request_id=short.request_id,
                start=short.prefilled,
                tokens=tokens,
                sample=tokens == short.remaining,
            )
        )
        room -= tokens
    return tuple(segments)


def _chunk(config: PrefillWorkerConfig, long: LongJob) -> PassPlan:
    resumed = long if long.chunk_tokens else None
    if long.called is not None:
        call = long.called
        joined = PassSegment(
            request_id=long.request_id, start=call.start, tokens=call.tokens, sample=False, gathers=call.gathers
        )
        return PassPlan(kind="chunk", segments=(joined,), resumed=resumed)
    fitting = costs.chunk_tokens(
        _cost_of_share(config.step_cost, long.size),
        config.layers,
        long.prefilled,
        step_s_max=config.step_s_max,
        tokens_max=config.chunk_tokens * long.size,
    )
    tokens = long.chunk_tokens or min(fitting, long.remaining)
    is_last = tokens == long.remaining
    gathers = long.is_shared and long.scheme.gathers and (is_last or long.parts == long.growth)
    segment = PassSegment(
        request_id=long.request_id,
        start=long.prefilled,
        tokens=tokens,
        sample=is_last,
        gathers=long.chunk_gathers if long.chunk_tokens else gathers,
    )
    return PassPlan(kind="chunk", segments=(segment,), resumed=resumed)


def _cost_of_share(cost: StepCost, size: int) -> StepCost:
    """Of a chunk to each rank of a group: it computes a part of the tokens, and of the pairs."""
    return StepCost(pass_s=cost.pass_s, token_s=cost.token_s / size, pair_s=cost.pair_s / size)


def _row(job: ShortJob | LongJob) -> PassSegment:
    draws = not (isinstance(job, LongJob) and job.follows)
    return PassSegment(request_id=job.request_id, start=job.next_position, tokens=1, sample=draws)


def _turn(short: ShortJob) -> tuple[bool, int]:
    return (not short.begun, short.order)
