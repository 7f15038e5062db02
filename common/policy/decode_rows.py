"""The life of a request on a decode worker, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from common.messages.decode import ExpectKv
from common.messages.requests import FinishReason, RequestSpec
from common.policy.transitions import Table
from common.units import Attempt, RequestId, Seconds


class RowPhase(StrEnum):
    """Where a request stands on this worker."""

    RESERVING = "reserving"
    EXPECTED = "expected"
    """KV is reserved and nothing has come yet."""
    RECEIVING = "receiving"
    ACTIVE = "active"
    """In the batch."""
    CLOSING = "closing"
    """Ended; freed when the effect that touches its KV has ended."""


P = RowPhase

TRANSITIONS: Table[RowPhase] = {
    P.RESERVING: frozenset({P.EXPECTED, P.CLOSING}),
    P.EXPECTED: frozenset({P.RECEIVING}),
    P.RECEIVING: frozenset({P.ACTIVE, P.CLOSING}),
    P.ACTIVE: frozenset({P.CLOSING}),
    P.CLOSING: frozenset(),
}
"""A row that ends is taken off the books at once, in any phase: found no room, or released."""


@dataclass(slots=True, eq=False)
class Row:
    """One request on this worker."""

    spec: RequestSpec
    phase: RowPhase = RowPhase.RESERVING
    generated: int = 0
    """Tokens of this attempt, the first included."""
    received_s: tuple[Seconds, Seconds] = (0.0, 0.0)
    """When the first and the last layer of its KV came, by the host's monotonic clock."""
    deadline_s: float | None = None
    """While its KV is awaited: when that lapses."""
    failure: str | None = None
    """While closing: why, if the scheduler must hear of it."""
    finished: FinishReason | None = None
    """Its last token is out."""
    closing_from: RowPhase | None = None
    """While closing: the phase it was in. What that waited for is what frees its KV, and nothing else does."""
    in_step: bool = False
    asked: set[Attempt] = field(default_factory=set)
    """Later attempts that the scheduler dropped with this one; each is answered."""
    successor: ExpectKv | None = None
    """A later attempt, taken up when this one is released."""

    @property
    def request_id(self) -> RequestId:
        return self.spec.request_id

    @property
    def attempt(self) -> Attempt:
        return self.spec.attempt

    def awaits_end_of(self, phase: RowPhase) -> bool:
        """In that phase, or closing from it."""
        return phase in (self.phase, self.closing_from)


def finish_reason(row: Row, token_id: int) -> FinishReason | None:
    """Whether `token_id`, just counted in `generated`, is the last one."""
    if token_id in row.spec.stop_token_ids:
        return "stop"
    return "length" if row.generated >= row.spec.max_tokens else None
