"""Become a command that dies with its parent: `python launch.py PARENT_PID COMMAND …`.

A supervisor that is killed hard cannot stop its children, so the kernel does it: the child asks for
SIGKILL at its parent's death (Linux; elsewhere this only starts the command). The request survives
the exec, so the command keeps this process's id and need not know. Run by path with `-I -S`: it
imports nothing but the standard library, and costs a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    parent, command = int(argv[0]), argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before we could ask
        return 1
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
