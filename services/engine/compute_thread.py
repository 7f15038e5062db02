"""The one thread that an engine computes in, at a priority of its own."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

NICEST = 19
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def compute_thread(name: str, threads: int, nice: int, device: torch.device) -> ThreadPoolExecutor:
    """`threads`: of torch, for one operator. `nice`: levels of niceness above the process's own; means something on
    a Linux CPU, where priority is counted per thread and the pool of torch's threads inherits it, and nothing
    elsewhere. The thread starts with its first work."""
    return ThreadPoolExecutor(1, name, initializer=_prepare, initargs=(threads, nice if device.type == "cpu" else 0))


def _prepare(threads: int, nice: int) -> None:
    torch.set_num_threads(threads)
    if nice and sys.platform == "linux":
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, min(NICEST, os.getpriority(os.PRIO_PROCESS, me) + nice))


def core_wait_s() -> float:
    """How long the calling thread has been ready to run without a core since it began (Linux: the second figure of
    proc's `schedstat`); 0.0 where the system does not tell."""
    with suppress(OSError, IndexError, ValueError):
        return int(_SCHEDSTAT.read_bytes().split()[1]) / 1e9
    return 0.0
