"""Ports for the roles' metrics, found by `pecsched serve` and used by its children later.

Between the two somebody else could take one: with sixty workers and two clusters that start at once, somebody would.
So they stay bound here, without listening. On Linux another socket may then be bound to the same port and listen, if
both allow it (SO_REUSEADDR), and nobody else is given it; elsewhere they are let go before the roles start.
"""

from __future__ import annotations

import random
import socket
import sys
from contextlib import ExitStack

from common.errors import StartupError
from services.embedded import PORT_TRIES, PORTS

SHARED = sys.platform == "linux"
PORT_MAX = 65_535


class ReservedPorts:
    """`count` ports of `host`: `first` and those after it; 0: any. Close it when the roles are gone."""

    def __init__(self, host: str, count: int, first: int = 0) -> None:
        """Raises: StartupError, if one of them is taken, or there is no such host."""
        self._held = ExitStack()
        try:
            self.ports = tuple(self._hold(host, first + number if first else 0) for number in range(count))
        except BaseException:
            self.close()
            raise

    def before_roles_start(self) -> None:
        """Their turn."""
        if not SHARED:
            self.close()

    def close(self) -> None:
        self._held.close()

    def _hold(self, host: str, port: int) -> int:
        if port > PORT_MAX:
            raise StartupError(f"--metrics-port: the roles need ports up to {port}, and the last one is {PORT_MAX}")
        tries = [port] if port else random.SystemRandom().sample(PORTS, PORT_TRIES)
        reason = ""
        for each in tries:
            try:
                family, kind, protocol, _, address = socket.getaddrinfo(host, each, type=socket.SOCK_STREAM)[0]
                held = self._held.enter_context(socket.socket(family, kind, protocol))
                if port:
                    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a run before linger
                held.bind(address)
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            return each
        raise StartupError(
            f"cannot listen on {host}:{tries[-1]} for metrics: {reason}; choose others with --metrics-port"
        )
