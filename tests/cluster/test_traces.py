"""Traces of whole requests: every role's real service and core, in one process and virtual time."""

from __future__ import annotations

import asyncio
from itertools import groupby

import pytest

from common.runtime.virtual_time import virtual
from common.tracing import parse_traceparent
from tests.cluster.world import cluster
from tests.traces import SpanList, is_whole, sum_s

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("group_max", [1, 2])
def test_a_trace_of_a_paused_long_is_whole_and_adds_up_to_its_jct(group_max):
    @virtual
    async def go():
        traces = SpanList()
        async with cluster(group_max=group_max, prefill=group_max, tracer=traces) as c:
            long = c.submit(8_000, max_tokens=16)
            await asyncio.sleep(0.5)
            while c.count("pauses") < 3:
                c.submit(c.random.randint(20, 300), max_tokens=4)
                await asyncio.sleep(0.2)
            await c.until(lambda: long.ended)
            jct_s = long.token_s[-1] - long.asked_s
            pauses = c.count("pauses")
        own, parts = traces.of(long.request_id)
        is_whole(own, parts)
        assert own.end_s - own.start_s == pytest.approx(jct_s, rel=0.001)
        assert sum_s(parts) == pytest.approx(jct_s, rel=0.02)
        names = [name for name, _ in groupby(part.name for part in parts)]
        assert names == [*["prefill", "pause"] * pauses, "prefill", "decode"]
        workers = {part.attributes["pecsched.workers"] for part in parts}
        assert workers == {",".join(f"p{i}" for i in range(group_max))}

    go()


@virtual
async def test_a_trace_of_a_short_tells_queueing_prefill_handoff_and_decode():
    traces = SpanList()
    async with cluster(prefill=1, tracer=traces) as c:
        c.hub.faults.delay_s = (0.01, 0.02)
        answers = [c.submit(300, max_tokens=20) for _ in range(4)]
        await c.until(lambda: all(answer.ended for answer in answers))
    for answer in answers[1:]:  # the first one waits for nobody
        own, parts = traces.of(answer.request_id)
        is_whole(own, parts)
        assert [part.name for part in parts][-3:] == ["prefill", "handoff", "decode"]
        assert sum_s(parts) == pytest.approx(answer.token_s[-1] - answer.asked_s, rel=0.02)
        prefill, handoff, decode = parts[-3:]
        assert prefill.attributes["pecsched.worker_id"] == handoff.attributes["pecsched.from_worker"] == "p0"
        assert decode.attributes["pecsched.worker_id"] == handoff.attributes["pecsched.to_worker"] == "d0"
    waits = [parts[0] for _, parts in map(traces.of, [answer.request_id for answer in answers])]
    assert any(part.name == "queue" for part in waits), "one of them waited for the pass of another"


@virtual
async def test_the_trace_of_a_client_goes_on_and_what_it_does_not_want_is_not_kept():
    traces = SpanList()
    async with cluster(tracer=traces) as c:
        kept = c.submit(100, traceparent=CLIENT)
        unwanted = c.submit(100, traceparent=CLIENT.removesuffix("01") + "00")
        broken = c.submit(100, traceparent="00-nonsense")
        await c.until(lambda: kept.ended and unwanted.ended and broken.ended)
    client = parse_traceparent(CLIENT)
    own, parts = traces.of(kept.request_id)
    assert (own.context.trace_id, own.parent_id) == (client.trace_id, client.span_id)
    is_whole(own, parts)
    assert not [span for span in traces.spans if span.attributes["pecsched.request_id"] == unwanted.request_id]
    own, parts = traces.of(broken.request_id)
    assert (own.parent_id, own.context.trace_id == client.trace_id) == ("", False)
    is_whole(own, parts)


@virtual
async def test_a_loss_is_a_stage_of_the_trace():
    traces = SpanList()
    async with cluster(tracer=traces) as c:
        c.broker.faults.delay_s = (0.001, 0.002)
        long = c.submit(6_000, max_tokens=8)
        await asyncio.sleep(0.7)
        (name,) = next(request.workers for request in c.view.requests)
        await c.kill(name)
        await c.until(lambda: long.ended)
        c.start(name)
    own, parts = traces.of(long.request_id)
    is_whole(own, parts)
    assert sum_s(parts) == pytest.approx(own.end_s - own.start_s, rel=0.02)
    assert [part.error for part in parts if part.name == "interrupted"] == ["interrupted"]
    assert not own.error
    assert sum(part.name == "prefill" for part in parts) == 2


@virtual
async def test_a_request_whose_client_leaves_says_so():
    traces = SpanList()
    async with cluster(tracer=traces) as c:
        long = c.submit(6_000, max_tokens=8)
        await asyncio.sleep(0.7)
        await c.cancel(long)
    own, parts = traces.of(long.request_id)
    assert own.error == "abort"
    is_whole(own, parts)
    assert parts[-1].name == "prefill"
