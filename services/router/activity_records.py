"""What the live page is sent: JSON, rows as arrays. `page/model.js` reads them.

Times are seconds since this router began to listen, as it heard of things: machines' clocks differ, one ear does not.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from common.messages.requests import LengthClass

Kind = Literal["waiting", "prefill", "handoff", "decode", "forming", "part", "pause", "long_decode"]
"""`waiting`: a short lies at a prefill worker. `prefill`: it is computed. `handoff`: its KV leaves. `decode`: a decode
worker has its row. `forming`: a long's ranks meet. `part`: they prefill. `pause`: they stand still for shorts.
`long_decode`: they draw tokens."""


class SegmentRow(msgspec.Struct, frozen=True, array_like=True):
    """One request on one worker for a while. Sent again, with the same id, when it ends."""

    segment: int
    lane: int
    kind: Kind
    request: int
    begin_s: float
    end_s: float | None
    """None: it goes on. Not after `begin_s`: it was nothing."""
    detail: int
    """Of a `handoff`: the lane it leads to. Of others: tokens of the prompt, of a long those prefilled so far."""


class RequestRow(msgspec.Struct, frozen=True, array_like=True):
    """What a segment's number stands for; sent before the first segment of it."""

    request: int
    request_id: str
    length_class: LengthClass
    prompt_tokens: int
    submitted_s: float | None
    """None: before this router listened."""


class LaneRow(msgspec.Struct, frozen=True, array_like=True):
    """A worker."""

    lane: int
    worker_id: str
    role: str
    node: str
    here: bool
    """False: it left or was lost; its lane stays as long as it has anything to show."""
    kv_reserved_tokens: int
    kv_capacity_tokens: int
    queued_tokens: int


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One point of the charts: what waits at the scheduler, and what the last minute's first tokens took."""

    at_s: float
    queued_shorts: int | None
    """None: the scheduler did not answer."""
    queued_longs: int | None
    short_ttft_p99_s: float | None
    """None: no first token in that time. From the submission to the scheduler to its word of the first token."""
    long_ttft_p99_s: float | None


class Summary(msgspec.Struct, frozen=True):
    """About once a second: how the scheduler sees the cluster."""

    scheduler_answers: bool
    coordinator_present: bool
    policy: str
    lanes: tuple[LaneRow, ...]
    strangers: tuple[tuple[str, str], ...]
    """Workers that report and get no work, and why."""
    counters: dict[str, int]
    decision_p99_s: float
    requests_running: int
    sample: Sample


class Change(msgspec.Struct, frozen=True):
    """What is new since the last one."""

    now_s: float
    requests: tuple[RequestRow, ...]
    segments: tuple[SegmentRow, ...]
    summary: Summary | None
    """None: as it was."""


class State(msgspec.Struct, frozen=True):
    """All that is known; what a page begins with."""

    model: str
    change: Change
    history: tuple[Sample, ...]
