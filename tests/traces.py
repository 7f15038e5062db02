"""Spans kept in a list, and what must hold of those of one request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from common.tracing import Span

ROUNDING_S = 1e-6


class SpanList:
    """A `Tracer` on virtual time: the loop's clock is Unix time."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def offset_s(self) -> float:
        return 0.0

    def tell(self, spans: Callable[[], Sequence[Span]]) -> None:
        self.spans += spans()

    def of(self, request_id: str) -> tuple[Span, list[Span]]:
        """The request's own span, and those within it by time."""
        mine = [span for span in self.spans if span.attributes["pecsched.request_id"] == request_id]
        own = [span for span in mine if span.serves]
        assert len(own) == 1, f"{request_id}: {len(own)} spans of its own"
        return own[0], sorted((span for span in mine if not span.serves), key=lambda span: span.start_s)


def is_whole(own: Span, parts: Sequence[Span]) -> None:
    """All parts belong to the one trace, follow one another without a gap, and lie within the request's own."""
    assert len({span.context.span_id for span in (own, *parts)}) == len(parts) + 1
    for part in parts:
        assert (part.context.trace_id, part.parent_id) == (own.context.trace_id, own.context.span_id), part
        assert part.end_s > part.start_s >= own.start_s - ROUNDING_S, part
    for before, after in pairwise(parts):
        assert abs(after.start_s - before.end_s) < ROUNDING_S, f"{before.name} and {after.name}"


def sum_s(parts: Sequence[Span]) -> float:
    return sum(part.end_s - part.start_s for part in parts)
