"""What `pecsched serve` leaves for `status`, `ask` and `story`: where to find it. One per user; the last start wins.

It lies in $XDG_RUNTIME_DIR/pecsched, or else in ~/.cache/pecsched, and counts only while the process
that wrote it lives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil

from common.errors import StartupError
from common.messages.base import Record

FILE_NAME = "serve.json"


class RunFile(Record, frozen=True, kw_only=True):
    """A running `pecsched serve`."""

    pid: int
    started_s: float
    """As the system tells it of `pid`: a later process with the same id is not this one."""
    url: str
    nats_url: str
    """May hold a password: the file is readable by its owner alone."""
    log_dir: str
    pids: dict[str, int]
    """Roles and servers at the start; a restart changes them."""
    metrics: dict[str, str]
    """Where Prometheus finds each role."""


def started_s(pid: int) -> float:
    """When a process started, by its system's clock. Raises: psutil.NoSuchProcess."""
    return float(psutil.Process(pid).create_time())


def run_file_path(env: Mapping[str, str]) -> Path:
    """Where the run file lies."""
    runtime = env.get("XDG_RUNTIME_DIR", "")
    base = Path(runtime) if runtime and Path(runtime).is_dir() else Path.home() / ".cache"
    return base / "pecsched" / FILE_NAME


def write_run_file(run: RunFile, path: Path) -> None:
    """Replace the file in one step. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{run.pid}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(run)))
    scratch.replace(path)


def read_run_file(path: Path) -> RunFile | None:
    """The running `serve`; None: there is none, or it is no longer there."""
    try:
        run = msgspec.json.decode(path.read_bytes(), type=RunFile)
        return run if abs(started_s(run.pid) - run.started_s) < 1.0 else None
    except (OSError, msgspec.MsgspecError, psutil.Error):
        return None


def remove_run_file(path: Path, pid: int) -> None:
    """Delete the file if it is (still) this process's."""
    run = read_run_file(path)
    if run is None or run.pid == pid:
        path.unlink(missing_ok=True)


def find_running(env: Mapping[str, str], flag: str) -> RunFile:
    """Raises: StartupError, saying which flag replaces a running `serve`."""
    run = read_run_file(run_file_path(env))
    if run is None:
        raise StartupError(f"no `pecsched serve` runs here; start one (make serve), or say where it is with {flag}")
    return run
