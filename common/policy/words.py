"""What every word of a worker about a request says."""

from __future__ import annotations

from typing import TypedDict

from common.units import Attempt, RequestId, WorkerId


class About(TypedDict):
    """Fields of each such message; unpacked into its constructor, so that they are checked there."""

    worker_id: WorkerId
    request_id: RequestId
    attempt: Attempt
    cause: str
