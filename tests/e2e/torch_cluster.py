"""The cluster of `tests/cluster/world.py` with real engines: torch in fp32 or bf16, KV over TCP, real time.

Bus and store stay in memory, so that a test may listen to every message and send its own.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from common.messages.base import Message
from common.messages.cluster import ExchangeCost, StepCost
from common.messages.sp import GroupFormed, GroupPaused, GroupResumed, PauseGroup, ResumeGroup
from common.policy.lifecycle import RequestState
from common.policy.scheduler_io import SchedulerHeard
from common.runtime import subjects, wire
from common.runtime.bus import Delivery
from common.runtime.bus_memory import MemoryBus
from common.settings import CoordinatorSettings, DecodeWorkerSettings, DtypeName, PrefillWorkerSettings, RouterSettings
from common.units import RequestId
from services.decode_worker.service import DecodeWorker
from services.engine.collectives_door import open_group_links
from services.engine.interface import PassResult, Sampled, Segment
from services.engine.model import LoadedModel, load_model
from services.engine.spill import SpillLimits
from services.engine.torch_decode import TorchDecodeEngine
from services.engine.torch_prefill import TorchPrefillEngine
from services.engine.transport import open_data_plane
from services.prefill_worker.service import PrefillWorker
from services.router.model_text import ModelText
from services.router.service import Router
from services.scheduler.service import SchedulerService
from services.sp_coordinator.service import SpCoordinator
from tests.cluster.world import Answer, Cluster, Gate, Node, Words

T = TypeVar("T", bound=Message)
BOUND_S = 60.0
"""Of leases, transfers and answers: whoever shares this machine's cores, nobody here is given up for being slow."""


@dataclass(eq=False)
class TorchAnswer(Answer):
    """An answer that is compared with what transformers said."""

    reference: list[int] = field(default_factory=list)

    @property
    def expected(self) -> list[int]:
        return self.reference


class WatchedPrefill(TorchPrefillEngine):
    """Keeps count of what it computed for whom, where it was stopped, and what shared a pass."""

    def __init__(self, model: LoadedModel, step_cost: StepCost, **options: Any) -> None:
        super().__init__(model, step_cost, **options)
        self.layers = model.layers
        self.stopped_at: Counter[int] = Counter()
        """Passes stopped before their end, by the steps they had done."""
        self.passes_run = 0
        self.rows_most = 0
        self.decoded_at_once = 0
        """Decode rows in one pass, at most."""
        self.computed: dict[RequestId, tuple[int, int]] = {}
        """Of closed sequences: tokens computed summed over layers; tokens known (prompt and drawn)."""

    async def run(self, segments: Sequence[Segment], *, background: bool = False) -> PassResult:
        self.passes_run += 1
        self.rows_most = max(self.rows_most, len(segments))
        self.decoded_at_once = max(self.decoded_at_once, sum(part.tokens == 1 and part.start > 0 for part in segments))
        return self._noted(await super().run(segments, background=background))

    async def resume(self, request_id: RequestId) -> PassResult:
        return self._noted(await super().resume(request_id))

    def close(self, request_id: RequestId) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            again = sequence.spec.attempt > 0
            assert again or request_id not in self.computed, f"{request_id} was computed here twice"
            self.computed[request_id] = (sequence.layer_tokens, len(sequence.token_ids))
        super().close(request_id)

    def _noted(self, result: PassResult) -> PassResult:
        if not result.finished:
            self.stopped_at[result.steps_done] += 1
        return result


class WatchedDecode(TorchDecodeEngine):
    """Knows how many sequences shared a step at most."""

    rows_most = 0

    async def step(self, request_ids: Sequence[RequestId]) -> tuple[Sampled, ...]:
        self.rows_most = max(self.rows_most, len(request_ids))
        return await super().step(request_ids)


