"""An OpenTelemetry collector in a thread: takes traces over HTTP and keeps them as our own spans."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Wire

from common.tracing import Span, TraceContext
from tests.traces import SpanList


class Collector(SpanList):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.services: set[str] = set()
        self.paths: set[str] = set()
        self.changed = threading.Condition()

    def take(self, path: str, body: bytes) -> None:
        with self.changed:
            self.paths.add(path)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
                self.spans += [_span(wire) for scope in resource.scope_spans for wire in scope.spans]
            self.changed.notify_all()

    def until(self, holds: Callable[[], object], within_s: float = 20.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: bool(holds()), within_s), f"{len(self.spans)} spans came"


def _span(wire: Wire) -> Span:
    attributes: dict[str, Any] = {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in wire.attributes
    }
    return Span(
        name=wire.name,
        context=TraceContext(wire.trace_id.hex(), wire.span_id.hex()),
        parent_id=wire.parent_span_id.hex(),
        start_s=wire.start_time_unix_nano / 1e9,
        end_s=wire.end_time_unix_nano / 1e9,
        attributes=attributes,
        error=attributes.get("error.type", ""),
        serves=wire.kind == Wire.SPAN_KIND_SERVER,
    )


@contextmanager
def collecting(*, status: int = 200) -> Iterator[Collector]:
    """`status`: of every answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if status == 200:
                collector.take(self.path, body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
