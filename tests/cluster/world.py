"""The whole cluster in one process: every role's real service and core, on the in-memory bus, store and data
plane, timed engines and virtual time. Processes are killed, restarted and cut off on demand.

Every core checks its invariants after every event (`conftest.py`). `settled()` is the end of every test:
nobody waits, nothing is held, and nothing but leases lies in the store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from common.messages.cluster import StepCost
from common.messages.requests import SamplingParams
from common.messages.views import ClusterView
from common.metrics import Metrics
from common.policy.scheduler import Scheduler
from common.runtime import keys
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.shell import JournalSink
from common.runtime.store import StoreError
from common.runtime.store_memory import MemoryStore
from common.settings import (
    CoordinatorSettings,
    DecodeWorkerSettings,
    PrefillWorkerSettings,
    RouterSettings,
    SchedulerSettings,
)
from common.tracing import Tracer
from services.decode_worker.service import DecodeWorker
from services.engine.collectives import GroupLinks
from services.engine.collectives_memory import MemoryGroupHub
from services.engine.data_plane import DataPlane, DataPlaneFactory, KvReceiver
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.timed_language import TimedShape, expected_tokens
from services.engine.timed_prefill import TimedPrefillEngine
from services.engine.transport_memory import MemoryHub
from services.prefill_worker.service import PrefillWorker
from services.router.api_errors import ApiError
from services.router.model_text import ModelText
from services.router.service import Router
from services.router.tickets import Ticket
from services.router.validate import ModelFacts, Plan
from services.scheduler.service import SchedulerService
from services.sp_coordinator.service import SpCoordinator

VOCAB = 1_000
SHAPE = TimedShape(
    layers=6,
    vocab=VOCAB,
    kv_capacity_tokens=20_000,
    step_cost=StepCost(pass_s=0.02, token_s=0.4e-3, pair_s=2e-7),
)
SETTLED_S = 60.0
"""Virtual seconds in which everything must have ended once nothing goes wrong any more."""
PATIENCE_S = 60.0

Service = Router | SchedulerService | SpCoordinator | PrefillWorker | DecodeWorker


TestT = TypeVar("TestT", bound=Callable[..., Any])


def seeds(count: int) -> Callable[[TestT], TestT]:
    """Run the test with `seed` = 0 … count - 1; nightly, with many more."""

    def mark(test: TestT) -> TestT:
        test.seeds = count  # type: ignore[attr-defined]
        return test

    return mark


class Words:
    """In place of a tokenizer: prompts here are token ids."""

    facts = ModelFacts(
        name="timed",
        context_tokens=SHAPE.context_tokens,
        vocab_size=VOCAB,
        stop_token_ids=(),
        default_max_tokens=16,
        has_chat_template=False,
    )

    def encode(self, prompt: Any) -> Sequence[int]:
        return cast(Sequence[int], prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token_id}>" for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return f"<{token_id}>".encode()


class Gate:
    """A process's way to the store: closed when the process is killed."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.open = True

    def __getattr__(self, name: str) -> Any:
        if not self.open:
            raise StoreError("this process was killed")
        return getattr(self._store, name)


