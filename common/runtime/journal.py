"""What a core was told and what it answered, in a file that can be replayed.

The file: a magic line, then entries, each a 4-byte big-endian length and that many bytes of MessagePack
`[now_s, [event class, fields], [[command class, fields], …]]`. It must begin with the core's first event
to be of use, so at its size limit recording stops rather than forgetting the beginning.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import msgspec

from common.errors import PecSchedError
from common.logs import get_logger
from common.policy.core import Core, TimePassed

MAGIC = b"pecsched journal 1\n"
BYTES_MAX = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")

Plain = tuple[str, Any]
"""Class name and fields as builtins: what two records are compared by."""

log = get_logger(__name__)


class JournalError(PecSchedError):
    """Not a journal, or one with an event of a class that the reader was not told of."""


class ReplayDiffers(PecSchedError):
    """The core answered an event otherwise than recorded."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    now_s: float
    event: Any
    commands: tuple[Plain, ...]


class JournalWriter:
    """Appends to a new file; implements `shell.JournalSink`. A context manager, or `close()`."""

    def __init__(self, path: Path, *, bytes_max: int = BYTES_MAX) -> None:
        """Raises: OSError, also if the file exists: a journal belongs to one run of one core."""
        self._file = path.open("xb", buffering=0)  # one write per entry: a killed process loses none
        self._left = bytes_max - len(MAGIC)
        self._file.write(MAGIC)
        self.truncated = False
        """The size limit was reached; later entries are not recorded."""

    def append(self, now_s: float, event: object, commands: Sequence[object]) -> None:
        """Record one call of `handle`."""
        if self.truncated:
            return
        body: bytes = msgpack.packb([now_s, plain(event), [plain(command) for command in commands]])
        self._left -= _LENGTH.size + len(body)
        if self._left < 0:
            self.truncated = True
            log.warning("the journal is full; recording stops", path=self._file.name)
            return
        self._file.write(_LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path, event_types: Iterable[type[Any]]) -> Iterator[JournalEntry]:
    """Every whole entry, in order; one that was cut off at the end (a killed process) is left out.

    `event_types`: the classes the core takes (`TimePassed` is known). Raises: JournalError, OSError.
    """
    known: dict[str, type[Any]] = {TimePassed.__name__: TimePassed}
    known.update((event_type.__name__, event_type) for event_type in event_types)
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise JournalError(f"{path} is not a journal of this version")
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            body = file.read(length)
            if len(body) < length:
                return
            now_s, (name, fields), commands = msgpack.unpackb(body)
            if name not in known:
                raise JournalError(f"{path} has an event of class {name}, which this reader does not know")
            event = msgspec.convert(fields, known[name])
            yield JournalEntry(now_s, event, tuple((command, values) for command, values in commands))


def replay(core: Core[Any, Any], entries: Iterable[JournalEntry]) -> int:
    """Hand every event to a fresh core and compare its commands. Returns how many events were replayed.

    Raises: ReplayDiffers at the first difference, and whatever the core raises.
    """
    count = 0
    for count, entry in enumerate(entries, start=1):
        answered = tuple(_comparable(command) for command in core.handle(entry.event, entry.now_s))
        if answered != entry.commands:
            raise ReplayDiffers(
                f"event {count} at {entry.now_s}: {entry.event!r}\n"
                f"  recorded: {entry.commands!r}\n  answered: {answered!r}"
            )
    return count


def plain(record: object) -> Plain:
    """Class name and fields of a record, as builtins."""
    return type(record).__name__, msgspec.to_builtins(record, builtin_types=(bytes,))


def _comparable(record: object) -> Plain:
    # Through bytes, as the recorded one went: tuples are lists there.
    name, fields = msgpack.unpackb(msgpack.packb(plain(record)))
    return name, fields
