"""Traces, as data: W3C trace context, spans, and who takes them (`common.runtime.otlp`, or a list in a test).

Two processes tell spans of a request. Its router tells the request's own, from arrival to last token; the scheduler
tells all that happened within it, by its own clock and when the request has ended: queueing, each part of the prefill,
each pause, handoff, decode. They follow one another without a gap, so that they add up.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""Later versions of the standard may add parts; 00 may not."""
SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span, as others refer to it."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16."""
    sampled: bool = True
    """Whoever began the trace wants it to be kept."""

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def child(self) -> TraceContext:
        return TraceContext(self.trace_id, secrets.token_hex(8), self.sampled)


def new_trace() -> TraceContext:
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def parse_traceparent(text: str) -> TraceContext | None:
    """None: there is none, or none that the standard allows; then the trace begins here."""
    found = TRACEPARENT.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    context: TraceContext
    parent_id: str
    """Of the span it is part of; empty: of none."""
    start_s: float
    """Unix time."""
    end_s: float
    attributes: Mapping[str, str | int | float | bool]
    error: str = ""
    """What went wrong, in a word (`error.type`); empty: nothing."""
    serves: bool = False
    """It answers a client (kind SERVER)."""


class Tracer(Protocol):
    def offset_s(self) -> float:
        """Unix time less the event loop's clock, now."""
        ...

    def tell(self, spans: Callable[[], Sequence[Span]]) -> None:
        """Take them, or drop them; never wait. They are made later, on another thread: a long that was paused a
        thousand times is two thousand spans."""
        ...
