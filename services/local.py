"""`pecsched serve`: all of PecSched on this machine, as supervised child processes.

It starts nothing until the port, given servers and the settings of every role are known to be good;
then the model, NATS, Redis and the roles, one progress line each; then it watches. At the first
Ctrl-C (or SIGTERM) it drains: the router first, so that nothing new comes in while running requests
finish, then those it needs, and NATS last. The second one ends everything at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from common.errors import StartupError
from common.messages.views import ClusterView
from common.runtime.bus import Bus, BusError
from common.runtime.bus_nats import connect_nats
from common.runtime.store import StoreError
from common.runtime.store_redis import connect_redis
from common.runtime.supervisor import Supervisor
from common.runtime.urls import redacted
from common.settings import ServeSettings
from services.children import LAUNCHER, Children, ChildSpec
from services.embedded import EmbeddedServer, free_port
from services.local_plan import check_roles, make_plan, measured_roles, role_spec
from services.local_report import announcement, missing_parts, say
from services.ports import ReservedPorts
from services.run_file import RunFile, remove_run_file, run_file_path, started_s, write_run_file
from services.run_folder import new_run_folder
from services.status import describe_cluster

EXIT_NOT_STARTED = 2
EXIT_GIVEN_UP = 1
GIVEN_SERVER_S = 3.0
OWN_SERVER_S = 15.0
POLL_S = 0.1
ROLE_STOP_S = 8.0
SERVER_STOP_S = 5.0


class GivenUp(Exception):
    """A child crashed too often."""


def main(settings: ServeSettings) -> int:
    """Serve until told to stop; the exit status."""
    try:
        return asyncio.run(_serve(settings, dict(os.environ)))
    except StartupError as error:
        sys.stderr.write(f"pecsched serve: {error}\n")
        return EXIT_NOT_STARTED
    except GivenUp as error:
        sys.stderr.write(f"pecsched serve: {error}; everything was stopped\n")
        return EXIT_GIVEN_UP


async def _serve(settings: ServeSettings, env: Mapping[str, str]) -> int:
    stop = asyncio.Event()
    async with Children(say, settings.restarts_max) as children:
        _on_signals(stop, children)
        machine = LocalCluster(settings, env, children)
        try:
            await _unless(machine.start(), stop, children)
            if not stop.is_set():
                children.started()
                await _unless(stop.wait(), stop, children)
        finally:
            await machine.drain()
    return 0


class LocalCluster:
    """The stages of the start, in order, and the drain in reverse."""

    def __init__(self, settings: ServeSettings, env: Mapping[str, str], children: Children) -> None:
        self._settings = settings
        self._env = env
        self._children = children
        self._port = settings.port or free_port()
        self._metrics_ports = ReservedPorts(settings.metrics_host, measured_roles(settings), settings.metrics_port)
        self._plan = make_plan(settings, self._port, self._metrics_ports.ports)
        self._run_file = run_file_path(env)
        self._nats_url = settings.nats_url
        self._redis_url = settings.redis_url
        self._run_folder: Path | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine finds the router."""
        return f"http://{_bracketed(local_host(self._settings.host))}:{self._port}"

    async def start(self) -> None:
        """Everything up to the table of what runs. Raises: StartupError, GivenUp."""
        begun_s = time.monotonic()
        check_roles(self._plan, self._settings, self._env)
        _check_port(self._settings.host, self._port)
        await self._check_given_servers()
        async with _stage(f"model {self._settings.model}"):
            await _prepare_model(self._settings, self._env)
        self._run_folder = new_run_folder(self._settings.cache_dir)
        await self._start_servers(self._run_folder)
        await self._start_roles(self._log_dir(self._run_folder))
        async with _stage("cluster complete"):
            view = await self._wait_until_complete()
        self._write_run_file()
        say(announcement(self._table(view), self.url, self._nats_url, self._settings, time.monotonic() - begun_s))

    async def drain(self) -> None:
        """Stop everything, each within its bound."""
        self._metrics_ports.close()
        running = self._children.pids
        if not running:
            return
        say(f"stopping: running requests have {self._settings.drain_s:g} s to finish (Ctrl-C again: stop at once)")
        for number, names in enumerate((*self._plan.drain_order, ("redis",), ("nats",))):
            grace_s = self._settings.drain_s + 2.0 if number == 0 else ROLE_STOP_S
            present = [name for name in names if name in running]
            for name in await self._children.stop(present, grace_s):
                say(f"{name} did not stop within {grace_s:g} s and was killed")
        remove_run_file(self._run_file, os.getpid())
        say("stopped")

    async def _check_given_servers(self) -> None:
        if self._settings.nats_url:
            await _reach_nats(self._settings.nats_url, GIVEN_SERVER_S)
        if self._settings.redis_url:
            await _reach_redis(self._settings.redis_url, GIVEN_SERVER_S)

    async def _start_servers(self, folder: Path) -> None:
        if not self._nats_url:
            async with _stage("NATS server"):
                server = EmbeddedServer.nats()
                await self._children.start(self._server_spec("nats", server, folder))
                await _reach_nats(server.url, OWN_SERVER_S)
                self._nats_url = server.url
        if not self._redis_url:
            async with _stage("Redis server"):
                server = EmbeddedServer.redis(folder=folder / "redis")
                await self._children.start(self._server_spec("redis", server, folder))
                self._redis_url = f"{server.url}/0"
                await _reach_redis(self._redis_url, OWN_SERVER_S)

    def _server_spec(self, name: str, server: EmbeddedServer, folder: Path) -> ChildSpec:
        command = tuple(server.command_line(folder))
        return ChildSpec(name=name, command=command, log=self._log_dir(folder) / f"{name}.log", env=self._env)

    async def _start_roles(self, log_dir: Path) -> None:
        self._metrics_ports.before_roles_start()
        async with _stage("roles"):
            for role in self._plan.roles:
                spec = role_spec(role, self._settings, self._env, self._nats_url, self._redis_url, log_dir)
                await self._children.start(spec)

    async def _wait_until_complete(self) -> ClusterView:
        """Ask the scheduler and the router until nobody is missing. Raises: StartupError, naming who is."""
        said: tuple[str, ...] = ()
        missing = tuple(role.name for role in self._plan.roles)
        try:
            async with (
                asyncio.timeout(self._settings.start_s),
                httpx.AsyncClient(base_url=self.url, timeout=2.0, trust_env=False) as http,
                _bus(self._nats_url) as bus,
            ):
                while True:
                    view = await describe_cluster(bus, timeout_s=1.0)
                    missing = missing_parts(self._plan, view, router_healthy=await _healthy(http))
                    if view is not None and not missing:
                        return view
                    if missing != said:
                        say(f"  waiting for {', '.join(missing)}")
                        said = missing
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise StartupError(
                f"not complete after {self._settings.start_s:g} s: {', '.join(missing)} missing; "
                f"logs: {self._log_dir(self._run_folder)}"
            ) from None

    def _metrics(self) -> dict[str, str]:
        """Where Prometheus finds each role."""
        ports = self._plan.metrics_ports
        host = _bracketed(local_host(self._settings.metrics_host))
        own = {name: f"http://{host}:{port}/metrics" for name, port in ports.items()}
        return own | {self._plan.router.name: f"{self.url}/metrics"}

    def _table(self, view: ClusterView) -> list[tuple[str, int, str, str, Path]]:
        """Role, process id, address, metrics, log file."""
        metrics = {name: url.split("/")[2] for name, url in self._metrics().items()}
        addresses = {worker.profile.worker_id: worker.profile.data_address for worker in view.workers}
        own = {"nats": self._nats_url, "redis": self._redis_url, "router": self.url}
        places = {str(name): address for name, address in addresses.items()} | own
        log_dir = self._log_dir(self._run_folder)
        return [
            (name, pid, redacted(places.get(name, "-")), metrics.get(name, "-"), log_dir / f"{name}.log")
            for name, pid in self._children.pids.items()
        ]

    def _log_dir(self, folder: Path | None) -> Path:
        chosen = Path(self._settings.log_dir).expanduser() if self._settings.log_dir else folder
        assert chosen is not None
        try:
            chosen.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"--log-dir: cannot make {chosen}: {error.strerror}") from error
        return chosen

    def _write_run_file(self) -> None:
        run = RunFile(
            pid=os.getpid(),
            started_s=started_s(os.getpid()),
            url=self.url,
            nats_url=self._nats_url,
            log_dir=str(self._log_dir(self._run_folder)),
            pids=self._children.pids,
            metrics=self._metrics(),
        )
        try:
            write_run_file(run, self._run_file)
        except OSError as error:
            say(f"`pecsched ask` and `status` will need --url and --nats-url: {error}")