class TorchCluster(Cluster):
    """Two prefill workers (one copy of the weights), one decode worker, a router, scheduler, coordinator."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: DtypeName = "float32",
        chunk_tokens: int = 64,
        prefill: int = 2,
        answer_s: float = BOUND_S,
        records_s: float = BOUND_S,
        exchange: ExchangeCost | None = None,
        limits: SpillLimits | None = None,
        prefill_kv_tokens: int = 8_192,
        **options: Any,
    ) -> None:
        """`records_s`: how long the store remembers what a prefill worker that was killed held."""
        super().__init__(prefill=prefill, lease_s=BOUND_S, **options)
        self.rng = random.Random(options.get("seed", 0))
        self.model = load_model(folder, dtype=dtype, device="cpu")
        self.heard: list[Message] = []
        """Everything that the scheduler was told."""
        self._decode_model = load_model(folder, dtype=dtype, device="cpu")  # its engine takes the weights out
        self._chunk_tokens = chunk_tokens
        self._answer_s = answer_s
        self._records_s = records_s
        # Rather too slow than too fast: a scheduler that overestimates a prefill lets it be paused to the end.
        self._exchange = exchange
        self._limits, self._prefill_kv_tokens = limits, prefill_kv_tokens
        self._step_cost = StepCost(pass_s=0.05, token_s=5e-3, pair_s=1e-6)

    @property
    def prefills(self) -> list[WatchedPrefill]:
        engines = (node.engine for name, node in self.nodes.items() if name.startswith("p"))
        return [cast(WatchedPrefill, engine) for engine in engines if engine is not None]

    @property
    def decoder(self) -> WatchedDecode:
        return cast(WatchedDecode, self.nodes["d0"].engine)

    def _make_coordinator(self, bus: MemoryBus, gate: Gate, node: Node) -> SpCoordinator:
        settings = CoordinatorSettings(answer_s=self._answer_s, lease_s=BOUND_S)
        return SpCoordinator(settings, bus, cast(Any, gate), incarnation=f"start-{self._starts}")

    def _make_prefill(self, bus: MemoryBus, gate: Gate, node: Node) -> PrefillWorker:
        engine = WatchedPrefill(
            self.model,
            self._step_cost,
            kv_capacity_tokens=self._prefill_kv_tokens,
            long_nice=0,
            exchange=self._exchange,
            spill=self._limits,
        )
        node.engine = cast(Any, engine)
        settings = PrefillWorkerSettings(
            worker_id=node.name,
            chunk_tokens=self._chunk_tokens,
            lease_s=self._records_s,
            node=self._node_of[node.name],
        )
        plane = open_data_plane(secret="s", transfer_s=BOUND_S)
        groups = open_group_links(secret="s", silence_s=BOUND_S, join_s=BOUND_S)
        return PrefillWorker(settings, bus, cast(Any, gate), engine, plane, groups=groups)

    def _make_decode(self, bus: MemoryBus, gate: Gate, node: Node) -> DecodeWorker:
        cost = msgspec.structs.replace(self._step_cost, pair_s=0.0)
        engine = WatchedDecode(self._decode_model, kv_capacity_tokens=8_192, rows_max=16, step_cost=cost)
        node.engine = cast(Any, engine)
        settings = DecodeWorkerSettings(worker_id=node.name, lease_s=BOUND_S)
        return DecodeWorker(settings, bus, cast(Any, gate), engine, open_data_plane(secret="s", transfer_s=BOUND_S))

    def _make_router(self, bus: MemoryBus, gate: Gate, node: Node) -> Router:
        words = Words()
        words.facts = replace(Words.facts, context_tokens=self.model.context_tokens, vocab_size=self.model.vocab)
        return Router(RouterSettings(), bus, cast(Any, gate), cast(ModelText, words), router_id=cast(Any, node.name))

    def ask(self, prompt_ids: Sequence[int], reference: Sequence[int]) -> TorchAnswer:
        """Submit a prompt; the reference says how many tokens to generate, and which."""
        self._serial += 1
        loop = asyncio.get_running_loop()
        answer = TorchAnswer(
            f"q{self._serial}",
            tuple(prompt_ids),
            len(reference),
            "r0",
            asked_s=loop.time(),
            reference=list(reference),
        )
        answer.task = loop.create_task(self._client(answer), name=f"client {answer.request_id}")
        self.answers.append(answer)
        return answer

    async def listen(self) -> None:
        """From here on, keep what the scheduler is told."""

        async def hear(delivery: Delivery) -> None:
            self.heard.append(wire.decode(delivery.data, SchedulerHeard))

        await MemoryBus(self.broker, "listener").subscribe(subjects.SCHEDULER, hear)

    def told(self, kind: type[T]) -> list[T]:
        return [message for message in self.heard if isinstance(message, kind)]


class Pauser:
    """Pauses every long that prefills, again and again, each time after a random while; and resumes it.

    It stands in for shorts by the hundred. What the scheduler itself pauses it leaves to the scheduler, which
    in turn takes no notice of pauses that it did not ask for.
    """

    def __init__(self, cluster: TorchCluster, *, run_s: float, rest_s: float) -> None:
        self.pauses: list[GroupPaused] = []
        """Of its own and of the scheduler's asking."""
        self._cluster = cluster
        self._run_s = run_s
        self._rest_s = rest_s
        self._bus = MemoryBus(cluster.broker, "pauser")
        self._orders: asyncio.Queue[PauseGroup | ResumeGroup] = asyncio.Queue(1_000)

    async def run(self) -> None:
        await self._bus.subscribe(subjects.SCHEDULER, self._hear)
        while True:
            order = await self._orders.get()
            scheduler = self._cluster.scheduler
            assert scheduler is not None
            request = scheduler.cluster.requests.get(order.request_id)
            if request is not None and request.state is RequestState.RUNNING:
                await self._bus.publish(subjects.COORDINATOR, wire.encode(order))

    async def _hear(self, delivery: Delivery) -> None:
        match wire.decode(delivery.data, SchedulerHeard):
            case GroupFormed() | GroupResumed() as event:
                self._later(PauseGroup, event, self._run_s)
            case GroupPaused() as event:
                self.pauses.append(event)
                self._later(ResumeGroup, event, self._rest_s)
            case _:
                pass

    def _later(
        self, order: type[PauseGroup | ResumeGroup], event: GroupFormed | GroupResumed | GroupPaused, mean_s: float
    ) -> None:
        service = self._cluster.nodes["scheduler"].service
        assert isinstance(service, SchedulerService)
        message = order(request_id=event.request_id, attempt=event.attempt, epoch=service.epoch or 0, cause="pauser")
        wait_s = self._cluster.rng.uniform(0.0, 2.0 * mean_s)
        asyncio.get_running_loop().call_later(wait_s, self._orders.put_nowait, message)


@asynccontextmanager
async def torch_cluster(folder: Path, **options: Any) -> AsyncIterator[TorchCluster]:
    """A cluster that is ready; at the end of the block it must settle: nothing held, nothing waiting."""
    found = TorchCluster(folder, **options)
    try:
        for name in found.nodes:
            found.start(name)
        await found.ready()
        await found.listen()
        yield found
        await found.settled()
    finally:
        tasks = [n.task for n in found.nodes.values() if n.task] + [a.task for a in found.answers if a.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
