"""A compose project on the machine's Docker engine, as an operator drives it: by the docker command."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "compose"
COMPOSE_MIN = (2, 24)
COMMAND_S = 1_800.0
"""Longest single command: a first build."""
POLL_S = 0.25
PROBE_IMAGE = "redis:7-bookworm"


class NoEngine(Exception):
    """Something is missing on this machine; one line that says what."""


class DockerFailed(Exception):
    """A docker command failed: which, and the last line it wrote."""


class TookTooLong(Exception):
    """What was waited for did not come."""


def docker(*arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = COMMAND_S) -> str:
    """What the command prints on stdout. `env`: instead of this process's. Raises: DockerFailed."""
    try:
        done = subprocess.run(
            ["docker", *arguments],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise DockerFailed(f"docker {' '.join(arguments)}: no end after {timeout_s:g} s") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise DockerFailed(f"docker {' '.join(arguments)}: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def require_engine() -> str:
    """Versions of what is there. Raises: NoEngine."""
    try:
        engine = docker("version", "--format", "{{.Server.Version}}", timeout_s=30.0).strip()
    except FileNotFoundError:
        raise NoEngine("there is no docker command: install Docker Engine 20.10 or newer") from None
    except DockerFailed as error:
        raise NoEngine(f"no Docker engine answers: {str(error).partition(': ')[2]}") from None
    try:
        found = docker("compose", "version", "--short", timeout_s=30.0).strip()
    except DockerFailed:
        raise NoEngine("docker has no compose command: install the plugin docker-compose-v2") from None
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if version < COMPOSE_MIN:
        raise NoEngine(f"Compose {found} is too old: {'.'.join(map(str, COMPOSE_MIN))} or newer is needed")
    return f"Docker Engine {engine}, Compose {found}"


def free_ports(count: int) -> int:
    """The first of so many ports of 127.0.0.1 in a row that nobody uses. Below those of outgoing connections."""
    run = 0
    for port in range(21_000 + os.getpid() % 2_000, 32_000):
        with socket.socket() as probe:
            run = run + 1 if probe.connect_ex(("127.0.0.1", port)) else 0
        if run == count:
            return port - count + 1
    raise NoEngine(f"no {count} free ports in a row")


def publishes_ports() -> bool:
    """Whether a container's published port can be reached from here. (Not where the engine has no bridge.)"""
    port = free_ports(1)
    container = docker("run", "--rm", "-d", "-p", f"127.0.0.1:{port}:6379", PROBE_IMAGE).strip()
    try:
        deadline_s = time.monotonic() + 10.0
        while time.monotonic() < deadline_s:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0) as probe:
                probe.settimeout(1.0)
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith(b"+PONG"):
                    return True
            time.sleep(POLL_S)
        return False
    finally:
        docker("rm", "-f", "-v", container)


@dataclass(frozen=True, slots=True)
class Container:
    id: str
    service: str
    state: str
    health: str

    @property
    def is_well(self) -> bool:
        return self.state == "running" and self.health in ("healthy", "")


class Project:
    """`on_host`: with compose.host.yaml. `env`: what the files are filled in with."""

    def __init__(self, name: str, env: Mapping[str, str], *, on_host: bool) -> None:
        self.name = name
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("PECSCHED_")} | dict(env)
        self.on_host = on_host

    def compose(self, *arguments: str) -> str:
        """Raises: DockerFailed."""
        files = ["compose.yaml", *(["compose.host.yaml"] if self.on_host else [])]
        named = [part for file in files for part in ("-f", str(FOLDER / file))]
        return docker("compose", "-p", self.name, *named, *arguments, env=self.env)

    def up(self, *services: str, scale: Mapping[str, int] | None = None) -> None:
        """Start or change, and wait until all is healthy. Raises: DockerFailed."""
        scales = [part for service, count in (scale or {}).items() for part in ("--scale", f"{service}={count}")]
        self.compose("up", "-d", "--wait", "--wait-timeout", "300", *scales, *services)

    def containers(self, service: str | None = None) -> list[Container]:
        """Those that exist, running or not."""
        lines = self.compose("ps", "--all", "--format", "json", *([service] if service else [])).splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [Container(row["ID"], row["Service"], row["State"], row.get("Health", "")) for row in rows]

    def wait_well(self, container_id: str, patience_s: float = 120.0) -> float:
        """Wait until this container is healthy: the seconds it took. Raises: TookTooLong."""
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < patience_s:
            state, health = _state_of(container_id)
            if state == "running" and health == "healthy":
                return time.monotonic() - begun_s
            time.sleep(POLL_S)
        raise TookTooLong(f"container {container_id} is {state}, {health} after {patience_s:g} s")

    def kill_process(self, container_id: str) -> None:
        """SIGKILL to all that runs in it but its init, as a crash. (`docker kill` counts as the operator's wish.)"""
        with suppress(DockerFailed):  # the shell that kills is killed with the rest
            docker("exec", container_id, "sh", "-c", "kill -9 -1")

    def restarts(self, container_id: str) -> int:
        return int(docker("inspect", "-f", "{{.RestartCount}}", container_id))

    def wait_restarted(self, container_id: str, patience_s: float = 60.0) -> None:
        """Wait until the engine has started it again by itself. Raises: TookTooLong."""
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            if self.restarts(container_id):
                return
            time.sleep(POLL_S)
        raise TookTooLong(f"container {container_id} was not started again within {patience_s:g} s")

    def down(self) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans")

    def leftovers(self) -> list[str]:
        """Containers, networks and volumes of this project that exist."""
        label = f"label=com.docker.compose.project={self.name}"
        listings = {"container": ("ps", "-aq"), "network": ("network", "ls", "-q"), "volume": ("volume", "ls", "-q")}
        return [
            f"{kind} {each}"
            for kind, listing in listings.items()
            for each in docker(*listing, "--filter", label).split()
        ]

    def logs(self, tail: int = 40) -> str:
        return self.compose("logs", "--no-color", "--tail", str(tail))


def _state_of(container_id: str) -> Sequence[str]:
    return docker("inspect", "-f", "{{.State.Status}} {{.State.Health.Status}}", container_id).split()


def image_mb(name: str) -> float:
    return int(docker("image", "inspect", "-f", "{{.Size}}", name)) / 1e6
