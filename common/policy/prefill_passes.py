"""Which pass a prefill worker runs next. The engine runs one pass at a time; this is the choice at each end.

In order:

1. A short that a pass has begun and not finished goes first: its stream is open and must not fall silent.
2. A long that its coordinator lets run holds back every short, except, before its first step, those that came
   before it. It continues in the very pass where it was stopped, otherwise with its next chunk.
3. What decodes here takes part in every pass of shorts with one row each, so that weights are read once for both and
   the tokens keep coming. Where a long decodes, of the shorts' tokens only `colocated_tokens_max`. While another long
   prefills, its chunks and the rows alternate.
4. An *exclusive* short shares no pass with a long's decode: its passes run without rows, one decode step at least
   between two such shorts (or packs of them).
5. Otherwise shorts, first come first served, packed into one ragged batch of `batch_tokens_max`; one that is longer
   is split over several passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from common.policy import costs
from common.policy.prefill_events import PassSegment, PrefillWorkerConfig
from common.policy.prefill_jobs import LongJob, LongState, ShortJob, ShortState

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
) -> PassPlan | None:
    """What to run now; None: nothing to do. Called when no pass runs."""
    ready = sorted((short for short in shorts if short.state is ShortState.READY), key=_turn)
    held = list(longs)
    rows: list[ShortJob | LongJob] = [long for long in held if long.state is LongState.DECODING]
    alone = _alone(ready, last_kind) if rows else []
    rows += [short for short in shorts if short.state is ShortState.DECODING]
    long = running_long(held, ready)
    if long is not None and not (rows and last_kind == "chunk"):
        return _chunk(config, long)
    rows_left = max(0, config.rows_max - len(rows))
    if long is None and alone and rows_left:
        packed = pack(alone[:rows_left], config.batch_tokens_max, split_any=False)
        return PassPlan(kind="shorts", segments=packed)
    if rows:
        return _decode(config, rows, [] if long is not None else ready[:rows_left])
    if ready:
        packed = pack(ready[: config.rows_max], config.batch_tokens_max, split_any=False)
        return PassPlan(kind="shorts", segments=packed)
    return None


def _alone(ready: Sequence[ShortJob], last_kind: PassKind | None) -> list[ShortJob]:
    """The exclusive shorts at the head, unless the last pass was of such: now it is the decode's turn, but not in the
    middle of a short."""
    if not ready or (last_kind == "shorts" and not ready[0].begun):
        return []
    return list(takewhile(lambda short: short.exclusive, ready))


def _decode(config: PrefillWorkerConfig, rows: list[ShortJob | LongJob], ready: Sequence[ShortJob]) -> PassPlan:
    """One token for everything that decodes, and what shorts may share that step."""
    room = config.batch_tokens_max
    long_decodes = any(isinstance(row, LongJob) for row in rows)
    if long_decodes:
        room = config.colocated_tokens_max
        ready = list(takewhile(lambda short: not short.exclusive, ready))
    # Fewest tokens first: more rows than the engine takes (never seen) would take turns.
    rows.sort(key=lambda row: row.generated)
    segments = tuple(_row(row) for row in rows[: config.rows_max])
    return PassPlan(kind="decode", segments=segments + pack(ready, room, split_any=long_decodes))


def running_long(longs: Sequence[LongJob], ready: Sequence[ShortJob]) -> LongJob | None:
    """The long whose turn it is to prefill. `ready`: shorts that wait, in their order."""
    running = [long for long in longs if long.state is LongState.RUNNING]
    if not running or any(short.begun for short in ready):
        return None
    first = min(running, key=lambda long: (not long.started, long.order))
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
    fitting = costs.chunk_tokens(
        config.step_cost,
        config.layers,
        long.prefilled,
        step_s_max=config.step_s_max,
        tokens_max=config.chunk_tokens,
    )
    tokens = long.chunk_tokens or min(fitting, long.remaining)
    segment = PassSegment(
        request_id=long.request_id, start=long.prefilled, tokens=tokens, sample=tokens == long.remaining
    )
    return PassPlan(kind="chunk", segments=(segment,), resumed=long if long.chunk_tokens else None)


def _row(job: ShortJob | LongJob) -> PassSegment:
    return PassSegment(request_id=job.request_id, start=job.next_position, tokens=1, sample=True)


def _turn(short: ShortJob) -> tuple[bool, int]:
    return (not short.begun, short.order)
