"""The router as a participant of the cluster: submits, hears, delivers, submits again. HTTP and NATS are in
front of it (`openai_http.py`, `nats_api.py`); what it decides is in `requests.py` and `validate.py`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from common.logs import get_logger
from common.messages.cluster import RouterHeartbeat, RouterLeft
from common.messages.locations import RouterLease
from common.messages.requests import TokensGenerated
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestFailed,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.views import ClusterView, DescribeCluster, QueryFailed, StoryTold, TellStory
from common.metrics import Metrics
from common.runtime import keys, subjects, wire
from common.runtime.bus import Bus, BusError, BusTimeout, Delivery, NoResponders
from common.runtime.heartbeat import Heartbeat, show_life
from common.runtime.store import Delete, Put, Store, StoreError, Touch, Write
from common.runtime.supervisor import Supervisor
from common.settings import RouterSettings
from common.tracing import Tracer
from common.units import Attempt, RequestId, RouterId
from services.router.activity_feed import ActivityFeed
from services.router.api_errors import ApiError
from services.router.model_text import ModelText
from services.router.nats_api import NatsApi
from services.router.requests import Deliver, Desk, Effect, Fail, Submit, Withdraw, submission
from services.router.telemetry import RouterTelemetry, Times
from services.router.tickets import Choice, Piece, RequestTrace, Ticket, make_ticket
from services.router.validate import ChatPrompt, Plan, PromptInput, drafts

T = TypeVar("T")
log = get_logger(__name__)

RouterEvent = TokensGenerated | RequestAccepted | RequestRefused | RequestInterrupted | RequestFailed

INLINE_CHARS_MAX = 1_000
"""Text up to this length is tokenized on the event loop: handing it to a thread would take longer."""
PROMPT_TTL_S = 60.0
"""How long a prompt in the store outlives its router."""
QUERY_S = 2.0
CANCEL_RELAY_S = 0.5
TOKENIZER_THREADS = 2


class Router:
    """`run` serves until `stop`. `open` may be called as soon as `run` has started."""

    def __init__(
        self,
        settings: RouterSettings,
        bus: Bus,
        store: Store,
        text: ModelText,
        *,
        router_id: RouterId | None = None,
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`tracer` None: requests are not traced here; a client's trace context is passed on."""
        self.settings = settings
        self.text = text
        self.metrics = Metrics("router") if metrics is None else metrics
        self.router_id = router_id or RouterId(f"router-{settings.node}-{secrets.token_hex(4)}")
        self.address = f"{settings.host}:{settings.port}"
        """Of the HTTP door; `main` corrects it once the socket is bound."""
        self._bus = bus
        self._store = store
        self._desk = Desk(patience_s=settings.submit_patience_s, stall_s=settings.stall_s)
        self._tickets: dict[RequestId, Ticket] = {}
        self._choices: dict[RequestId, tuple[Ticket, int]] = {}
        self._prompts: dict[RequestId, set[Attempt]] = {}
        """Attempts whose prompt may lie in the store."""
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._tasks = Supervisor()
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._shut = False
        self._empty = asyncio.Event()
        self._timer_changed = asyncio.Event()
        self._timer_due_s: float | None = None
        """What the timers sleep until; None: for ever."""
        self._heartbeat = Heartbeat(settings.heartbeat_s, self._beat_and_watch)
        self._scheduler_seen_s = 0.0
        self.activity = ActivityFeed(bus, self.cluster, self.spawn, model=text.facts.name, pages_max=settings.pages_max)
        self._telemetry = RouterTelemetry(self.metrics, tracer, text.facts.name, lambda: len(self._tickets))

    def __repr__(self) -> str:
        return f"Router({self.router_id!r}, requests={len(self._tickets)}, generations={len(self._desk)})"

    # --- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until stopped; then take what is on its way for `late_s` more, refuse the rest, give requests in hand
        `drain_s`, fail what is left, and leave."""
        self._bus.on_reconnect(self._heartbeat.now)
        self._scheduler_seen_s = self._now_s()
        try:
            async with self._tasks:
                inbox = await self._bus.subscribe(subjects.router(self.router_id), self._hear)
                relay = await self._bus.subscribe(subjects.ROUTERS_CANCEL, self._cancel_for_another)
                service = await NatsApi(self, self._bus).serve()
                self._tasks.spawn(self._heartbeat.run(), name="heartbeats")
                self._tasks.spawn(self._timers(), name="timers")
                self._started.set()
                self._tasks.spawn(show_life(self.settings.alive_file, self.settings.heartbeat_s), name="sign of life")
                await self._stopping.wait()
                await service.unsubscribe()
                await asyncio.sleep(self.settings.late_s)
                self._shut = True
                await self._drain()
                self.activity.close()
                for subscription in (inbox, relay):
                    await subscription.unsubscribe()
        finally:
            await self._leave()

    def stop(self) -> None:
        self._stopping.set()

    @property
    def leaving(self) -> bool:
        """It is to stop: connections should not be kept for another request."""
        return self._stopping.is_set()

    async def started(self) -> None:
        """Wait until the router hears and serves."""
        await self._started.wait()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run a handler's work under the router's supervision; it must handle its own errors."""
        self._tasks.spawn(work, name=name)

    async def _drain(self) -> None:
        self._empty.clear()
        if self._tickets:
            try:
                async with asyncio.timeout(self.settings.drain_s):
                    await self._empty.wait()
            except TimeoutError:
                log.warning("stopping with requests in hand", requests=len(self._tickets))
        error = ApiError(503, "shutting_down", "this router stops; try again elsewhere or later")
        for ticket in list(self._tickets.values()):
            await self._fail(ticket, error)

    async def _leave(self) -> None:
        error = ApiError(503, "shutting_down", "this router stops; try again elsewhere or later")
        for ticket in self._tickets.values():
            ticket.fail(error)
        self._threads.shutdown(wait=False, cancel_futures=True)
        try:
            await self._bus.publish(subjects.SCHEDULER, wire.encode(RouterLeft(router_id=self.router_id)))
            prompts = [Delete(keys.prompt(i, attempt)) for i, found in self._prompts.items() for attempt in found]
            await self._store.commit([Delete(keys.router_lease(self.router_id)), *prompts])
        except (BusError, StoreError) as error:
            log.warning("could not say goodbye", error=str(error))

    # --- for the doors ---------------------------------------------------------------------------

    async def open(
        self,
        plan: Plan,
        *,
        request_id: RequestId,
        reply_inbox: str | None = None,
        traceparent: str = "",
    ) -> Ticket:
        """Tokenize, check lengths, and submit. Raises: ApiError (400, 409, 429, 503)."""
        opened_s = self._now_s()
        trace = self._telemetry.begin(plan, traceparent)
        if self.settings.log_prompts:
            log.info("asked", request_id=request_id, prompts=msgspec.to_builtins(plan.prompts))
        try:
            ticket = await self._make_ticket(plan, request_id, opened_s, trace)
            passed_on = traceparent if trace is None else trace.context.traceparent
            await self._open_all(ticket, reply_inbox, passed_on)
        except ApiError as error:
            self._telemetry.refused(request_id, error, trace, Times(opened_s, self._now_s()))
            raise
        self._mind_timers()
        return ticket

    async def _make_ticket(
        self, plan: Plan, request_id: RequestId, opened_s: float, trace: RequestTrace | None
    ) -> Ticket:
        """Raises: ApiError."""
        self._admit(request_id, len(plan.prompts) * plan.n)
        ids = [await self._encode(prompt) for prompt in plan.prompts]
        found = drafts(plan, ids, self.text.facts, secrets.randbits(63))
        self._admit(request_id, len(found))  # again: others came while this one was tokenized
        ticket = make_ticket(
            request_id, found, self.text.decode, choices_per_prompt=plan.n, opened_s=opened_s, trace=trace
        )
        for choice in ticket.choices:
            if choice.request_id in self._choices:
                raise ApiError(409, "duplicate_request_id", f"a request {choice.request_id!r} is running")
        return ticket

    async def _open_all(self, ticket: Ticket, reply_inbox: str | None, traceparent: str) -> None:
        now_s = self._now_s()
        self._tickets[ticket.request_id] = ticket
        self._choices.update({choice.request_id: (ticket, i) for i, choice in enumerate(ticket.choices)})
        try:
            for choice in ticket.choices:
                await self._perform(
                    self._desk.open(
                        choice.request_id, choice.draft, now_s, reply_inbox=reply_inbox, traceparent=traceparent
                    )
                )
        except BaseException:
            await self._forget(ticket)
            raise

    async def close(self, ticket: Ticket) -> None:
        """The client has all it wanted, or is gone: what still runs is cancelled."""
        self._telemetry.closed(ticket, self._now_s())
        await self._forget(ticket)

    async def _forget(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.request_id, None)
        for choice in ticket.choices:
            self._choices.pop(choice.request_id, None)
        if not self._tickets:
            self._empty.set()
        for choice in ticket.choices:
            await self._withdraw(choice.request_id)

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request of this router, or of any other. False: unknown."""
        if await self._cancel_here(request_id):
            return True
        try:
            answer = await self._bus.request(subjects.ROUTERS_CANCEL, request_id.encode(), timeout_s=CANCEL_RELAY_S)
        except (BusTimeout, NoResponders):
            return False
        except BusError as error:
            raise ApiError(503, "bus_unavailable", f"the message bus is not reachable: {error}") from error
        return answer.data == b"cancelled"

    async def cluster(self, *, timeout_s: float = QUERY_S) -> ClusterView:
        """Raises: ApiError 503, if no scheduler answers."""
        view: ClusterView = await self._query(DescribeCluster(), ClusterView | QueryFailed, timeout_s)
        return view

    async def story(self, request_id: str) -> StoryTold:
        """The scheduler's log of a request; of one with several choices, that of all of them."""
        told: StoryTold = await self._query(TellStory(request_id=RequestId(request_id)), StoryTold | QueryFailed)
        lines = list(told.lines)
        for i in range(0 if lines else 128):
            part = await self._query(TellStory(request_id=RequestId(f"{request_id}-{i}")), StoryTold | QueryFailed)
            if not part.lines:
                break
            lines += part.lines
        return StoryTold(request_id=RequestId(request_id), lines=tuple(lines))

    def _admit(self, request_id: RequestId, generations: int) -> None:
        if self._shut:
            raise ApiError(503, "shutting_down", "this router stops; try again elsewhere or later")
        if request_id in self._tickets or request_id in self._choices:
            raise ApiError(409, "duplicate_request_id", f"a request {request_id!r} is running")
        if len(self._desk) + generations > self.settings.requests_max:
            message = f"{len(self._desk)} requests are in hand, at most {self.settings.requests_max}; try again later"
            raise ApiError(429, "too_many_requests", message)

    async def _encode(self, prompt: PromptInput) -> Sequence[int]:
        if isinstance(prompt, tuple):
            return prompt
        chars = sum(len(m["content"]) for m in prompt.messages) if isinstance(prompt, ChatPrompt) else len(prompt)
        if chars <= INLINE_CHARS_MAX:
            return self.text.encode(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.text.encode, prompt)

    async def _query(self, question: DescribeCluster | TellStory, types: Any, timeout_s: float = QUERY_S) -> Any:
        try:
            answer = await self._bus.request(subjects.SCHEDULER_QUERY, wire.encode(question), timeout_s=timeout_s)
            found = wire.decode(answer.data, types)
        except (BusError, wire.WireError) as error:
            raise ApiError(503, "no_scheduler", f"no scheduler answers: {error}") from error
        if isinstance(found, QueryFailed):
            raise ApiError(503, "no_scheduler", f"the scheduler cannot answer: {found.message}")
        return found

    # --- what the cluster says -------------------------------------------------------------------

    async def _hear(self, delivery: Delivery) -> None:
        try:
            event: RouterEvent = wire.decode(delivery.data, RouterEvent)
        except wire.WireError as error:
            log.error("an unreadable message was dropped", subject=delivery.subject, error=str(error))
            return
        now_s = self._now_s()
        match event:
            case TokensGenerated():
                for chunk in event.chunks:
                    await self._perform(self._desk.tokens(chunk, now_s))
            case RequestAccepted():
                self._note_class(event)
                await self._perform(self._desk.accepted(event, now_s))
            case RequestRefused():
                await self._perform(self._desk.refused(event))
            case RequestInterrupted():
                await self._perform(self._desk.interrupted(event, now_s))
            case RequestFailed():
                await self._perform(self._desk.failed(event))
        if not isinstance(event, TokensGenerated):
            self._mind_timers()

    def _note_class(self, event: RequestAccepted) -> None:
        found = self._choices.get(event.request_id)
        if found is not None:
            found[0].choices[found[1]].length_class = event.length_class

    async def _cancel_for_another(self, delivery: Delivery) -> None:
        if delivery.reply and await self._cancel_here(delivery.data.decode(errors="replace")):
            await self._publish(delivery.reply, b"cancelled")

    async def _cancel_here(self, request_id: str) -> bool:
        ticket = self._tickets.get(RequestId(request_id))
        if ticket is None:
            return False
        await self._fail(ticket, ApiError(400, "request_cancelled", "the request was cancelled"))
        return True

    # --- effects ---------------------------------------------------------------------------------

    async def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Submit():
                    await self._submit(effect)
                case Withdraw():
                    cancel = CancelRequested(request_id=effect.request_id, router_id=self.router_id)
                    await self._publish(subjects.SCHEDULER, wire.encode(cancel), request_id=effect.request_id)
                case Deliver():
                    await self._deliver(effect)
                case Fail():
                    found = self._choices.get(effect.request_id)
                    if found is not None:
                        await self._fail(found[0], effect.error)

    async def _submit(self, effect: Submit) -> None:
        generation = self._desk.get(effect.request_id)
        if generation is None or generation.attempt != effect.attempt:
            return
        spec, stored = submission(generation, self.router_id, self.settings.inline_tokens_max)
        message = wire.encode(RequestSubmitted(spec=spec))
        if stored is None:
            generation.sent = True
            await self._publish(subjects.SCHEDULER, message, request_id=effect.request_id)
            return
        self._prompts.setdefault(effect.request_id, set()).add(effect.attempt)
        # Not here: the store may take a while, and the cluster's other messages must not wait for it.
        self.spawn(self._store_and_submit(effect, stored, message), name=f"submit {effect.request_id}")

    async def _store_and_submit(self, effect: Submit, stored: bytes, message: bytes) -> None:
        try:
            await self._store.commit([Put(keys.prompt(effect.request_id, effect.attempt), stored, PROMPT_TTL_S)])
        except StoreError as error:
            text = f"the prompt could not be stored: {error}; try again later"
            await self._perform(self._desk.give_up(effect.request_id, ApiError(503, "store_unavailable", text)))
            return
        generation = self._desk.get(effect.request_id)
        if generation is not None and generation.attempt == effect.attempt:
            generation.sent = True
            await self._publish(subjects.SCHEDULER, message, request_id=effect.request_id)

    async def _deliver(self, effect: Deliver) -> None:
        found = self._choices.get(effect.request_id)
        if found is None:
            return
        ticket, index = found
        choice: Choice = ticket.choices[index]
        if ticket.full:
            text = "the client reads too slowly; the request was cancelled"
            await self._fail(ticket, ApiError(408, "slow_client", text))
            return
        text, stopped = choice.text.push(effect.token_ids, last=effect.finish_reason is not None)
        finish = "stop" if stopped else effect.finish_reason
        self._telemetry.delivered(choice, len(effect.token_ids), finish, self._now_s())
        choice.generated += len(effect.token_ids)
        choice.ended = finish is not None
        ticket.put(Piece(index, text, effect.token_ids, effect.logprobs, finish))
        if choice.ended:
            await self._withdraw(effect.request_id)

    async def _fail(self, ticket: Ticket, error: ApiError) -> None:
        """One choice that fails fails the request: a client could not tell half an answer from a whole one."""
        ticket.fail(error)
        for choice in ticket.choices:
            await self._withdraw(choice.request_id)

    async def _withdraw(self, request_id: RequestId) -> None:
        await self._perform(self._desk.withdraw(request_id))

    async def _publish(self, subject: str, data: bytes, *, request_id: str = "") -> None:
        # What does not get through is sent again (submissions) or found by the scheduler's reconciling (cancels).
        try:
            await self._bus.publish(subject, data)
        except BusError as error:
            log.warning("a message was not sent", subject=subject, request_id=request_id, error=str(error))

    # --- time ------------------------------------------------------------------------------------

    def _mind_timers(self) -> None:
        """Something new may be due. Most of it is due later than what is waited for: then nobody is woken."""
        due_s = self._desk.next_deadline_s()
        if due_s is not None and (self._timer_due_s is None or due_s < self._timer_due_s):
            self._timer_changed.set()

    async def _timers(self) -> None:
        while True:
            self._timer_changed.clear()
            due_s = self._timer_due_s = self._desk.next_deadline_s()
            try:
                wait_s = None if due_s is None else max(0.0, due_s - self._now_s())
                async with asyncio.timeout(wait_s):
                    await self._timer_changed.wait()
            except TimeoutError:
                await self._perform(self._desk.time_passed(self._now_s()))

    async def _beat_and_watch(self) -> None:
        """Sign of life to scheduler and store; and whether a scheduler is there, while somebody waits for it."""
        await self._beat()
        if not self._desk or await self._scheduler_answers():
            self._scheduler_seen_s = self._now_s()
        elif self._now_s() - self._scheduler_seen_s >= self.settings.submit_patience_s:
            await self._perform(self._desk.scheduler_lost(self._now_s()))

    async def _beat(self) -> None:
        beat = RouterHeartbeat(router_id=self.router_id, waiting=self._desk.waiting())
        await self._publish(subjects.SCHEDULER, wire.encode(beat))
        lease = wire.encode_record(RouterLease(router_id=self.router_id, address=self.address))
        try:
            await self._store.commit(
                [Put(keys.router_lease(self.router_id), lease, self.settings.lease_s), *self._prompt_writes()]
            )
        except StoreError as error:
            log.warning("the store does not take the sign of life", error=str(error))

    def _prompt_writes(self) -> list[Write]:
        """Keep the prompts of current attempts, drop the others. A drop that fails is made good by its time to live."""
        writes: list[Write] = []
        for request_id, attempts in list(self._prompts.items()):
            generation = self._desk.get(request_id)
            for attempt in list(attempts):
                key = keys.prompt(request_id, attempt)
                if generation is not None and generation.attempt == attempt:
                    writes.append(Touch(key, PROMPT_TTL_S))
                else:
                    writes.append(Delete(key))
                    attempts.discard(attempt)
            if not attempts:
                del self._prompts[request_id]
        return writes

    async def _scheduler_answers(self) -> bool:
        try:
            await self._query(TellStory(request_id=RequestId("")), StoryTold | QueryFailed, self.settings.heartbeat_s)
        except ApiError:
            return False
        return True

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