@dataclass(eq=False)
class Answer:
    """What a client asked, and what it got."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    router: str
    traceparent: str = ""
    tokens: list[int] = field(default_factory=list)
    error: ApiError | None = None
    cancelled: bool = False
    asked_s: float = 0.0
    first_token_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    """When each token came."""
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.asked_s

    @property
    def expected(self) -> list[int]:
        return expected_tokens(self.prompt_ids, self.max_tokens, VOCAB)

    def check_tokens(self) -> None:
        """What came is right, from the first token on; and all of it, unless an error or the client ended it."""
        assert self.tokens == self.expected[: len(self.tokens)], f"{self.request_id}: wrong tokens"
        if self.error is None and not self.cancelled:
            assert len(self.tokens) == self.max_tokens, f"{self.request_id}: {len(self.tokens)} of {self.max_tokens}"


@dataclass(eq=False)
class Node:
    """One process."""

    name: str
    make: Callable[[MemoryBus, Gate, Node], Service]
    service: Service | None = None
    bus: MemoryBus | None = None
    gate: Gate | None = None
    task: asyncio.Task[None] | None = None
    plane: DataPlane | None = None
    groups: GroupLinks | None = None
    engine: TimedPrefillEngine | TimedDecodeEngine | None = None

    @property
    def alive(self) -> bool:
        return self.task is not None


class Cluster:
    """`prefill` workers p0, p1 …, `decode` workers d0 …, routers r0 …, `scheduler`, `coordinator`."""

    def __init__(
        self,
        *,
        prefill: int = 2,
        decode: int = 1,
        routers: int = 1,
        nodes: int = 1,
        seed: int = 0,
        shape: TimedShape = SHAPE,
        journal: JournalSink | None = None,
        coordinators: int = 1,
        worker: dict[str, Any] | None = None,
        tracer: Tracer | None = None,
        **scheduler: Any,
    ) -> None:
        """`worker`: settings of the prefill workers; what is not named here, of the scheduler."""
        self.metrics: dict[str, Metrics] = {}
        """Of the last process of each name."""
        self._tracer = tracer
        self.broker = MemoryBroker(seed=seed)
        self.store = MemoryStore()
        self.hub = MemoryHub(seed=seed)
        self.group_hub = MemoryGroupHub()
        self.random = random.Random(seed)
        self.shape = shape
        self.answers: list[Answer] = []
        self.crashed: list[str] = []
        self._journal = journal
        self._serial = 0
        self._worker = worker or {}
        self._settings = SchedulerSettings(**{"threshold_tokens": 1_000, **scheduler})
        self._starts = 0
        self._node_of = {f"p{i}": f"node-{i * nodes // prefill}" for i in range(prefill)}
        self.nodes: dict[str, Node] = {
            "scheduler": Node("scheduler", self._make_scheduler),
            "coordinator": Node("coordinator", self._make_coordinator),
        }
        self.nodes |= {
            f"coordinator-{i}": Node(f"coordinator-{i}", self._make_coordinator) for i in range(1, coordinators)
        }
        self.nodes |= {f"d{i}": Node(f"d{i}", self._make_decode) for i in range(decode)}
        self.nodes |= {f"p{i}": Node(f"p{i}", self._make_prefill) for i in range(prefill)}
        self.nodes |= {f"r{i}": Node(f"r{i}", self._make_router) for i in range(routers)}

    # --- processes -------------------------------------------------------------------------------

    def _make_scheduler(self, bus: MemoryBus, gate: Gate, node: Node) -> SchedulerService:
        def journal_of(_epoch: int) -> AbstractContextManager[JournalSink | None]:
            return nullcontext(self._journal)

        owner = f"scheduler-{self._starts}"
        measured = self._measured(node)
        return SchedulerService(
            self._settings,
            bus,
            cast(Any, gate),
            owner=owner,
            journal_of=journal_of,
            metrics=measured,
            tracer=self._tracer,
        )

    def _measured(self, node: Node) -> Metrics:
        self.metrics[node.name] = Metrics(node.name)
        return self.metrics[node.name]

    def _make_coordinator(self, bus: MemoryBus, gate: Gate, node: Node) -> SpCoordinator:
        incarnation = f"start-{self._starts}"
        return SpCoordinator(
            CoordinatorSettings(), bus, cast(Any, gate), incarnation=incarnation, metrics=self._measured(node)
        )

    def _make_prefill(self, bus: MemoryBus, gate: Gate, node: Node) -> PrefillWorker:
        engine = node.engine = TimedPrefillEngine(self.shape)
        node_name = self._node_of[node.name]
        settings = PrefillWorkerSettings(worker_id=node.name, engine="timed", node=node_name, **self._worker)
        groups = self._groups_of(node)
        measured = self._measured(node)
        return PrefillWorker(
            settings, bus, cast(Any, gate), engine, self._plane_of(node), groups=groups, metrics=measured
        )

    def _make_decode(self, bus: MemoryBus, gate: Gate, node: Node) -> DecodeWorker:
        engine = node.engine = TimedDecodeEngine(self.shape)
        settings = DecodeWorkerSettings(worker_id=node.name, engine="timed")
        measured = self._measured(node)
        return DecodeWorker(settings, bus, cast(Any, gate), engine, self._plane_of(node), metrics=measured)

    def _make_router(self, bus: MemoryBus, gate: Gate, node: Node) -> Router:
        return Router(
            RouterSettings(),
            bus,
            cast(Any, gate),
            cast(ModelText, Words()),
            router_id=cast(Any, node.name),
            metrics=self._measured(node),
            tracer=self._tracer,
        )

    def _plane_of(self, node: Node) -> DataPlaneFactory:
        def make(receiver: KvReceiver | None) -> DataPlane:
            node.plane = self.hub.plane()(receiver)
            return node.plane

        return make

    def _groups_of(self, node: Node) -> Callable[[], GroupLinks]:
        def make() -> GroupLinks:
            node.groups = self.group_hub.links(join_s=4.0)()
            return node.groups

        return make

    def start(self, name: str) -> None:
        node = self.nodes[name]
        assert not node.alive, f"{name} runs already"
        self._starts += 1
        node.bus, node.gate = MemoryBus(self.broker, name), Gate(self.store)
        node.service = node.make(node.bus, node.gate, node)
        node.task = asyncio.get_running_loop().create_task(self._serve(node, node.service), name=name)

    async def _serve(self, node: Node, service: Service) -> None:
        try:
            await service.run()
        except Exception as error:
            self.crashed.append(f"{node.name}: {error!r}")
            raise

    async def kill(self, name: str) -> None:
        """As SIGKILL does: nothing is said, flushed or given back."""
        node = self.nodes[name]
        assert node.task is not None
        assert node.bus is not None
        assert node.gate is not None
        node.gate.open = False
        self.broker.cut(name)
        if node.plane is not None:
            self.hub.sever(node.plane.address)
        if node.groups is not None:
            self.group_hub.sever(node.groups.address)
        node.task.cancel()
        await asyncio.wait([node.task])
        await self._forget(node)

    def hang(self, name: str) -> None:
        """As SIGSTOP does, for a prefill worker: it is heard of no more, and its connections stay."""
        groups = self.nodes[name].groups
        assert groups is not None
        self.broker.cut(name)
        self.group_hub.silenced.add(groups.address)

    def wake(self, name: str) -> None:
        """As SIGCONT does."""
        groups = self.nodes[name].groups
        assert groups is not None
        self.group_hub.silenced.discard(groups.address)
        self.broker.heal(name)

    async def stop(self, name: str) -> None:
        """As SIGTERM does."""
        node = self.nodes[name]
        assert node.task is not None
        assert node.service is not None
        node.service.stop()
        await asyncio.wait_for(node.task, PATIENCE_S)
        await self._forget(node)

    async def _forget(self, node: Node) -> None:
        assert node.bus is not None
        for subscription in list(node.bus._subscriptions):
            await subscription.unsubscribe()
        self.broker._buses.remove(node.bus)
        node.task = node.service = node.bus = node.gate = node.plane = node.groups = node.engine = None

    async def ready(self) -> None:
        """Everybody knows everybody."""
        await self.until(lambda: self.view is not None and self._complete(self.view), 15.0)

    def _complete(self, view: ClusterView) -> bool:
        workers = {worker.profile.worker_id for worker in view.workers}
        alive = {name for name, node in self.nodes.items() if node.alive}
        return workers == {name for name in alive if name[0] in "pd"} and view.coordinator_present

    async def until(self, holds: Callable[[], object], within_s: float = PATIENCE_S) -> None:
        """Let virtual time pass until it holds; fail after `within_s`."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + within_s
        while not holds():
            assert loop.time() < end_s, f"not within {within_s} virtual seconds:\n{self.describe()}"
            await asyncio.sleep(0.05)

    # --- clients ---------------------------------------------------------------------------------

    def submit(self, prompt_tokens: int, max_tokens: int = 8, *, router: str = "r0", traceparent: str = "") -> Answer:
        self._serial += 1
        ids = tuple(self.random.randrange(VOCAB) for _ in range(prompt_tokens))
        now_s = asyncio.get_running_loop().time()
        answer = Answer(f"q{self._serial}", ids, max_tokens, router, traceparent, asked_s=now_s)
        answer.task = asyncio.get_running_loop().create_task(self._client(answer), name=f"client {answer.request_id}")
        self.answers.append(answer)
        return answer

    async def _client(self, answer: Answer) -> None:
        router = cast(Router, self.nodes[answer.router].service)
        plan = Plan(
            prompts=(answer.prompt_ids,),
            n=1,
            stream=True,
            include_usage=False,
            max_tokens=answer.max_tokens,
            sampling=SamplingParams(temperature=0.0),
            seed=1,
            stop=(),
            ignore_eos=True,
        )
        ticket: Ticket | None = None
        try:
            ticket = await router.open(plan, request_id=answer.request_id, traceparent=answer.traceparent)
            async for piece in ticket.pieces():
                if answer.first_token_s is None:
                    answer.first_token_s = asyncio.get_running_loop().time()
                answer.tokens += piece.token_ids
                answer.token_s += [asyncio.get_running_loop().time()] * len(piece.token_ids)
        except ApiError as error:
            answer.error = error
        except asyncio.CancelledError:
            answer.cancelled = True
        finally:
            if ticket is not None:
                await router.close(ticket)

    async def cancel(self, answer: Answer) -> None:
        """The client goes away."""
        if answer.task is not None and not answer.task.done():
            answer.cancelled = True
            answer.task.cancel()
            await asyncio.wait([answer.task])

    # --- what is there ---------------------------------------------------------------------------

    @property
    def scheduler(self) -> Scheduler | None:
        service = self.nodes["scheduler"].service
        return service.core if isinstance(service, SchedulerService) else None

    @property
    def view(self) -> ClusterView | None:
        service = self.nodes["scheduler"].service
        assert service is None or isinstance(service, SchedulerService)
        return None if service is None or service.core is None else service.describe()

    def count(self, name: str) -> int:
        view = self.view
        return 0 if view is None else view.counters.get(name, 0)

    def engines(self) -> dict[str, TimedPrefillEngine | TimedDecodeEngine]:
        return {name: node.engine for name, node in self.nodes.items() if node.engine is not None}

    def describe(self) -> str:
        view = self.view
        lines = [f"open: {[a.request_id for a in self.answers if not a.ended]}", f"crashed: {self.crashed}"]
        if view is not None:
            lines += [f"{r.request_id}/{r.attempt} {r.state} on {r.workers}" for r in view.requests]
            lines += [f"{w.profile.worker_id}: {w.requests}, KV {w.kv_reserved_tokens}" for w in view.workers]
        lines += [f"{name} engine: KV {engine.kv_used_tokens}" for name, engine in self.engines().items()]
        return "\n".join(lines + self._leftovers())

    def _leftovers(self) -> list[str]:
        """What must be nothing in the end."""
        found = [f"{a.request_id} has not ended" for a in self.answers if not a.ended]
        found += [f"{n}: {e.kv_used_tokens} tokens of KV" for n, e in self.engines().items() if e.kv_used_tokens]
        for node in self.nodes.values():
            match node.service:
                case PrefillWorker() | DecodeWorker():
                    found += [f"{node.name} holds {h.request_id}/{h.attempt}" for h in node.service.core.holdings()]
                case SpCoordinator():
                    found += [f"{node.name} drives {key}" for key in node.service.core.driving()]
                case _:
                    pass
        view = self.view
        if view is not None:
            found += [f"scheduler knows {r.request_id}/{r.attempt} {r.state}" for r in view.requests]
            found += [f"{w.profile.worker_id} is charged" for w in view.workers if w.kv_reserved_tokens]
        lasting = (keys.requests(), keys.kv_all(), f"{keys.ROOT}:prompt:")
        now_s = asyncio.get_running_loop().time()
        living = (key for key, (_, end_s) in self.store._values.items() if end_s is None or end_s > now_s)
        found += [key for key in living if key.startswith(lasting)]
        return found

    async def settled(self) -> None:
        """Every request ended, as it should; nothing is held anywhere."""
        await self.until(lambda: self.crashed or not self._leftovers(), SETTLED_S)
        assert not self.crashed, self.crashed
        for answer in self.answers:
            answer.check_tokens()


@asynccontextmanager
async def cluster(**options: Any) -> AsyncIterator[Cluster]:
    """A cluster that is ready; at the end of the block it must settle."""
    found = Cluster(**options)
    try:
        for name in found.nodes:
            found.start(name)
        await found.ready()
        yield found
        await found.settled()
    finally:
        tasks = [n.task for n in found.nodes.values() if n.task] + [a.task for a in found.answers if a.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
