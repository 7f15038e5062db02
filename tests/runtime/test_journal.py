"""A journal replays to the same commands, or says where it differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.messages.prefill import DropRequest, KvReleased
from common.policy.core import TimePassed
from common.runtime.journal import JournalEntry, JournalError, JournalWriter, ReplayDiffers, read_journal, replay
from common.units import RequestId, WorkerId
from tests.runtime.records import all_messages, sample


class Counting:
    """Orders a drop with a growing attempt at each release; `bias` makes it answer otherwise from the third on."""

    def __init__(self, bias: int = 0) -> None:
        self.released = 0
        self.bias = bias

    def handle(self, event: KvReleased | TimePassed, now_s: float) -> list[DropRequest]:
        if isinstance(event, TimePassed):
            return []
        self.released += 1
        attempt = self.released + (self.bias if self.released > 2 else 0)
        return [DropRequest(worker_id=event.worker_id, request_id=event.request_id, attempt=attempt)]

    def next_deadline_s(self) -> float | None:
        return None

    def check(self) -> None:
        return


def record(path: Path, events: int = 5, **options: int) -> JournalWriter:
    core = Counting()
    with JournalWriter(path, **options) as journal:
        for i in range(events):
            event = KvReleased(worker_id=WorkerId("w-1"), request_id=RequestId(f"r-{i}"), attempt=0)
            now_s = 0.1 * i
            journal.append(now_s, event, core.handle(event, now_s))
            journal.append(now_s, TimePassed(), core.handle(TimePassed(), now_s))
    return journal


def test_the_same_core_replays_to_the_same_commands(tmp_path: Path) -> None:
    record(tmp_path / "journal")
    entries = list(read_journal(tmp_path / "journal", [KvReleased]))
    assert [entry.now_s for entry in entries[::2]] == [0.1 * i for i in range(5)]
    assert entries[0].event == KvReleased(worker_id=WorkerId("w-1"), request_id=RequestId("r-0"), attempt=0)
    assert entries[1] == JournalEntry(0.0, TimePassed(), ())
    assert replay(Counting(), entries) == 10


def test_a_core_that_answers_otherwise_is_caught_at_the_first_difference(tmp_path: Path) -> None:
    record(tmp_path / "journal")
    with pytest.raises(ReplayDiffers, match=r"event 5 at 0\.2.*r-2") as error:
        replay(Counting(bias=10), read_journal(tmp_path / "journal", [KvReleased]))
    assert "'attempt': 3" in str(error.value)
    assert "'attempt': 13" in str(error.value)


def test_a_core_that_says_less_or_more_differs(tmp_path: Path) -> None:
    record(tmp_path / "journal")
    first, *_ = read_journal(tmp_path / "journal", [KvReleased])
    with pytest.raises(ReplayDiffers):
        replay(Counting(), [JournalEntry(first.now_s, first.event, ())])
    with pytest.raises(ReplayDiffers):
        replay(Counting(), [JournalEntry(first.now_s, TimePassed(), first.commands)])


def test_every_message_can_be_an_event_and_a_command(tmp_path: Path) -> None:
    messages = [sample(cls, full=True) for cls in all_messages()]

    class Repeats:
        def handle(self, event: object, now_s: float) -> list[object]:
            return [event]

        def next_deadline_s(self) -> float | None:
            return None

        def check(self) -> None:
            return

    with JournalWriter(tmp_path / "journal") as journal:
        for message in messages:
            journal.append(1.0, message, [message])
    entries = list(read_journal(tmp_path / "journal", all_messages()))
    assert [entry.event for entry in entries] == messages
    assert replay(Repeats(), entries) == len(messages)


def test_an_entry_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    record(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    whole = len(list(read_journal(tmp_path / "whole", [KvReleased])))
    for cut in (1, 3, 20):
        (tmp_path / "cut").write_bytes(data[:-cut])
        assert len(list(read_journal(tmp_path / "cut", [KvReleased]))) in (whole - 1, whole - 2)


def test_recording_stops_at_the_size_limit_and_keeps_the_beginning(tmp_path: Path) -> None:
    journal = record(tmp_path / "journal", events=100, bytes_max=2_000)
    assert journal.truncated
    assert (tmp_path / "journal").stat().st_size <= 2_000
    entries = list(read_journal(tmp_path / "journal", [KvReleased]))
    assert len(entries) > 10
    assert entries[0].event.request_id == "r-0"
    assert replay(Counting(), entries) == len(entries)


def test_a_journal_is_never_overwritten(tmp_path: Path) -> None:
    record(tmp_path / "journal")
    with pytest.raises(FileExistsError):
        JournalWriter(tmp_path / "journal")


def test_other_files_and_unknown_events_are_named(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("not a journal")
    with pytest.raises(JournalError, match="not a journal"):
        list(read_journal(tmp_path / "other", []))
    record(tmp_path / "journal")
    with pytest.raises(JournalError, match="KvReleased"):
        list(read_journal(tmp_path / "journal", []))
