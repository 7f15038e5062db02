"""Id types and bounded quantities. Every number on the wire has its unit here or in its name."""

from __future__ import annotations

from typing import Annotated, NewType

from msgspec import Meta

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
RouterId = NewType("RouterId", str)
CoordinatorId = NewType("CoordinatorId", str)

Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""A count of tokens."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""An index into the vocabulary."""

Bytes = Annotated[int, Meta(ge=0, le=2**62)]
"""A count of bytes."""

Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
"""A length of time, or a reading of a monotonic clock."""

Attempt = Annotated[int, Meta(ge=0, le=1_000)]
"""Which try at serving a request this is; the router raises it at each resubmission."""
