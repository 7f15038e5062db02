"""What happened to each request: a bounded log that tells why something happened.

Every event a core handled and every command it gave about a request, with its time, its serial number,
and the serial of its cause. Records are kept as they are and written out only when asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from common.messages.base import Record
from common.units import RequestId

Story = Callable[[], list[str]]
"""Told only when asked: nobody formats a story that nobody reads."""

_Entry = tuple[float, str, Record | str, Sequence[Record]]
_SILENT = frozenset({"v", "epoch", "cause", "spec", "record", "life", "request_id"})


class StoryLog:
    def __init__(self, requests_max: int = 4_096, lines_max: int = 256) -> None:
        self._requests_max = requests_max
        self._lines_max = lines_max
        self._lines: OrderedDict[RequestId, list[_Entry]] = OrderedDict()

    def note(
        self, request_id: RequestId, now_s: float, cause: str, what: Record | str, came: Sequence[Record] = ()
    ) -> None:
        """`came`: what came of it, which may still grow; of that, what is about this request."""
        lines = self._lines.get(request_id)
        if lines is None:
            lines = self._lines[request_id] = []
            if len(self._lines) > self._requests_max:
                self._lines.popitem(last=False)
        elif len(lines) == self._lines_max:
            del lines[0]  # rare: a short has some ten entries, and a list is the cheapest to begin
        lines.append((now_s, cause, what, came))

    def tell(self, request_id: RequestId) -> list[str]:
        """Oldest first; empty if unknown or forgotten."""
        return [
            f"{now_s:.6f} {cause} {_line(each)}"
            for now_s, cause, what, came in self._lines.get(request_id, ())
            for each in (what, *_about(request_id, came))
        ]


def _about(request_id: RequestId, records: Sequence[Record]) -> Iterator[Record]:
    for record in records:
        if getattr(getattr(record, "spec", record), "request_id", None) == request_id:
            yield record


def _line(what: Record | str) -> str:
    if isinstance(what, str):
        return what
    fields = [f"{n}={getattr(what, n)!r}" for n in what.__struct_fields__ if n not in _SILENT]
    spec = getattr(what, "spec", None)
    if spec is not None:
        fields.insert(0, f"attempt={spec.attempt}")
    return f"{type(what).__name__} {' '.join(fields)}".rstrip()
