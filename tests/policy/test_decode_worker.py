"""The decode worker's rules: golden scenarios, and any interleaving of orders, transfers, steps and time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished
from common.messages.prefill import DropRequest, KvReleased
from common.messages.requests import RequestSpec, TokensGenerated
from common.policy.core import InvariantViolated, TimePassed
from common.policy.decode_events import (
    AcceptOffer,
    ActivateRow,
    DecodeCommand,
    DecodedToken,
    DecodeEvent,
    ForgetDecodeKv,
    KvArrived,
    KvBroken,
    KvOffered,
    KvReserved,
    PlaceDecodeKv,
    RefuseOffer,
    ReleaseKv,
    ReserveFailed,
    ReserveKv,
    RunStep,
    StepFailed,
    StepFinished,
    StopReceiving,
    StopRequested,
)
from common.policy.decode_pace import HOLD_S, WAITED_SHARE
from common.policy.decode_rows import RowPhase
from common.policy.decode_worker import DecodeWorkerCore
from tests.policy.decode_scenario import CONFIG, expect, replay, spec

SCENARIOS = sorted((Path(__file__).parent / "golden_decode").glob("*.txt"))
STOP_TOKEN = 99


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.stem)
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    answered = replay(text)
    if request.config.getoption("--golden-write"):
        path.write_text(answered, encoding="utf-8")
        return
    assert answered == text, f"{path.name} differs; review `pytest --golden-write` and its diff"


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10


def _active(core: DecodeWorkerCore, wanted: RequestSpec) -> None:
    """Bring one request into the batch."""
    name, attempt = wanted.request_id, wanted.attempt
    core.handle(expect(wanted), 0.0)
    core.handle(KvReserved(request_id=name, attempt=attempt), 0.0)
    core.handle(KvOffered(request_id=name, attempt=attempt, tokens=wanted.prompt.tokens), 0.0)
    arrived = KvArrived(
        request_id=name, attempt=attempt, first_token=1, first_layer_received_s=0, last_layer_received_s=0
    )
    core.handle(arrived, 0.0)


def test_an_answer_to_another_step_is_not_taken() -> None:
    core = DecodeWorkerCore(CONFIG)
    _active(core, spec("a", 10))
    with pytest.raises(InvariantViolated, match="not the answer"):
        core.handle(StepFinished(sampled=(DecodedToken(request_id="b", token_id=1),)), 1.0)


def test_an_illegal_move_raises_with_the_story_and_changes_nothing() -> None:
    core = DecodeWorkerCore(CONFIG)
    _active(core, spec("a", 10))
    with pytest.raises(InvariantViolated, match=r"answers nothing; story:\n(.|\n)*ExpectKv"):
        core.handle(KvReserved(request_id="a", attempt=0), 1.0)
    assert core.rows["a"].phase is RowPhase.ACTIVE


def test_the_next_step_begins_before_tokens_are_sent() -> None:
    core = DecodeWorkerCore(CONFIG)
    _active(core, spec("a", 10))
    commands = core.handle(StepFinished(sampled=(DecodedToken(request_id="a", token_id=1),)), 1.0)
    assert [type(command) for command in commands] == [RunStep, TokensGenerated]


def test_holdings_name_everything_and_what_waits_behind_it() -> None:
    core = DecodeWorkerCore(CONFIG)
    _active(core, spec("a", 10))
    core.handle(expect(spec("b", 20)), 0.0)
    core.handle(expect(spec("a", 11, attempt=1)), 0.0)
    held = {(h.request_id, h.attempt): (h.phase, h.kv_tokens) for h in core.holdings()}
    assert held == {("a", 0): ("decode", 14), ("a", 1): ("expected", 0), ("b", 0): ("expected", 24)}


class _World:
    """An engine, a transfer and a scheduler that keep their own books and believe nothing."""

    def __init__(self) -> None:
        self.core = DecodeWorkerCore(CONFIG)
        self.now_s = 0.0
        self.specs: dict[tuple[str, int], RequestSpec] = {}
        self.asked: list[RequestSpec] = []
        """Reservations that the engine has not answered."""
        self.reserved: dict[str, RequestSpec] = {}
        self.reservations: Counter[tuple[str, int]] = Counter()
        self.offers: set[tuple[str, int]] = set()
        self.streams: set[tuple[str, int]] = set()
        self.active: set[str] = set()
        self.step: tuple[str, ...] = ()
        self.step_begun_s = self.waited_s = float("-inf")
        self.tokens: dict[tuple[str, int], int] = {}
        """Next output index, of requests in the batch."""
        self.finished: set[tuple[str, int]] = set()
        self.released: Counter[tuple[str, int]] = Counter()
        self.unanswered: set[tuple[str, int]] = set()
        """Expected or dropped, and nothing heard of yet."""
        self.dropped: set[tuple[str, int]] = set()
        self.places: set[str] = set()

    def tell(self, event: DecodeEvent) -> list[DecodeCommand]:
        commands = self.core.handle(event, self.now_s)
        for command in commands:
            self._perform(command)
        self.core.check()
        return commands

    def _perform(self, command: DecodeCommand) -> None:
        match command:
            case ReserveKv(spec=wanted):
                assert wanted.request_id not in self.reserved
                assert all(asked.request_id != wanted.request_id for asked in self.asked)
                self.asked.append(wanted)
                self.dropped.discard((wanted.request_id, wanted.attempt))
            case AcceptOffer(request_id=name, attempt=attempt):
                self.offers.remove((name, attempt))
                assert self.reserved[name].attempt == attempt
                self.streams.add((name, attempt))
            case RefuseOffer(request_id=name, attempt=attempt):
                self.offers.discard((name, attempt))
            case StopReceiving(request_id=name, attempt=attempt):
                assert (name, attempt) in self.streams
            case ActivateRow(request_id=name):
                wanted = self.reserved[name]
                assert (name, wanted.attempt) not in self.streams
                self.active.add(name)
                self.tokens[name, wanted.attempt] = wanted.generated_before + 1
            case RunStep(request_ids=names):
                assert not self.step
                assert names
                assert set(names) <= self.active
                crowded = self.now_s < self.waited_s + HOLD_S
                assert not crowded or self.now_s >= self.step_begun_s + CONFIG.crowded_itl_s
                self.step, self.step_begun_s = names, self.now_s
            case ReleaseKv(request_id=name, attempt=attempt):
                assert self.reserved.pop(name).attempt == attempt
                assert name not in self.step
                assert (name, attempt) not in self.streams
                self.active.discard(name)
            case PlaceDecodeKv(location=place):
                self.places.add(place.request_id)
            case ForgetDecodeKv(request_id=name):
                self.places.discard(name)
            case TokensGenerated(router_id=router, chunks=chunks):
                self._take_tokens(router, chunks)
            case DecodeFinished(request_id=name, attempt=attempt, generated=generated):
                assert generated == self.tokens[name, attempt] - self.specs[name, attempt].generated_before
                assert (name, attempt) in self.finished or generated == 1
                self._take_release(name, attempt, command.kv_tokens)
            case DecodeBusy(request_id=name, attempt=attempt):
                self.unanswered.discard((name, attempt))
            case DecodeFailed(request_id=name, attempt=attempt):
                assert (name, attempt) not in self.finished
            case KvReleased(request_id=name, attempt=attempt, kv_tokens=kv_tokens):
                self._take_release(name, attempt, kv_tokens)

    def _take_release(self, name: str, attempt: int, kv_tokens: int) -> None:
        self.unanswered.discard((name, attempt))
        if kv_tokens:
            assert kv_tokens == self.specs[name, attempt].kv_tokens
            assert name not in self.reserved or self.reserved[name].attempt != attempt
            self.released[name, attempt] += 1
            self.tokens.pop((name, attempt), None)
            self.finished.discard((name, attempt))

    def _take_tokens(self, router: str, chunks) -> None:
        for chunk in chunks:
            key = (chunk.request_id, chunk.attempt)
            assert self.specs[key].router_id == router
            assert key not in self.finished, "a token after the last one"
            assert key not in self.dropped, "a token after the cancel"
            assert chunk.index == self.tokens[key], "a gap"
            self.tokens[key] += len(chunk.token_ids)
            generated = self.tokens[key] - self.specs[key].generated_before
            expected = "length" if generated == self.specs[key].max_tokens else None
            assert chunk.finish_reason == ("stop" if STOP_TOKEN in chunk.token_ids else expected)
            if chunk.finish_reason is not None:
                self.finished.add(key)

    def answer_reservation(self, fits: bool) -> None:
        wanted = self.asked.pop(0)
        key = (wanted.request_id, wanted.attempt)
        if fits:
            self.reserved[wanted.request_id] = wanted
            self.reservations[key] += 1
            self.tell(KvReserved(request_id=key[0], attempt=key[1]))
        else:
            self.tell(ReserveFailed(request_id=key[0], attempt=key[1], reason="no"))

    def end_stream(self, key: tuple[str, int], whole: bool) -> None:
        self.streams.remove(key)
        if whole:
            self.tell(
                KvArrived(
                    request_id=key[0],
                    attempt=key[1],
                    first_token=1,
                    first_layer_received_s=0,
                    last_layer_received_s=0,
                )
            )
        else:
            self.tell(KvBroken(request_id=key[0], attempt=key[1], reason="lost"))

    def end_step(self, tokens: list[int] | None, core_wait_s: float = 0.0) -> None:
        names, self.step = self.step, ()
        if tokens is None:
            self.tell(StepFailed(reason="cosmic ray"))
            return
        pairs = zip(names, tokens, strict=True)
        sampled = tuple(DecodedToken(request_id=n, token_id=t) for n, t in pairs)
        if core_wait_s > WAITED_SHARE * (self.now_s - self.step_begun_s):
            self.waited_s = self.now_s
        self.tell(StepFinished(sampled=sampled, core_wait_s=core_wait_s))

    def settle(self) -> None:
        """Let every effect end and every bound pass."""
        for _ in range(200):
            if self.asked:
                self.answer_reservation(True)
            elif self.streams:
                self.end_stream(min(self.streams), True)
            elif self.step:
                self.end_step([1] * len(self.step))
            elif (deadline_s := self.core.next_deadline_s()) is not None:
                self.now_s = max(self.now_s, deadline_s)
                self.tell(TimePassed())
            else:
                return
        raise AssertionError("it never comes to rest")


NAMES = st.sampled_from(["a", "b", "c", "d"])


class DecodeWorkerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = _World()
        self.latest: Counter[str] = Counter()
        """Highest attempt of each name so far."""

    def _spec(self, name: str, attempt: int, tokens: int, new: int) -> RequestSpec:
        """One attempt is one specification, however often it is ordered."""
        self.latest[name] = max(self.latest[name], attempt)
        wanted = spec(
            name,
            tokens,
            max_tokens=new,
            attempt=attempt,
            router="r1" if name < "c" else "r2",
            stop_token_ids=(STOP_TOKEN,),
            generated_before=attempt * 10,
        )
        return self.world.specs.setdefault((name, attempt), wanted)

    @rule(
        name=NAMES,
        later=st.sampled_from([-1, 0, 0, 1, 1]),
        tokens=st.sampled_from([1, 100, 400]),
        new=st.integers(1, 9),
    )
    def expect(self, name: str, later: int, tokens: int, new: int) -> None:
        attempt = max(0, self.latest[name] + later)
        self.world.tell(expect(self._spec(name, attempt, tokens, new)))
        row = self.world.core.rows.get(name)
        if row is not None and (row.attempt == attempt or (row.successor and row.successor.spec.attempt == attempt)):
            self.world.unanswered.add((name, attempt))

    @rule(name=NAMES, tokens=st.sampled_from([10, 100]), new=st.integers(2, 9), whole=st.booleans())
    def hand_over(self, name: str, tokens: int, new: int, whole: bool) -> None:
        """All that brings a new request into the batch, or to its transfer, at once."""
        world, attempt = self.world, self.latest[name] + 1
        if world.asked or name in world.core.rows:
            return
        world.unanswered.add((name, attempt))
        world.tell(expect(self._spec(name, attempt, tokens, new)))
        if not world.asked:
            return
        world.answer_reservation(True)
        if (name, attempt) not in world.streams:
            world.offers.add((name, attempt))
            world.tell(KvOffered(request_id=name, attempt=attempt, tokens=tokens))
        if whole:
            world.end_stream((name, attempt), True)

    @precondition(lambda self: self.world.core.rows)
    @rule(data=st.data(), later=st.sampled_from([0, 0, 0, 1, -1]))
    def drop_held(self, data: st.DataObject, later: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.core.rows)))
        self._drop(name, max(0, self.world.core.rows[name].attempt + later))

    @rule(name=NAMES, later=st.sampled_from([0, 1]))
    def drop_any(self, name: str, later: int) -> None:
        if name not in self.world.core.rows:
            self._drop(name, self.latest[name] + later)

    def _drop(self, name: str, attempt: int) -> None:
        self.world.unanswered.add((name, attempt))
        row = self.world.core.rows.get(name)
        if row is not None and row.attempt <= attempt:
            self.world.dropped.add((name, row.attempt))
        self.world.tell(DropRequest(worker_id="d1", request_id=name, attempt=attempt, epoch=1))

    @rule(name=NAMES, later=st.sampled_from([-1, 0, 0, 0, 0, 1]), wrong=st.sampled_from([False] * 5 + [True]))
    def offer(self, name: str, later: int, wrong: bool) -> None:
        key = (name, max(0, self.latest[name] + later))
        if key in self.world.offers or key in self.world.streams:
            return  # the door refuses a second stream of the same by itself, or the core does
        known = self.world.specs.get(key)
        tokens = known.prompt.tokens if known and not wrong else 7
        self.world.offers.add(key)
        self.world.tell(KvOffered(request_id=key[0], attempt=key[1], tokens=tokens))

    @precondition(lambda self: self.world.offers)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.offers)))
        self.world.offers.remove(key)
        self.world.tell(KvBroken(request_id=key[0], attempt=key[1], reason="gone"))

    @precondition(lambda self: self.world.asked)
    @rule(fits=st.sampled_from([True, True, True, False]))
    def engine_answers(self, fits: bool) -> None:
        self.world.answer_reservation(fits)

    @precondition(lambda self: self.world.streams)
    @rule(data=st.data(), whole=st.sampled_from([True, True, False]))
    def stream_ends(self, data: st.DataObject, whole: bool) -> None:
        self.world.end_stream(data.draw(st.sampled_from(sorted(self.world.streams))), whole)

    @precondition(lambda self: self.world.step)
    @rule(data=st.data(), core_wait_s=st.sampled_from([0.0, 0.0, 0.02]))
    def step_ends(self, data: st.DataObject, core_wait_s: float) -> None:
        token = st.sampled_from([1, 2, 3, STOP_TOKEN])
        rows = len(self.world.step)
        self.world.end_step(data.draw(st.lists(token, min_size=rows, max_size=rows)), core_wait_s)

    @precondition(lambda self: self.world.step)
    @rule()
    def step_fails(self) -> None:
        self.world.end_step(None)

    @rule(seconds=st.sampled_from([0.1, 0.1, 0.1, 2.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now_s += seconds
        deadline_s = self.world.core.next_deadline_s()
        if deadline_s is not None and deadline_s <= self.world.now_s:
            self.world.tell(TimePassed())

    @precondition(lambda self: not self.world.core.stopping)
    @rule(really=st.sampled_from([False] * 29 + [True]))
    def stop(self, really: bool) -> None:
        if really:
            self.world.tell(StopRequested())

    @invariant()
    def books_agree(self) -> None:
        world = self.world
        held = {name: row.attempt for name, row in world.core.rows.items()}
        mine = {wanted.request_id: wanted.attempt for wanted in [*world.asked, *world.reserved.values()]}
        assert held == mine
        assert {(h.request_id, h.attempt) for h in world.core.holdings()} >= set(mine.items())
        assert not world.core.rows or world.asked or world.streams or world.step or world.core.next_deadline_s()

    def teardown(self) -> None:
        world = self.world
        world.settle()
        assert world.core.idle
        assert not world.reserved
        assert not world.offers
        assert not world.places
        assert world.released == world.reservations, "each reservation is released exactly once"
        assert not world.unanswered, "each order is answered"


def test_any_interleaving(request: pytest.FixtureRequest) -> None:
    nightly = request.config.getoption("--nightly")
    run_state_machine_as_test(
        DecodeWorkerMachine,
        settings=settings(
            max_examples=10_000 if nightly else 150,
            stateful_step_count=60,
            deadline=None,
            derandomize=not nightly,
            suppress_health_check=list(HealthCheck),
            print_blob="pytest" in sys.modules,
        ),
    )


def test_an_offer_withdrawn_while_its_row_closes_frees_nothing_that_the_engine_is_about_to_reserve():
    core = DecodeWorkerCore(CONFIG)
    core.handle(KvOffered(request_id="a", attempt=0, tokens=7), 0.0)
    core.handle(expect(spec("a", 7)), 0.0)
    core.handle(expect(spec("a", 8, attempt=1)), 0.0)
    withdrawn = core.handle(KvBroken(request_id="a", attempt=0, reason="gone"), 0.0)
    assert not [m for m in withdrawn if isinstance(m, KvReleased)]
    answered = core.handle(KvReserved(request_id="a", attempt=0), 0.0)
    assert [m.attempt for m in answered if isinstance(m, KvReleased)] == [0]
