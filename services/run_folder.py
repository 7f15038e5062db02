"""Where one `pecsched serve` keeps its logs and Redis its data: a folder per run, the last few kept."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import psutil

from common.errors import StartupError
from common.model_files import cache_folder

RUNS_KEPT = 5


def new_run_folder(cache_dir: str) -> Path:
    """A new, empty folder. Old ones are removed, except those of processes that live. Raises: StartupError."""
    runs = cache_folder(cache_dir) / "runs"
    folder = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_old(runs)
    except OSError as error:
        raise StartupError(f"cannot make {folder}: {error.strerror} (see --cache-dir)") from error
    return folder


def _forget_old(runs: Path) -> None:
    folders = sorted(path for path in runs.iterdir() if path.is_dir())
    for folder in folders[:-RUNS_KEPT]:
        pid = folder.name.rpartition("-")[2]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)
