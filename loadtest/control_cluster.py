"""The cluster of `loadtest control`: NATS, Redis, routers, a scheduler and timed workers, each a process."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.errors import StartupError
from loadtest.client import Client, ClientError
from loadtest.cluster import Say
from services.children import Children, ChildSpec
from services.embedded import EmbeddedServer, free_port

READY_S = 60.0
READY_POLL_S = 0.1
STOP_S = 10.0
ASK_S = 5.0
REQUESTS_MAX = "100000"
CPU_SLICE_MS = 20 if sys.platform == "linux" else 0
"""Nothing computes here beside the control plane: its processes need not push each other off the cores they share."""
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many of what."""

    routers: int = 1
    prefill: int = 56
    decode: int = 8
    rows: int = 128
    """Of each decode worker."""
    cpu_slice_ms: int = CPU_SLICE_MS
    """Of all processes but Redis, the client included; 0: as the system does."""


@dataclass(frozen=True, slots=True)
class Cluster:
    urls: tuple[str, ...]
    nats_url: str
    pids: dict[str, int]
    """Of every process but the client, by name."""

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds that each process, and this one, has used since its start."""
        return {name: _cpu_s(psutil.Process(pid)) for name, pid in {**self.pids, "client": os.getpid()}.items()}

    def rss_mb(self) -> dict[str, float]:
        """Resident memory of our own processes."""
        ours = {name: pid for name, pid in self.pids.items() if not name.endswith("-server")}
        return {name: psutil.Process(pid).memory_info().rss / MIB for name, pid in ours.items()}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@asynccontextmanager
async def control_cluster(sizes: Sizes, say: Say) -> AsyncIterator[Cluster]:
    """For the length of the block. Raises: StartupError."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pecsched-control-")))
        nats = await stack.enter_async_context(EmbeddedServer.nats(slice_ms=sizes.cpu_slice_ms))
        redis = await stack.enter_async_context(EmbeddedServer.redis())
        children = await stack.enter_async_context(Children(say, restarts_max=0))
        servers = ("--nats-url", nats.url, "--redis-url", redis.url)
        common = (*servers, "--log-level", "warning", "--cpu-slice-ms", str(sizes.cpu_slice_ms))
        ports = [free_port() for _ in range(sizes.routers)]
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        commands: dict[str, tuple[str, ...]] = {
            "scheduler": ("services.cli", "scheduler", *common),
            "workers": ("loadtest.control_workers", *common, *_workers_flags(sizes)),
            **{
                f"router-{i}": ("services.cli", "router", *common, "--port", str(port), "--requests-max", REQUESTS_MAX)
                for i, port in enumerate(ports)
            },
        }
        pids = {"nats-server": nats.pid or 0, "redis-server": redis.pid or 0}
        for name, (module, *flags) in commands.items():
            command = (sys.executable, "-P", "-m", module, *flags)
            pids[name] = await children.start(ChildSpec(name, command, folder / f"{name}.log", _environment()))
        for url in urls:
            await _until_ready(url, sizes, children)
        children.started()
        yield Cluster(urls, nats.url, pids)
        if children.given_up.is_set():
            raise StartupError(children.given_up_reason)
        await children.stop(commands, STOP_S)


def _workers_flags(sizes: Sizes) -> list[str]:
    named = {"--prefill": sizes.prefill, "--decode": sizes.decode, "--rows": sizes.rows}
    return [word for flag, value in named.items() for word in (flag, str(value))]


def _environment() -> dict[str, str]:
    """Without this project's variables: what is measured does not depend on who measures."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PECSCHED_")}


async def _until_ready(url: str, sizes: Sizes, children: Children) -> None:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + READY_S
    wanted = {"prefill": sizes.prefill, "decode": sizes.decode}
    client = Client(url, timeout_s=ASK_S)
    try:
        while True:
            if children.given_up.is_set():
                raise StartupError(children.given_up_reason)
            try:
                if (await client.get("/health"))["workers"] == wanted:
                    return
            except ClientError as error:
                if loop.time() > give_up_s:
                    raise StartupError(f"the cluster is not ready after {READY_S:g} s: {error}") from error
            await asyncio.sleep(READY_POLL_S)
    finally:
        await client.close()
