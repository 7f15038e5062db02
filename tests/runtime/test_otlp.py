"""Trace context, and spans on their way to a collector: never in the way of who tells them."""

from __future__ import annotations

import asyncio
import time

import pytest

from common.errors import StartupError
from common.metrics import SPANS_DROPPED, Metrics
from common.runtime import otlp
from common.runtime.tracing import traced, url_of
from common.tracing import Span, TraceContext, new_trace, parse_traceparent
from services.embedded import free_port
from tests.exposition import Scrape
from tests.otlp_collector import collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [(f"00-{TRACE}-{PARENT}-01", True), (f"00-{TRACE}-{PARENT}-00", False), (f"cc-{TRACE}-{PARENT}-03-more", True)],
)
def test_a_trace_context_is_read_as_the_standard_says(text: str, sampled: bool) -> None:
    assert parse_traceparent(text) == TraceContext(TRACE, PARENT, sampled)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
    ],
)
def test_what_the_standard_forbids_is_no_context(text: str) -> None:
    assert parse_traceparent(text) is None


def test_a_context_survives_its_way_in_a_header() -> None:
    context = new_trace()
    assert parse_traceparent(context.traceparent) == context
    child = context.child()
    assert child.trace_id == context.trace_id
    assert child.span_id != context.span_id
    assert child.sampled
    assert not TraceContext(TRACE, PARENT, sampled=False).child().sampled


def spans(error: str = "") -> list[Span]:
    own = TraceContext(TRACE, PARENT)
    part = Span("prefill", own.child(), PARENT, 1_000.25, 1_001.5, {"pecsched.attempt": 1, "where": "p0"})
    return [Span("chat m", own, "", 1_000.0, 1_002.0, {"n": 0.5}, error, serves=True), part]


async def test_spans_reach_the_collector_as_they_were_told() -> None:
    metrics = Metrics("router")
    with collecting() as collector:
        async with traced("router", collector.url, metrics) as tracer:
            assert tracer is not None
            assert abs(tracer.offset_s() + asyncio.get_running_loop().time() - time.time()) < 1.0
            tracer.tell(lambda: spans("no_workers"))
        assert collector.paths == {"/v1/traces"}
        assert collector.services == {"pecsched-router"}
        sent, came = spans("no_workers"), collector.spans
    assert [span.name for span in came] == ["chat m", "prefill"]
    assert came[0].context == sent[0].context
    for before, after in zip(sent, came, strict=True):
        assert (after.parent_id, after.serves, after.error) == (before.parent_id, before.serves, before.error)
        assert after.context.trace_id == TRACE
        assert after.start_s == pytest.approx(before.start_s, abs=1e-6)
        assert after.end_s == pytest.approx(before.end_s, abs=1e-6)
        assert before.attributes.items() <= after.attributes.items()
    assert Scrape(metrics.exposition()).value(SPANS_DROPPED) == 0


async def test_without_a_collector_nobody_waits_and_what_is_lost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "TOLD_MAX", 10)
    monkeypatch.setattr(otlp, "CLOSE_S", 0.3)
    metrics, loop = Metrics("router"), asyncio.get_running_loop()
    async with asyncio.timeout(10.0):
        async with traced("router", f"http://127.0.0.1:{free_port()}", metrics) as tracer:
            assert tracer is not None
            begun_s = loop.time()
            for _ in range(10_000):
                tracer.tell(spans)
            assert loop.time() - begun_s < 5.0
    assert Scrape(metrics.exposition()).value(SPANS_DROPPED) > 9_000


async def test_a_collector_that_refuses_and_a_span_that_cannot_be_made_do_not_end_the_thread() -> None:
    metrics = Metrics("router")

    def broken() -> list[Span]:
        raise ValueError("a mistake of ours")

    with collecting(status=400) as refusing:
        async with traced("router", refusing.url, metrics) as tracer:
            assert tracer is not None
            tracer.tell(broken)
            tracer.tell(spans)
    assert Scrape(metrics.exposition()).value(SPANS_DROPPED) == 1 + len(spans())


async def test_no_endpoint_is_no_tracer() -> None:
    async with traced("router", "", Metrics("router")) as tracer:
        assert tracer is None


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_an_endpoint_may_have_the_path_or_not(endpoint: str, url: str) -> None:
    assert url_of(endpoint) == url


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317", "http://"])
def test_what_is_no_url_is_one_line(endpoint: str) -> None:
    with pytest.raises(StartupError, match=f"--otlp-endpoint {endpoint}: .* such as http://127.0.0.1:4318"):
        url_of(endpoint)
