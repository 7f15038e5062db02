"""Times a long prefill by a group of worker processes against one of them alone; for benchmarks.

Every process loads the model and opens a door, as a worker does. Then, in turn, rank 0 prefills the prompt alone while
the others idle, each of them prefills it for itself at the same time, and all of them do by each scheme, in the chunks
that workers would choose. All ways go through the engine's passes; a way's first run does not count.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import msgspec

from common.messages.cluster import StepCost
from common.messages.groups import Announcement, GroupScheme
from common.messages.requests import Prompt, RequestSpec, SamplingParams
from common.settings import PrefillWorkerSettings
from common.units import Attempt, RequestId, RouterId
from services.engine.collectives import GroupKey, GroupShare
from services.engine.collectives_door import TcpGroupLinks, open_group_links
from services.engine.interface import EngineError, EngineProfile, Segment
from services.engine.measure import plan_chunks
from services.engine.torch_prefill import make_prefill_engine

ALONE = "alone"
APART = "each alone, at once"
"""What so many processes get of this machine when they exchange nothing: no group of them is faster."""
LOAD_S = 300.0
RUN_S = 600.0
"""Bounds on a process's silence."""

OnDone = Callable[[], None]


@dataclass(slots=True)
class WayTimes:
    """One way of prefilling the prompt; of each run that counts."""

    wall_s: list[float] = field(default_factory=list)
    wait_share: list[float] = field(default_factory=list)
    """Of the wall time, spent waiting for others; the rank that waited longest."""
    cpu_s: list[list[float]] = field(default_factory=list)
    """Processor time by rank."""
    tokens: set[int] = field(default_factory=set)
    """First tokens drawn."""


@dataclass(frozen=True, slots=True)
class Measured:
    ways: dict[str, WayTimes]
    """`ALONE`, `APART`, and each scheme by its name."""
    profiles: tuple[EngineProfile, ...]
    """What each rank says of itself, by rank."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A process's first word: the address of its door, and what it says of itself."""

    address: str
    profile: EngineProfile


@dataclass(frozen=True, slots=True)
class _Order:
    """Prefill the prompt. All ranks of the group get the same."""

    number: int
    scheme: GroupScheme | None
    """None: for itself."""
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Report:
    wall_s: float
    waited_s: float
    cpu_s: float
    token: int | None


