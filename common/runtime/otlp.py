"""Spans to an OpenTelemetry collector, by OTLP over HTTP, from a thread of its own.

The event loop hands over a function; the spans are made, encoded and sent here. What finds the queue full is dropped
and counted, as is what the collector does not take. (OpenTelemetry's own batch processor sends from a thread too, but
has the spans made on the caller's: some 40 µs each.)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, Full, Queue

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation import set_span_in_context

from common.logs import get_logger
from common.tracing import Span

TOLD_MAX = 2_000
"""Requests that wait to be sent."""
BATCH_SPANS = 512
BATCH_S = 1.0
"""How long spans wait for others to go with them."""
EXPORT_S = 5.0
"""How long one batch may take, tries included."""
CLOSE_S = 2.0
"""How long what is left may take at the end."""

log = get_logger(__name__)


class OtlpTracer:
    """Implements `Tracer`."""

    def __init__(self, role: str, url: str) -> None:
        self.dropped = 0
        self._exporter = OTLPSpanExporter(url, timeout=EXPORT_S)
        self._maker = _SpanMaker(role)
        self._told: Queue[Callable[[], Sequence[Span]]] = Queue(TOLD_MAX)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def offset_s(self) -> float:
        return time.time() - asyncio.get_running_loop().time()

    def tell(self, spans: Callable[[], Sequence[Span]]) -> None:
        try:
            self._told.put_nowait(spans)
        except Full:
            self.dropped += 1

    def close(self) -> None:
        """Send what is left, for `CLOSE_S` at most. Blocks."""
        self._closing.set()
        self._thread.join(CLOSE_S)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not (self._closing.is_set() and self._told.empty()):
            batch = self._gather()
            for start in range(0, len(batch), BATCH_SPANS):
                self._send(batch[start : start + BATCH_SPANS])

    def _gather(self) -> list[ReadableSpan]:
        """Spans of what was told within `BATCH_S`, `BATCH_SPANS` of them or a request's worth more."""
        batch: list[ReadableSpan] = []
        until_s = time.monotonic() + BATCH_S
        while len(batch) < BATCH_SPANS:
            left_s = 0.0 if self._closing.is_set() else until_s - time.monotonic()
            try:
                told = self._told.get(timeout=left_s) if left_s > 0.0 else self._told.get_nowait()
            except Empty:
                break
            try:
                batch += [made for span in told() if (made := self._maker.make(span)) is not None]
            except Exception:  # a trace is lost; this thread must not be
                self.dropped += 1
                log.exception("spans could not be made")
        return batch

    def _send(self, batch: list[ReadableSpan]) -> None:
        if self._exporter.export(batch) is not SpanExportResult.SUCCESS:  # it has logged why
            self.dropped += len(batch)


class _SpanMaker(IdGenerator, SpanProcessor):
    """OpenTelemetry's own spans, of ours: with our ids and times."""

    def __init__(self, role: str) -> None:
        resource = Resource.create({"service.name": f"pecsched-{role}", "service.namespace": "pecsched"})
        provider = TracerProvider(resource=resource, id_generator=self, sampler=ALWAYS_ON, shutdown_on_exit=False)
        provider.add_span_processor(self)
        self._tracer = provider.get_tracer("pecsched")
        self._made: ReadableSpan | None = None
        self._ids = (0, 0)

    def make(self, span: Span) -> ReadableSpan | None:
        """None: OpenTelemetry is switched off (OTEL_SDK_DISABLED)."""
        self._made = None
        trace_id = int(span.context.trace_id, 16)
        self._ids = trace_id, int(span.context.span_id, 16)
        context = None
        if span.parent_id:
            flags = TraceFlags(TraceFlags.SAMPLED)
            parent = SpanContext(trace_id, int(span.parent_id, 16), is_remote=True, trace_flags=flags)
            context = set_span_in_context(NonRecordingSpan(parent))
        begun = self._tracer.start_span(
            span.name,
            context=context,
            kind=SpanKind.SERVER if span.serves else SpanKind.INTERNAL,
            attributes=dict(span.attributes) | ({"error.type": span.error} if span.error else {}),
            start_time=round(span.start_s * 1e9),
        )
        if span.error:
            begun.set_status(Status(StatusCode.ERROR, span.error))
        begun.end(end_time=round(span.end_s * 1e9))
        return self._made

    def generate_trace_id(self) -> int:
        return self._ids[0]

    def generate_span_id(self) -> int:
        return self._ids[1]

    def on_end(self, span: ReadableSpan) -> None:
        self._made = span
