"""What the scheduler leaves in the store for those who come after it: a standby, `doctor`, people."""

from __future__ import annotations

from common.messages.base import Record
from common.messages.requests import LengthClass, RequestSpec
from common.units import WorkerId


class RequestRecord(Record, frozen=True, kw_only=True):
    """An accepted request. Written behind the scheduler's orders, none of which depends on it; deleted when it ends."""

    spec: RequestSpec
    length_class: LengthClass
    state: str
    workers: tuple[WorkerId, ...] = ()
    """Who was told to serve it."""
    epoch: int = 0
