"""Longer turns on cores that processes share (Linux).

A process that is woken by a message pushes off its core whoever runs there, does a tenth of a millisecond's work, and
leaves both with cold caches. Under `SCHED_BATCH` it waits until the core is free or the other's turn is over, and finds
by then what several have sent; with longer turns (a custom slice, Linux 6.12 and later; ignored before) that is seldom
cut short. More gets done on cores that are all busy; where one is free nothing waits. Not for a process beside an
engine that computes: it must be heard at once, for a pause.

Also a program that becomes another, `python turns.py SLICE_MS COMMAND …`, for a server beside its clients: run by path
with `-I -S`, as `launch.py`; what it sets survives the exec, and so does the id.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator

SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
"""Number of the system call by machine; glibc has had a function for it since 2.41 only."""
SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime (here: the slice, in nanoseconds), deadline, period. See sched(7)."""


def take_turns(slice_ms: int) -> None:
    """Make the calling thread, and those it starts from now on, run in turns of `slice_ms` (1 to 100; 0: the system's
    own length), without pushing anybody off. Raises: OSError, where the system does not allow or know it."""
    if sys.platform != "linux":
        raise OSError(f"not known on {sys.platform}")
    _schedule(os.SCHED_BATCH, slice_ms)


@contextlib.contextmanager
def long_turns(slice_ms: int) -> Iterator[None]:
    """`take_turns` for the length of the block; 0: nothing changes. Raises: OSError."""
    if not slice_ms:
        yield
        return
    take_turns(slice_ms)
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, slice_ms: int) -> None:
    number = SCHED_SETATTR.get(platform.machine())
    if number is None:
        raise OSError(f"not known on {platform.machine()}")
    nice = os.getpriority(os.PRIO_PROCESS, 0)  # would be set to 0 otherwise
    attributes = SCHED_ATTR.pack(SCHED_ATTR.size, policy, 0, nice, 0, slice_ms * 1_000_000, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), 0, attributes, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def main(slice_ms: str, *command: str) -> None:
    with contextlib.suppress(OSError):  # forbidden to some containers; then it runs as any other process
        take_turns(int(slice_ms))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
