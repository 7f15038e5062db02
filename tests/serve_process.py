"""A `pecsched serve` in a process of its own, read line by line; nothing of it outlives the block."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psutil

PATIENCE_S = 90.0
LAST_LINE = "  nats --server"
"""Begins the last line that is printed when all is ready."""


def clean_environment() -> dict[str, str]:
    """This process's environment without anybody's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PECSCHED_")}


class ServeProcess:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def until(self, part: str) -> str:
        """Read its output up to a line that contains `part`: that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if part in line:
                return self.lines[-1]
        _, err = self.process.communicate()
        raise AssertionError(f"ended without {part!r}: {self.lines} {err}")

    def _rows(self) -> dict[str, list[str]]:
        head = next(index for index, line in enumerate(self.lines) if line.startswith("ROLE"))
        rows = [line.split() for line in self.lines[head + 1 :]]
        return {row[0]: row for row in rows if len(row) >= 4 and row[1].isdigit()}

    def pids(self) -> dict[str, int]:
        """Process ids by role, from the table."""
        return {name: int(row[1]) for name, row in self._rows().items()}

    def address(self, role: str) -> str:
        """From the table."""
        return self._rows()[role][2]

    def metrics(self, role: str) -> str:
        """Host and port, from the table; "-": none."""
        return self._rows()[role][3]

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit status, and what it wrote on stderr."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        self.lines += out.splitlines()
        return self.process.returncode, err


@contextmanager
def serve_process(command: Sequence[str], env: Mapping[str, str]) -> Iterator[ServeProcess]:
    process = subprocess.Popen(
        list(command), env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield ServeProcess(process)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate(timeout=PATIENCE_S)
        wait_gone(child.pid for child in children)


def wait_gone(pids: Iterator[int] | Sequence[int]) -> None:
    """Wait until none of these processes exists. Raises: psutil.TimeoutExpired."""
    for pid in pids:
        try:
            psutil.Process(pid).wait(PATIENCE_S)
        except psutil.NoSuchProcess:
            continue
