"""The one thread that an engine computes in, at a priority of its own."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

NICEST = 19


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
