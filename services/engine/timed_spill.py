"""KV that a timed engine pretends to have moved elsewhere: it takes the time, and counts as it would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common.messages.requests import RequestSpec
from common.units import RequestId
from services.engine.interface import EngineError, MoveStopped, Spilled, SpillRefused
from services.engine.timed_language import TimedShape, now_s, sleep_until

PIECE_S = 0.01
"""A move that is not wanted any more ends within this."""


class Movable(Protocol):
    """A sequence."""

    kv_reserved: int

    @property
    def spec(self) -> RequestSpec: ...

    @property
    def computed(self) -> int: ...


@dataclass(slots=True, eq=False)
class _Moved:
    nbytes: int
    reserved: int
    """Tokens that its places in the cache count."""
    moving: bool = True
    unwanted: bool = False


class TimedMover:
    """As `spill.KvMover`."""

    def __init__(self, shape: TimedShape) -> None:
        self._shape = shape
        self._moved: dict[RequestId, _Moved] = {}

    @property
    def used_bytes(self) -> int:
        return sum(moved.nbytes for moved in self._moved.values())

    def holds(self, request_id: RequestId) -> bool:
        return request_id in self._moved

    def reserved(self, request_id: RequestId) -> int:
        """Raises: EngineError."""
        if request_id not in self._moved:
            raise EngineError(f"the KV of {request_id} is not elsewhere")
        return self._moved[request_id].reserved

    def require_here(self, request_id: RequestId) -> None:
        if request_id in self._moved:
            raise EngineError(f"the KV of {request_id} is elsewhere")

    async def move_out(self, sequence: Movable, begun: int) -> Spilled:
        """`begun`: tokens of its stopped pass. Raises: SpillRefused, EngineError (it is elsewhere)."""
        request_id = sequence.spec.request_id
        self.require_here(request_id)
        nbytes = (sequence.computed + begun) * self._shape.kv_bytes_per_token
        left = self._shape.spill_bytes_max - self.used_bytes
        if not self._shape.spill_bytes_max or nbytes > left:
            raise SpillRefused(f"{nbytes} bytes of KV; {left} are left to move KV to")
        moved = self._moved[request_id] = _Moved(nbytes, sequence.kv_reserved)
        if not await self._move(moved):
            del self._moved[request_id]
            raise SpillRefused(f"the KV of {request_id}: it is not wanted any more")
        sequence.kv_reserved = 0
        return Spilled(nbytes, self._shape.spill_to)

    async def bring_back(self, sequence: Movable) -> None:
        """There is room. Raises: MoveStopped."""
        request_id = sequence.spec.request_id
        moved = self._moved[request_id]
        sequence.kv_reserved = moved.reserved
        if not await self._move(moved):
            raise MoveStopped(f"the KV of {request_id}: it is not wanted any more")
        del self._moved[request_id]

    def stop(self, request_id: RequestId) -> None:
        moved = self._moved.get(request_id)
        if moved is not None and moved.moving:
            moved.unwanted = True

    def forget(self, request_id: RequestId) -> None:
        """Raises: EngineError, while it moves."""
        moved = self._moved.get(request_id)
        if moved is not None and moved.moving:
            raise EngineError(f"the KV of {request_id} is being moved")
        self._moved.pop(request_id, None)

    async def _move(self, moved: _Moved) -> bool:
        """False: it was stopped."""
        moved.moving, end_s = True, now_s() + moved.nbytes / self._shape.spill_bytes_s
        try:
            while not moved.unwanted:
                await sleep_until(min(end_s, now_s() + PIECE_S))
                if now_s() >= end_s:
                    return True
            return False
        finally:
            moved.moving = False
