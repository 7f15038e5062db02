"""`pecsched status` and `pecsched story`: what the scheduler answers, for people."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table

from common.errors import StartupError
from common.messages.base import Message
from common.messages.cluster import WorkerProfile
from common.messages.views import ClusterView, DescribeCluster, QueryFailed, StoryTold, TellStory
from common.runtime import subjects
from common.runtime.bus import Bus, BusError, BusTimeout, NoResponders
from common.runtime.bus_nats import connect_nats
from common.runtime.wire import WireError, decode, encode
from common.settings import StatusSettings, StorySettings
from common.units import RequestId
from services.run_file import find_running

T = TypeVar("T")

PIPE_WIDTH = 140
"""Columns where there is no terminal to ask."""


def status(settings: StatusSettings) -> int:
    """Print what runs. Raises: StartupError, if nobody answers."""
    view = asyncio.run(_with_bus(settings.nats_url, settings.timeout_s, lambda bus: _ask_view(bus, settings.timeout_s)))
    if settings.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(view)).decode() + "\n")
    else:
        console = Console()
        console.width = console.width if console.is_terminal else PIPE_WIDTH
        console.print(render(view))
    return 0


def story(settings: StorySettings) -> int:
    """Print the life of a request. Exit status 1: the scheduler does not know it."""
    query = TellStory(request_id=RequestId(settings.request_id))
    told = asyncio.run(
        _with_bus(settings.nats_url, settings.timeout_s, lambda bus: _query(bus, query, StoryTold, settings.timeout_s))
    )
    if not told.lines:
        sys.stderr.write(f"pecsched story: {settings.request_id}: unknown, or forgotten (the log is bounded)\n")
        return 1
    sys.stdout.write("\n".join(told.lines) + "\n")
    return 0


async def describe_cluster(bus: Bus, *, timeout_s: float) -> ClusterView | None:
    """The scheduler's view; None: no scheduler answers (yet)."""
    try:
        return await _query(bus, DescribeCluster(), ClusterView, timeout_s)
    except BusError:
        return None


def render(view: ClusterView) -> RenderableType:
    """Workers and what each runs, requests, queues and counters."""
    return Group(_workers(view), _requests(view), *_summary(view))


def _workers(view: ClusterView) -> Table:
    table = Table(title="workers", title_justify="left", box=None, pad_edge=False)
    for column in ("worker", "role", "node", "replica", "address", "runs", "to prefill", "KV reserved", "silent"):
        table.add_column(
            column, overflow="fold", justify="right" if column.startswith(("to", "KV", "silent")) else "left"
        )
    for worker in sorted(view.workers, key=lambda worker: worker.profile.worker_id):
        profile = worker.profile
        share = worker.kv_reserved_tokens / max(1, profile.kv_capacity_tokens)
        table.add_row(
            profile.worker_id,
            profile.role,
            profile.node,
            _replica(profile),
            profile.data_address,
            _some(worker.requests),
            f"{worker.queued_tokens} tokens",
            f"{worker.kv_reserved_tokens}/{profile.kv_capacity_tokens} ({share:.0%})",
            f"{worker.silent_s:.1f} s",
        )
    return table


def _replica(profile: WorkerProfile) -> str:
    """The copy of the weights it holds, or its shard of one."""
    rank = f" rank {profile.tp_rank} of {profile.tp_size}" if profile.tp_size > 1 else ""
    return f"{profile.replica}{rank}"


def _requests(view: ClusterView) -> Table:
    table = Table(title="\nrequests", title_justify="left", box=None, pad_edge=False, show_header=bool(view.requests))
    for column in ("request", "attempt", "class", "state", "prompt", "age", "on"):
        table.add_column(column, overflow="fold")
    for each in view.requests:
        table.add_row(
            each.request_id,
            str(each.attempt),
            each.length_class,
            each.state,
            f"{each.prompt_tokens} tokens",
            f"{each.age_s:.1f} s",
            _some(each.workers),
        )
    if not view.requests:
        table.add_row("none")
    return table


def _summary(view: ClusterView) -> list[str]:
    counters = ", ".join(f"{name} {count}" for name, count in sorted(view.counters.items())) or "none yet"
    return [
        "",
        f"policy {view.policy}; waiting: {view.queued_shorts} short, {view.queued_longs} long "
        f"({view.queued_tokens} tokens); routers: {_some(view.routers)}; "
        f"SP coordinator: {'present' if view.coordinator_present else 'missing'}",
        f"since the scheduler started: {counters}",
        *(f"{stranger.worker_id} is kept out: {stranger.reason}" for stranger in view.strangers),
        f"decision time: p50 {view.decision_p50_s * 1e6:.0f} µs, p99 {view.decision_p99_s * 1e6:.0f} µs",
    ]


def _some(names: tuple[str, ...], shown_max: int = 4) -> str:
    more = f" and {len(names) - shown_max} more" if len(names) > shown_max else ""
    return ", ".join(names[:shown_max]) + more or "-"


async def _ask_view(bus: Bus, timeout_s: float) -> ClusterView:
    return await _query(bus, DescribeCluster(), ClusterView, timeout_s)


AnswerT = TypeVar("AnswerT", ClusterView, StoryTold)


async def _query(bus: Bus, question: Message, answer_type: type[AnswerT], timeout_s: float) -> AnswerT:
    """Raises: BusError; StartupError, if the answer is a refusal or cannot be read."""
    delivery = await bus.request(subjects.SCHEDULER_QUERY, encode(question), timeout_s=timeout_s)
    try:
        answer = decode(delivery.data, answer_type | QueryFailed)
    except WireError as error:
        raise StartupError(f"the scheduler's answer cannot be read (another version?): {error}") from error
    if isinstance(answer, QueryFailed):
        raise StartupError(answer.message)
    assert isinstance(answer, answer_type)
    return answer


async def _with_bus(nats_url: str, timeout_s: float, work: Callable[[Bus], Awaitable[T]]) -> T:
    url = nats_url or find_running(os.environ, "--nats-url").nats_url
    try:
        bus = await connect_nats(url, "pecsched-cli", patience_s=timeout_s)
    except BusError as error:
        raise StartupError(str(error)) from error
    try:
        return await work(bus)
    except NoResponders:
        raise StartupError("no scheduler is there (or a new one is just taking over)") from None
    except BusTimeout:
        raise StartupError(f"the scheduler did not answer within {timeout_s:g} s") from None
    except BusError as error:
        raise StartupError(str(error)) from error
    finally:
        await bus.close()
