"""What a run leaves for people: spans of what every worker did, and a log of what the scheduler heard and said."""

from __future__ import annotations

from common.messages.base import Record
from loadtest.simulator.result import Span

_SILENT = frozenset({"v", "cause", "epoch", "spec", "record", "profile"})


class Recorder:
    """Appends; nothing is written out before it is asked for."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._lines: list[str] = []
        self._fields: dict[type[Record], tuple[str, ...]] = {}

    def span(self, lane: str, kind: str, begin_s: float, end_s: float, request_id: str) -> None:
        self.spans.append(Span(lane, kind, begin_s, end_s, request_id))

    def heard(self, now_s: float, event: Record) -> None:
        self._lines.append(f"{now_s:.9f} {self._told(event)}")

    def said(self, now_s: float, command: Record) -> None:
        self._lines.append(f"{now_s:.9f} → {self._told(command)}")

    def _told(self, record: Record) -> str:
        kind = type(record)
        fields = self._fields.get(kind)
        if fields is None:
            fields = self._fields[kind] = tuple(name for name in kind.__struct_fields__ if name not in _SILENT)
        words = [kind.__name__]
        for holder in ("spec", "record"):
            held = getattr(record, holder, None)
            if held is not None:
                words.append(getattr(held, "spec", held).request_id)
        profile = getattr(record, "profile", None)
        if profile is not None:
            words.append(profile.worker_id)
        words += [f"{name}={getattr(record, name)!r}" for name in fields]
        return " ".join(words)

    def event_log(self) -> bytes:
        """UTF-8, one line each."""
        return "".join(f"{line}\n" for line in self._lines).encode()