def measure_groups(
    settings: PrefillWorkerSettings,
    size: int,
    schemes: Sequence[GroupScheme],
    tokens: int,
    runs: int,
    seed: int,
    on_run: OnDone,
) -> Measured:
    """Blocking. Raises: EngineError (a process fell silent or failed)."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    args = (msgspec.to_builtins(settings), size, tokens, seed)
    ranks = [
        context.Process(target=_serve_rank, args=(theirs, rank, *args), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        ends = [ours for ours, _ in pipes]
        opened = [_hear_opened(end) for end in ends]
        addresses = tuple(each.address for each in opened)
        ways: list[tuple[str, GroupScheme | None]] = [
            (ALONE, None),
            (APART, None),
            *((one.name(size), one) for one in schemes),
        ]
        found = {way: WayTimes() for way, _ in ways}
        for number, (run, (way, scheme)) in enumerate(itertools.product(range(runs + 1), ways)):
            among = ends[:1] if way == ALONE else ends
            reports = _all_report(among, _Order(number, scheme, addresses[: len(among)]))
            if run:
                _note(found[way], reports)
            on_run()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return Measured(found, tuple(each.profile for each in opened))


def _hear_opened(end: Connection) -> _Opened:
    opened = _hear(end, LOAD_S)
    if not isinstance(opened, _Opened):
        raise EngineError(str(opened))
    return opened


def _all_report(ends: Sequence[Connection], order: _Order) -> list[_Report]:
    for end in ends:
        end.send(order)
    reports = []
    for end in ends:
        report = _hear(end, RUN_S)
        if not isinstance(report, _Report):
            raise EngineError(str(report))
        reports.append(report)
    return reports


def _note(times: WayTimes, reports: Sequence[_Report]) -> None:
    """Its time is that of whoever drew the first token: of a group rank 0, of each for itself the last."""
    wall_s = max(report.wall_s for report in reports if report.token is not None)
    times.wall_s.append(wall_s)
    times.wait_share.append(max(report.waited_s for report in reports) / wall_s)
    times.cpu_s.append([report.cpu_s for report in reports])
    times.tokens |= {report.token for report in reports if report.token is not None}


def _hear(end: Connection, patience_s: float) -> object:
    """Raises: EngineError."""
    try:
        if end.poll(patience_s):
            return end.recv()
    except EOFError as error:
        raise EngineError("a measured process ended early") from error
    raise EngineError(f"a measured process said nothing for {patience_s} s")


# --- in the processes ----------------------------------------------------------------------------


def _serve_rank(end: Connection, rank: int, settings: dict[str, object], size: int, tokens: int, seed: int) -> None:
    given = msgspec.convert(settings, PrefillWorkerSettings)
    asyncio.run(_Process(end, rank, size, given, tokens, seed).serve())


class _Process:
    """One rank, until it is killed."""

    def __init__(
        self, end: Connection, rank: int, size: int, settings: PrefillWorkerSettings, tokens: int, seed: int
    ) -> None:
        self._end, self._rank, self._size, self._settings = end, rank, size, settings
        self._engine = make_prefill_engine(settings)
        dice = random.Random(seed)
        self._prompt = [dice.randrange(1_000) for _ in range(tokens)]

    async def serve(self) -> None:
        door = open_group_links(secret=self._settings.data_secret)()
        self._end.send(_Opened(door.address, self._engine.profile))
        while True:
            order: _Order = await asyncio.to_thread(self._end.recv)
            try:
                self._end.send(await self._prefill(order, door))
            except EngineError as error:
                self._end.send(f"rank {self._rank}: {error}")

    async def _prefill(self, order: _Order, door: TcpGroupLinks) -> _Report:
        name = RequestId(f"measured-{order.number}")
        spec = RequestSpec(
            request_id=name,
            router_id=RouterId(""),
            prompt=Prompt(tokens=len(self._prompt)),
            max_tokens=1,
            sampling=SamplingParams(temperature=0.0),
        )
        if order.scheme is None:
            self._engine.open(spec, self._prompt, None)
            report = await self._lead(name, 1)
        else:
            link = await door.join(GroupKey(request_id=name, attempt=Attempt(0)), self._rank, order.addresses)
            share = GroupShare(self._rank, self._size, order.scheme, link)
            calls: asyncio.Queue[Announcement] = asyncio.Queue()
            self._engine.open_share(spec, self._prompt, share, lambda _, call: calls.put_nowait(call))
            report = await (self._lead(name, self._size) if self._rank == 0 else self._follow(name, calls))
            report = replace(report, waited_s=link.waited_s)
        self._engine.close(name)
        return report

    async def _lead(self, name: RequestId, size: int) -> _Report:
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        past, token = 0, None
        for tokens in self._chunks(size):
            sample = past + tokens == len(self._prompt)
            result = await self._engine.run([Segment(name, past, tokens, sample)])
            past += tokens
            token = result.sampled[0].token_id if sample else None
        return _Report(time.perf_counter() - begun_s, 0.0, time.process_time() - begun_cpu_s, token)

    async def _follow(self, name: RequestId, calls: asyncio.Queue[Announcement]) -> _Report:
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        past = 0
        while past < len(self._prompt):
            async with asyncio.timeout(RUN_S):
                call = await calls.get()
            await self._engine.run([Segment(name, call.start, call.tokens, False)])
            past = call.start + call.tokens
        return _Report(time.perf_counter() - begun_s, 0.0, time.process_time() - begun_cpu_s, None)

    def _chunks(self, size: int) -> Iterator[int]:
        """As a worker's core cuts the prompt: each rank computes a part of a chunk."""
        cost = self._engine.profile.step_cost
        share = StepCost(pass_s=cost.pass_s, token_s=cost.token_s / size, pair_s=cost.pair_s / size)
        settings = msgspec.structs.replace(self._settings, chunk_tokens=self._settings.chunk_tokens * size)
        return plan_chunks(share, self._engine.profile.layers, len(self._prompt), settings)
