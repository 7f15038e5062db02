"""What a live page is told, beside what the roles really did: real cores, virtual time."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import cast

import msgspec
import pytest

from common.runtime.virtual_time import virtual
from services.router.activity import GRACE_S
from services.router.activity_feed import LINGER_S, LOOK_S
from services.router.activity_records import Change, SegmentRow, State
from services.router.service import Router
from tests.cluster.world import Cluster, cluster, seeds


class Watcher:
    """Keeps what a page would: every segment as it was told last."""

    def __init__(self) -> None:
        self.segments: dict[int, SegmentRow] = {}
        self.names: dict[int, str] = {}
        self.lanes: dict[int, str] = {}
        self.here: set[str] = set()
        self.changes = 0

    def hear(self, chunk: bytes) -> None:
        name, data = (line.split(b": ", 1)[1] for line in chunk.strip().split(b"\n"))
        assert name in (b"state", b"change"), chunk
        change = msgspec.json.decode(data, type=State).change if name == b"state" else None
        change = change or msgspec.json.decode(data, type=Change)
        self.changes += 1
        self.segments.update({row.segment: row for row in change.segments})
        self.names.update({row.request: row.request_id for row in change.requests})
        if change.summary is not None:
            self.lanes.update({lane.lane: lane.worker_id for lane in change.summary.lanes})
            self.here = {lane.worker_id for lane in change.summary.lanes if lane.here}

    def of(self, request_id: str) -> dict[str, list[SegmentRow]]:
        """By kind, in order of time; what was nothing is left out."""
        found: dict[str, list[SegmentRow]] = defaultdict(list)
        for row in sorted(self.segments.values(), key=lambda row: (row.begin_s, row.segment)):
            if self.names[row.request] == request_id and (row.end_s is None or row.end_s > row.begin_s):
                found[row.kind].append(row)
        return found

    @property
    def open(self) -> list[SegmentRow]:
        return [row for row in self.segments.values() if row.end_s is None]


@asynccontextmanager
async def watching(c: Cluster, router: str = "r0") -> AsyncIterator[Watcher]:
    watcher = Watcher()

    async def read() -> None:
        async with cast(Router, c.nodes[router].service).activity.watch() as page:
            async for chunk in page.chunks():
                watcher.hear(chunk)

    reading = asyncio.get_running_loop().create_task(read())
    try:
        await c.until(lambda: watcher.here)
        yield watcher
    finally:
        reading.cancel()
        await asyncio.wait([reading])


def check_short(watcher: Watcher, request_id: str, decoders: set[str]) -> None:
    rows = watcher.of(request_id)
    assert len(rows["prefill"]) == 1, f"{request_id}: {rows}"
    prefill = rows["prefill"][0]
    assert len(rows["handoff"]) == (watcher.lanes[prefill.lane] not in decoders), f"{request_id}: {rows}"
    for handoff in rows["handoff"]:
        assert handoff.begin_s == prefill.end_s
        assert watcher.lanes[handoff.detail] in decoders
    assert len(rows["decode"]) == 1, f"{request_id}: {rows}"
    assert rows["decode"][0].begin_s >= (prefill.end_s or 0.0)
    assert watcher.lanes[rows["decode"][0].lane] in decoders


def check_long(watcher: Watcher, request_id: str) -> int:
    """Parts and pauses follow each other without a gap on every lane. Returns how many pauses there were."""
    rows = watcher.of(request_id)
    whole = sorted((*rows["part"], *rows["pause"]), key=lambda row: (row.lane, row.begin_s))
    for row, after in pairwise(whole):
        assert row.lane != after.lane or (row.end_s == after.begin_s and row.kind != after.kind), f"{row} {after}"
    assert rows["part"]
    assert rows["long_decode"]
    return len(rows["pause"])


async def mixed_load(c: Cluster) -> None:
    c.submit(6_000, max_tokens=6)
    c.submit(5_000, max_tokens=6)
    for _ in range(40):
        c.submit(60, max_tokens=6)
        await asyncio.sleep(c.random.expovariate(6.0))
    await c.until(lambda: all(answer.ended for answer in c.answers))
    await asyncio.sleep(2 * LOOK_S)


@pytest.mark.parametrize(
    "switches",
    [{}, {"disaggregation": False}, {"group_max": 2}, {"policy": "fifo"}],
    ids=["pecsched", "no disaggregation", "groups", "fifo"],
)
def test_a_mixed_load_is_told_as_it_happened(switches):
    @virtual
    async def run():
        async with cluster(prefill=2, decode=1, **switches) as c, watching(c) as watcher:
            await mixed_load(c)
            assert not watcher.open
            longs = [answer for answer in c.answers if len(answer.prompt_ids) > 1_000]
            pauses = sum(check_long(watcher, long.request_id) for long in longs)
            assert switches or pauses == c.count("pauses") > 0, "as many gaps as the scheduler counted pauses"
            decoders = {"d0"} if switches.get("disaggregation", True) else {"p0", "p1"}
            for answer in c.answers:
                if answer not in longs:
                    check_short(watcher, answer.request_id, decoders)

    run()


@virtual
async def test_a_page_that_opens_late_sees_what_goes_on_already():
    async with cluster(prefill=2, decode=1) as c:
        long = c.submit(8_000, max_tokens=4)
        await c.until(lambda: any(r.state == "running" and r.age_s > 2 * GRACE_S for r in c.view.requests))
        async with watching(c) as watcher:
            await c.until(lambda: watcher.of(long.request_id)["part"])
            await c.until(lambda: long.ended)
            await asyncio.sleep(2 * LOOK_S)
            assert watcher.of(long.request_id)["long_decode"]
            assert not watcher.open


@seeds(3)
def test_what_is_lost_on_the_way_is_mended(seed):
    @virtual
    async def run():
        async with cluster(prefill=2, decode=1, seed=seed) as c, watching(c) as watcher:
            c.broker.faults.drop_share = 0.05
            await mixed_load(c)
            c.broker.faults.drop_share = 0.0
            await c.until(lambda: not watcher.open)

    run()


@virtual
async def test_a_killed_worker_leaves_its_lane_and_its_work_goes_on_elsewhere():
    async with cluster(prefill=2, decode=1) as c, watching(c) as watcher:
        longs = [c.submit(6_000, max_tokens=4), c.submit(6_000, max_tokens=4)]
        await c.until(lambda: len({row.lane for row in watcher.open if row.kind == "part"}) == 2)
        await c.kill("p0")
        await c.until(lambda: watcher.here == {"p1", "d0"})
        assert all(watcher.lanes[row.lane] != "p0" for row in watcher.open)
        await c.until(lambda: all(long.ended for long in longs))
        await c.until(lambda: not watcher.open)
        c.start("p0")
        await c.until(lambda: watcher.here == {"p0", "p1", "d0"})


@virtual
async def test_a_page_hears_ten_times_a_second_at_most_and_nobody_is_heard_when_it_has_gone():
    async with cluster(prefill=2, decode=1) as c:
        async with watching(c) as watcher:
            before, begun_s = watcher.changes, asyncio.get_running_loop().time()
            await mixed_load(c)
            assert watcher.changes - before <= 10 * (asyncio.get_running_loop().time() - begun_s) + 1
        activity = cast(Router, c.nodes["r0"].service).activity
        assert activity.is_listening
        await asyncio.sleep(LINGER_S + 2 * LOOK_S)
        assert not activity.is_listening
