"""The decode worker: reservations, arriving KV, and one batch that everyone joins at the next step.

    ExpectKv ▶ reserving ▶ expected ─offer▶ receiving ─verified▶ active ─last token▶ released
                   └───────────────────────────┴──────────────────┴─dropped, lapsed▶ closing ▶ released

Rules:

- KV is reserved whole (prompt and all new tokens) or the request is refused as busy; so no row ever runs out.
- Memory is never freed under somebody who writes to it: a row that ends while the engine reserves, the
  transfer receives or a step computes is *closing* until that effect has ended.
- KV can be offered before the order that announces it, which comes another way: the offer waits, within a bound.
- The prefill worker sent the first token to the router; the first chunk from here has the output index after it.
- On cores that others use too, steps keep a distance (`decode_pace.py`).
- Every request that was reserved ends with exactly one `DecodeFinished` or `KvReleased`, its last message; one that
  found no room ends with `DecodeBusy`. `DecodeFinished.generated` counts the first token too.
- Orders of an older term than the newest seen are ignored (term 0: from someone who has none), orders for an
  older attempt too; one for a later attempt first drops what is held, and is taken up when that has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import assert_never

from common.messages.cluster import Holding, HoldingPhase
from common.messages.decode import DecodeBusy, DecodeFailed, DecodeFinished, ExpectKv
from common.messages.locations import KvLocation, KvState
from common.messages.prefill import DropRequest, KvReleased
from common.messages.requests import FinishReason, RequestSpec, TokenChunk, TokensGenerated
from common.policy.core import InvariantViolated, TimePassed
from common.policy.decode_events import (
    AcceptOffer,
    ActivateRow,
    DecodeCommand,
    DecodedToken,
    DecodeEvent,
    DecodeOrder,
    DecodeWorkerConfig,
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
from common.policy.decode_pace import Pace
from common.policy.decode_rows import TRANSITIONS, Row, RowPhase, finish_reason
from common.policy.story import OF_A_WORKER, StoryLog
from common.policy.transitions import require_legal
from common.policy.words import About
from common.units import Attempt, RequestId, RouterId

OFFERS_MAX = 1_024
"""Offers that wait for their order."""
ENDED_MAX = 4_096
"""Ended requests remembered, so that their late KV is refused at once."""


class DecodeWorkerCore:
    """Implements `common.policy.core.Core`."""

    def __init__(self, config: DecodeWorkerConfig) -> None:
        self.config = config
        self.epoch = 0
        """Highest term of a scheduler seen."""
        self.rows: dict[RequestId, Row] = {}
        self.stopping = False
        self.story_log = StoryLog(OF_A_WORKER)
        self._offers: dict[tuple[RequestId, Attempt], float] = {}
        self._ended: OrderedDict[RequestId, Attempt] = OrderedDict()
        self._running: tuple[RequestId, ...] = ()
        """Rows of the step that runs; empty: none."""
        self._pace = Pace(config.crowded_itl_s)
        self._step_due_s: float | None = None
        """None: no step waits for its time."""
        self._now_s = 0.0
        self._events = 0
        self._cause = ""
        self._effects: list[DecodeCommand] = []
        self._tokens: dict[RouterId, list[TokenChunk]] = {}
        self._rest: list[DecodeCommand] = []

    def __repr__(self) -> str:
        return f"DecodeWorkerCore({self.config.worker_id!r}, rows={len(self.rows)}, in_step={len(self._running)})"

    # --- the door ---

    def handle(self, event: DecodeEvent, now_s: float) -> list[DecodeCommand]:
        self._now_s = now_s
        self._events += 1
        self._cause = f"{self.config.worker_id}#{self._events}"
        match event:
            case ExpectKv() | DropRequest():
                self._obey(event)
            case KvReserved() | ReserveFailed():
                self._reservation_answered(event)
            case KvOffered():
                self._offered(event)
            case KvArrived():
                self._arrived(event)
            case KvBroken():
                self._broken(event)
            case StepFinished():
                self._step_finished(event)
            case StepFailed():
                self._step_failed(event)
            case StopRequested():
                self.stopping = True
            case TimePassed():
                self._lapse()
            case _:
                assert_never(event)
        return self._take_commands()

    def next_deadline_s(self) -> float | None:
        deadlines = [row.deadline_s for row in self.rows.values() if row.deadline_s is not None]
        if self._step_due_s is not None:
            deadlines.append(self._step_due_s)
        return min([*deadlines, *self._offers.values()], default=None)

    @property
    def idle(self) -> bool:
        """Nothing is held."""
        return not self.rows

    @property
    def reserved_tokens(self) -> int:
        """KV of all rows."""
        return sum(row.spec.kv_tokens for row in self.rows.values())

    def holdings(self) -> tuple[Holding, ...]:
        """All requests in hand, for heartbeats."""
        held: list[Holding] = []
        for name, row in self.rows.items():
            phase: HoldingPhase = "decode" if row.generated else "expected"
            held.append(Holding(request_id=name, attempt=row.attempt, phase=phase, kv_tokens=row.spec.kv_tokens))
            if (next_up := row.successor) is not None:
                held.append(Holding(request_id=name, attempt=next_up.spec.attempt, phase="expected", kv_tokens=0))
        return tuple(held)

    def receives(self, request_id: RequestId, attempt: Attempt) -> bool:
        """Whether a transfer may still write to this request's KV."""
        row = self.rows.get(request_id)
        return row is not None and row.attempt == attempt and row.phase is RowPhase.RECEIVING

    def story(self, request_id: RequestId) -> list[str]:
        """What happened to a request, oldest first, from a bounded log."""
        return self.story_log.tell(request_id)

    # --- orders ---

    def _obey(self, order: DecodeOrder) -> None:
        request_id = order.spec.request_id if isinstance(order, ExpectKv) else order.request_id
        self._note(request_id, order)
        if order.worker_id != self.config.worker_id or 0 < order.epoch < self.epoch:
            self._note(request_id, f"ignored: for {order.worker_id}, of term {order.epoch}; here {self.epoch}")
            return
        self.epoch = max(self.epoch, order.epoch)
        match order:
            case ExpectKv():
                self._expect(order)
            case DropRequest():
                self._drop(order)
            case _:
                assert_never(order)

    def _expect(self, order: ExpectKv) -> None:
        spec = order.spec
        row = self.rows.get(spec.request_id)
        if row is None:
            if spec.attempt >= self._ended.get(spec.request_id, 0):
                self._admit(spec)
            return
        repeated = spec.attempt == row.attempt and row.phase is not RowPhase.CLOSING
        superseded = row.successor is not None and spec.attempt <= row.successor.spec.attempt
        if repeated or superseded or spec.attempt < row.attempt:
            return
        if row.successor is not None:
            self._tell_released(row.request_id, row.successor.spec.attempt, 0)
        row.successor = order
        self._close(row, None)

    def _admit(self, spec: RequestSpec) -> None:
        full = (
            len(self.rows) >= self.config.rows_max
            or self.reserved_tokens + spec.kv_tokens > self.config.kv_capacity_tokens
        )
        if full or self.stopping:
            self._busy(spec)
            return
        self._ended.pop(spec.request_id, None)
        self.rows[spec.request_id] = Row(spec)
        self._effects.append(ReserveKv(spec=spec))

    def _busy(self, spec: RequestSpec) -> None:
        self._remember_ended(spec.request_id, spec.attempt)
        self._refuse_offers(spec.request_id, spec.attempt, "no room for it here")
        self._rest.append(DecodeBusy(**self._about(spec.request_id, spec.attempt)))

    def _drop(self, order: DropRequest) -> None:
        self._refuse_offers(order.request_id, order.attempt, "dropped")
        row = self.rows.get(order.request_id)
        if row is None or row.attempt > order.attempt:
            if row is None:
                self._remember_ended(order.request_id, order.attempt)
            self._tell_released(order.request_id, order.attempt, 0)
            return
        if row.successor is not None and row.successor.spec.attempt <= order.attempt:
            row.asked.add(row.successor.spec.attempt)
            row.successor = None
        row.asked.add(order.attempt)
        self._close(row, None)

    # --- KV comes ---

    def _reservation_answered(self, event: KvReserved | ReserveFailed) -> None:
        row = self._row(event.request_id, event.attempt)
        if row is None or not row.awaits_end_of(RowPhase.RESERVING):
            raise InvariantViolated.told(f"{event!r} answers nothing", self.story(event.request_id))
        self._note(row.request_id, event)
        if row.phase is RowPhase.CLOSING:
            self._free(row, reserved=isinstance(event, KvReserved))
        elif isinstance(event, ReserveFailed):
            del self.rows[row.request_id]
            self._busy(row.spec)
        else:
            self._move(row, RowPhase.EXPECTED)
            row.deadline_s = self._now_s + self.config.expect_s
            self._place(row, "receiving", 0)
            if self._offers.pop((row.request_id, row.attempt), None) is not None:
                self._accept(row)

    def _offered(self, event: KvOffered) -> None:
        self._note(event.request_id, event)
        row = self.rows.get(event.request_id)
        same = row is not None and row.attempt == event.attempt
        if row is not None and same and event.tokens != row.spec.prompt.tokens:
            self._refuse(event.request_id, event.attempt, f"{event.tokens} tokens of {row.spec.prompt.tokens}")
        elif row is not None and same and row.phase is RowPhase.EXPECTED:
            self._accept(row)
        elif row is not None and (row.attempt > event.attempt or (same and row.phase is not RowPhase.RESERVING)):
            self._refuse(event.request_id, event.attempt, f"attempt {row.attempt} is {row.phase.value} here")
        elif row is None and event.attempt <= self._ended.get(event.request_id, -1):
            self._refuse(event.request_id, event.attempt, "it has ended here")
        elif len(self._offers) >= OFFERS_MAX:
            self._refuse(event.request_id, event.attempt, "too many offers wait")
        else:
            self._offers[event.request_id, event.attempt] = self._now_s + self.config.early_s

    def _accept(self, row: Row) -> None:
        self._move(row, RowPhase.RECEIVING)
        row.deadline_s = self._now_s + self.config.expect_s
        self._effects.append(AcceptOffer(request_id=row.request_id, attempt=row.attempt))

    def _refuse(self, request_id: RequestId, attempt: Attempt, reason: str) -> None:
        self._note(request_id, f"refused attempt {attempt}: {reason}")
        self._effects.append(RefuseOffer(request_id=request_id, attempt=attempt, reason=reason))

    def _refuse_offers(self, request_id: RequestId, attempt_max: Attempt, reason: str) -> None:
        for key in [key for key in self._offers if key[0] == request_id and key[1] <= attempt_max]:
            del self._offers[key]
            self._refuse(*key, reason)

    def _arrived(self, event: KvArrived) -> None:
        row = self._row(event.request_id, event.attempt)
        if row is None or not row.awaits_end_of(RowPhase.RECEIVING):
            self._note(event.request_id, "KV arrived that nobody waits for")
            return
        self._note(row.request_id, event)
        if row.phase is RowPhase.CLOSING:
            self._free(row)
            return
        self._move(row, RowPhase.ACTIVE)
        row.deadline_s = None
        row.generated = 1
        router_id = row.spec.router_id
        self._effects.append(ActivateRow(request_id=row.request_id, router_id=router_id, first_token=event.first_token))
        row.received_s = event.first_layer_received_s, event.last_layer_received_s
        self._place(row, "decoding", row.spec.prompt.tokens)
        reason = finish_reason(row, event.first_token)
        if reason is not None:  # the prefill worker hands such a request over to nobody; be whole all the same
            row.finished = reason
            self._free(row)

    def _broken(self, event: KvBroken) -> None:
        self._offers.pop((event.request_id, event.attempt), None)
        row = self._row(event.request_id, event.attempt)
        if row is None or not row.awaits_end_of(RowPhase.RECEIVING):
            return
        self._note(row.request_id, event)
        if row.phase is RowPhase.RECEIVING:
            row.failure = f"its KV did not arrive: {event.reason}"
        self._free(row)

    # --- the batch ---

    def _step_finished(self, event: StepFinished) -> None:
        if tuple(sampled.request_id for sampled in event.sampled) != self._running:
            raise InvariantViolated(f"{event!r} is not the answer to a step of {self._running}")
        self._running = ()
        self._pace.step_ended(event.core_wait_s, self._now_s)
        for sampled in event.sampled:
            row = self.rows[sampled.request_id]
            row.in_step = False
            if row.phase is RowPhase.CLOSING:
                self._free(row)
                continue
            row.finished = self._token(row, sampled)
            if row.finished is not None:
                self._free(row)

    def _token(self, row: Row, sampled: DecodedToken) -> FinishReason | None:
        index = row.spec.generated_before + row.generated
        row.generated += 1
        reason = finish_reason(row, sampled.token_id)
        chunk = TokenChunk(
            request_id=row.request_id,
            attempt=row.attempt,
            index=index,
            token_ids=(sampled.token_id,),
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            finish_reason=reason,
        )
        self._tokens.setdefault(row.spec.router_id, []).append(chunk)
        return reason

    def _step_failed(self, event: StepFailed) -> None:
        running, self._running = self._running, ()
        for request_id in running:
            row = self.rows[request_id]
            row.in_step = False
            if row.phase is RowPhase.ACTIVE:
                row.failure = f"the engine failed: {event.reason}"
            self._free(row)

    def _start_step(self) -> None:
        if self._running:
            return
        self._step_due_s = None
        active = tuple(row.request_id for row in self.rows.values() if row.phase is RowPhase.ACTIVE)
        if not active:
            return
        due_s = self._pace.next_step_s(len(active), self._now_s)
        if due_s > self._now_s:
            self._step_due_s = due_s
            return
        self._running = active
        for request_id in active:
            self.rows[request_id].in_step = True
        self._pace.step_began(self._now_s)
        self._effects.append(RunStep(request_ids=active))

    # --- the end ---

    def _lapse(self) -> None:
        for key in [key for key, due_s in self._offers.items() if due_s <= self._now_s]:
            del self._offers[key]
            self._refuse(*key, f"nobody announced it within {self.config.early_s} s")
        for row in list(self.rows.values()):
            if row.deadline_s is not None and row.deadline_s <= self._now_s:
                self._close(row, f"its KV did not arrive within {self.config.expect_s} s")

    def _close(self, row: Row, failure: str | None) -> None:
        """End a row in any phase; free it at once if nothing touches its KV."""
        if row.phase is RowPhase.CLOSING:
            return
        row.failure = failure
        row.deadline_s = None
        if row.phase is RowPhase.RECEIVING:
            self._effects.append(StopReceiving(request_id=row.request_id, attempt=row.attempt))
        if row.phase in (RowPhase.RESERVING, RowPhase.RECEIVING) or row.in_step:
            row.closing_from = row.phase
            self._move(row, RowPhase.CLOSING)
        else:
            self._free(row)

    def _free(self, row: Row, *, reserved: bool = True) -> None:
        """Off the books; the scheduler hears of it last."""
        del self.rows[row.request_id]
        self._remember_ended(row.request_id, row.attempt)
        self._refuse_offers(row.request_id, row.attempt, "it has ended here")
        if reserved:
            self._effects.append(ReleaseKv(request_id=row.request_id, attempt=row.attempt))
            self._rest.append(ForgetDecodeKv(request_id=row.request_id))
        if row.failure is not None:
            self._rest.append(DecodeFailed(**self._about(row.request_id, row.attempt), reason=row.failure))
        freed = row.spec.kv_tokens if reserved else 0
        if row.finished is not None:
            self._tell_finished(row, row.finished, freed)
        else:
            self._tell_released(row.request_id, row.attempt, freed)
        for attempt in sorted(row.asked - {row.attempt}):
            self._tell_released(row.request_id, attempt, 0)
        if row.successor is not None:
            self._admit(row.successor.spec)

    def _tell_finished(self, row: Row, reason: FinishReason, freed: int) -> None:
        first_s, last_s = row.received_s
        self._rest.append(
            DecodeFinished(
                **self._about(row.request_id, row.attempt),
                finish_reason=reason,
                generated=row.generated,
                kv_tokens=freed,
                first_layer_received_s=first_s,
                last_layer_received_s=last_s,
            )
        )

    def _tell_released(self, request_id: RequestId, attempt: Attempt, kv_tokens: int) -> None:
        self._rest.append(KvReleased(**self._about(request_id, attempt), kv_tokens=kv_tokens))

    def _about(self, request_id: RequestId, attempt: Attempt) -> About:
        return About(worker_id=self.config.worker_id, request_id=request_id, attempt=attempt, cause=self._cause)

    # --- books ---

    def _row(self, request_id: RequestId, attempt: Attempt) -> Row | None:
        row = self.rows.get(request_id)
        return row if row is not None and row.attempt == attempt else None

    def _move(self, row: Row, target: RowPhase) -> None:
        who, story = f"{row.request_id}/{row.attempt}", partial(self.story, row.request_id)
        require_legal(TRANSITIONS, row.phase, target, who=who, story=story)
        row.phase = target

    def _remember_ended(self, request_id: RequestId, attempt: Attempt) -> None:
        self._ended[request_id] = max(attempt, self._ended.pop(request_id, 0))
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)

    def _place(self, row: Row, state: KvState, tokens: int) -> None:
        location = KvLocation(
            request_id=row.request_id,
            attempt=row.attempt,
            worker_id=self.config.worker_id,
            state=state,
            tokens=tokens,
            layers=self.config.layers if tokens else 0,
            reserved_tokens=row.spec.kv_tokens,
        )
        self._rest.append(PlaceDecodeKv(location=location))

    def _take_commands(self) -> list[DecodeCommand]:
        """First what the engine can begin with at once, then the tokens that clients wait for, then the rest."""
        self._start_step()
        tokens = [
            TokensGenerated(worker_id=self.config.worker_id, router_id=router, chunks=tuple(chunks), cause=self._cause)
            for router, chunks in self._tokens.items()
        ]
        for command in self._rest:
            if isinstance(command, DecodeFinished | DecodeBusy | DecodeFailed | KvReleased):
                self._note(command.request_id, command)
        commands = [*self._effects, *tokens, *self._rest]
        self._effects, self._tokens, self._rest = [], {}, []
        return commands

    def _note(self, request_id: RequestId, what: DecodeEvent | DecodeCommand | str) -> None:
        self.story_log.note(request_id, self._now_s, self._cause, what)

    # --- invariants ---

    def check(self) -> None:
        """Raises: InvariantViolated."""
        config = self.config
        _require(len(self.rows) <= config.rows_max, "more rows than it has")
        _require(self.reserved_tokens <= config.kv_capacity_tokens, "more KV than it has")
        _require(len(self._offers) <= OFFERS_MAX, "too many offers")
        in_step = tuple(row.request_id for row in self.rows.values() if row.in_step)
        _require(set(in_step) == set(self._running), f"step of {self._running}, rows in it {in_step}")
        for row in self.rows.values():
            self._check_row(row)

    def _check_row(self, row: Row) -> None:
        name, phase = f"{row.request_id}/{row.attempt} ({row.phase.value})", row.phase
        waits = phase in (RowPhase.EXPECTED, RowPhase.RECEIVING)
        _require(waits == (row.deadline_s is not None), f"{name}: deadline {row.deadline_s}")
        _require(not row.in_step or phase in (RowPhase.ACTIVE, RowPhase.CLOSING), f"{name}: in a step")
        # One that became active while a step runs, or before its time, joins the next.
        next_is_due = bool(self._running) or self._step_due_s is not None
        _require(phase is not RowPhase.ACTIVE or row.in_step or next_is_due, f"{name}: idle")
        _require(phase is not RowPhase.ACTIVE or 0 < row.generated < row.spec.max_tokens, f"{name}: {row.generated}")
        _require(row.generated == 0 or phase in (RowPhase.ACTIVE, RowPhase.CLOSING), f"{name}: {row.generated} tokens")
        _require(phase is not RowPhase.CLOSING or row.generated == 0 or row.in_step, f"{name}: closing for nothing")
        _require(row.successor is None or phase is RowPhase.CLOSING, f"{name}: has a successor")
        _require(phase is not RowPhase.EXPECTED or (row.request_id, row.attempt) not in self._offers, f"{name}: offer")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvariantViolated(what)
