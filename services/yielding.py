"""Become a server that yields to those it serves: `python yielding.py COMMAND …`. For a NATS beside its clients.

It computes on one core: on two, a second one hands each message from thread to thread and takes both cores from its
clients. And it pushes nobody off a core who has just written to it (`SCHED_BATCH`, Linux), but reads what they all
wrote once they rest. Run by path with `-I -S`, as `launch.py`; what it sets survives the exec, and so does the id.
"""

from __future__ import annotations

import contextlib
import os
import sys


def main(command: list[str]) -> int:
    os.environ.setdefault("GOMAXPROCS", "1")  # an operator's own goes first
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # forbidden to some containers; then it runs as any other process
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
