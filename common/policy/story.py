"""What happened to each request: a bounded log that tells why something happened.

Every event a core handled and every command it gave about a request, with its time, its serial number,
and the serial of its cause. Records are kept as they are and written out only when asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from common.messages.base import Record
from common.units import RequestId

Story = Callable[[], list[str]]
"""Told only when asked: nobody formats a story that nobody reads."""

OF_A_WORKER = 512
"""Requests whose story a worker keeps: those that it has, and for a while what became of the last ones. The scheduler
keeps more, for people who ask."""

_SILENT = frozenset({"v", "epoch", "cause", "spec", "record", "request_id"})


class StoryLog:
    def __init__(self, requests_max: int = 4_096, lines_max: int = 256) -> None:
        self._requests_max = requests_max
        self._lines_max = lines_max
        self._lines: OrderedDict[RequestId, list[tuple[float, str, Record | str]]] = OrderedDict()

    def note(self, request_id: RequestId, now_s: float, cause: str, what: Record | str) -> None:
        lines = self._lines.get(request_id)
        if lines is None:
            lines = self._lines[request_id] = []
            if len(self._lines) > self._requests_max:
                self._lines.popitem(last=False)
        elif len(lines) == self._lines_max:
            del lines[0]  # rare: a short has some twenty lines, and a list is the cheapest to begin
        lines.append((now_s, cause, what))

    def tell(self, request_id: RequestId) -> list[str]:
        """Oldest first; empty if unknown or forgotten."""
        return [f"{now_s:.6f} {cause} {_line(what)}" for now_s, cause, what in self._lines.get(request_id, ())]


def _line(what: Record | str) -> str:
    if isinstance(what, str):
        return what
    fields = [f"{n}={getattr(what, n)!r}" for n in what.__struct_fields__ if n not in _SILENT]
    return f"{type(what).__name__} {' '.join(fields)}".rstrip()