async def _unless(work: Coroutine[Any, Any, Any], stop: asyncio.Event, children: Children) -> None:
    """Run `work` until it is done or a stop is wanted. Raises: what it raises; GivenUp."""
    async with Supervisor() as tasks:
        waits = {
            tasks.spawn(work, name="work"),
            tasks.spawn(stop.wait(), name="stop"),
            tasks.spawn(children.given_up.wait(), name="given up"),
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if children.given_up.is_set():
        raise GivenUp(children.given_up_reason)


def _on_signals(stop: asyncio.Event, children: Children) -> None:
    def on_signal() -> None:
        if stop.is_set():
            children.hurry()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


@asynccontextmanager
async def _stage(title: str) -> AsyncIterator[None]:
    begun_s = time.monotonic()
    yield
    say(f"{title:<24} {time.monotonic() - begun_s:6.1f} s")


def _check_port(host: str, port: int) -> None:
    """Raises: StartupError, if nobody could listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(
            f"cannot listen on {host} port {port}: {reason}; choose others with --host, --port"
        ) from None


async def _reach_nats(url: str, patience_s: float) -> None:
    async with _bus(url, patience_s):
        pass


@asynccontextmanager
async def _bus(url: str, patience_s: float = GIVEN_SERVER_S) -> AsyncIterator[Bus]:
    try:
        bus = await connect_nats(url, "pecsched-serve", patience_s=patience_s)
    except BusError as error:
        raise StartupError(f"{error} (--nats-url; without it, serve starts a server)") from error
    try:
        yield bus
    finally:
        await bus.close()


async def _reach_redis(url: str, patience_s: float) -> None:
    try:
        store = await connect_redis(url, patience_s=patience_s)
    except StoreError as error:
        raise StartupError(f"{error} (--redis-url; without it, serve starts a server)") from error
    await store.close()


async def _healthy(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health")).is_success
    except httpx.HTTPError:
        return False


async def _prepare_model(settings: ServeSettings, env: Mapping[str, str]) -> None:
    """Convert or fetch it in a process of its own, so that torch never gets into this one. Raises: StartupError."""
    convert = (sys.executable, "-P", "-m", "services.engine.convert")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *convert),
        *("--model", settings.model, "--cache-dir", settings.cache_dir),
        env={**env, "TQDM_DISABLE": "1"},  # a progress bar is no line
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    line = ""
    try:
        async for raw in process.stderr:
            line = raw.decode(errors="replace").rstrip()
            if not line.startswith("error: "):
                say(f"  {line}")
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status:
        raise StartupError(line.removeprefix("error: ") or f"the model's conversion ended with status {status}")


def local_host(host: str) -> str:
    """Where somebody on this machine finds what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
