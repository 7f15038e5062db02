"""What the router's tests share: a tiny model folder, and a cluster that plays scheduler and worker."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.messages.cluster import RouterHeartbeat, RouterLeft, StepCost, WorkerProfile
from common.messages.requests import RequestSpec, TokenChunk, TokenLogprob, TokensGenerated
from common.messages.scheduling import (
    CancelRequested,
    RequestAccepted,
    RequestInterrupted,
    RequestRefused,
    RequestSubmitted,
)
from common.messages.views import ClusterView, DescribeCluster, StoryTold, TellStory, WorkerView
from common.runtime import subjects, wire
from common.runtime.bus import Bus, Delivery
from common.runtime.bus_memory import MemoryBroker, MemoryBus
from common.runtime.store_memory import MemoryStore
from common.runtime.supervisor import Supervisor
from common.settings import RouterSettings
from common.tracing import Tracer
from common.units import WorkerId
from services.router.model_text import ModelText, load
from services.router.openai_http import create_app
from services.router.service import Router

NAME = "tiny"
CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if messages[0]['content'] == 'no' %}{{ raise_exception('the first word must not be no') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = ["the capital of France is Paris, on the Seine.", "grüße, naïve 東京 Пари́ж 🙂 user assistant system the of is"]


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, *, template: str | None = TEMPLATE) -> Path:
    tokenizer.enable_truncation(max_length=8)  # as in many published files; the router must not cut prompts
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"max_position_embeddings": CONTEXT, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    words = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words | ({"chat_template": template} if template else {})))
    return folder


@lru_cache(maxsize=1)
def tiny_text() -> ModelText:
    return load(
        write_folder(Path(mkdtemp(prefix="pecsched-tiny-")), tiny_tokenizer()), name=NAME, default_max_tokens=64
    )


def ids_of(text: str) -> list[int]:
    return list(tiny_text().encode(text))


EOS = 1


class FakeCluster:
    """Plays scheduler and worker: answers every submission with the tokens of `answer`, one message each."""

    def __init__(self, bus: Bus, store: MemoryStore, answer: str = "Paris, on the Seine.") -> None:
        self.bus = bus
        self.store = store
        self.answer_ids: list[int] = [*ids_of(answer), EOS]
        self.endless = False
        """Begins the answer again instead of ending it."""
        self.submitted: list[RequestSpec] = []
        self.prompts: list[list[int]] = []
        self.cancelled: list[str] = []
        self.beats: list[RouterHeartbeat] = []
        self.left: list[str] = []
        self.deaf = False
        """Hears nothing and answers nothing."""
        self.refuse_code: str | None = None
        self.hold: asyncio.Event | None = None
        """Generation waits for it after the first `hold_after` tokens."""
        self.hold_after = 0
        self.lose: Callable[[int, int], bool] = lambda attempt, index: False
        """(attempt, output index) of tokens that are lost on the way."""
        self.interrupt_at: dict[int, int] = {}
        """attempt → output index before which it is interrupted."""
        self.profiles: list[str] = ["prefill", "decode"]
        self.something: asyncio.Event = asyncio.Event()
        self._tasks: Supervisor | None = None

    async def serve(self, tasks: Supervisor) -> None:
        self._tasks = tasks
        await self.bus.subscribe(subjects.SCHEDULER, self._hear)
        await self.bus.subscribe(subjects.SCHEDULER_QUERY, self._asked)

    async def until(self, condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
        """Wait for something that this cluster hears."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.something.clear()
                await self.something.wait()

    async def _hear(self, delivery: Delivery) -> None:
        if self.deaf:
            return
        event = wire.decode(delivery.data, RequestSubmitted | CancelRequested | RouterHeartbeat | RouterLeft)
        match event:
            case RequestSubmitted(spec=spec):
                await self._take(spec)
            case CancelRequested():
                self.cancelled.append(event.request_id)
            case RouterHeartbeat():
                self.beats.append(event)
            case RouterLeft():
                self.left.append(event.router_id)
        self.something.set()

    async def _take(self, spec: RequestSpec) -> None:
        known = any(s.request_id == spec.request_id and s.attempt == spec.attempt for s in self.submitted)
        self.submitted.append(spec)
        data = spec.prompt.inline if spec.prompt.key is None else await self.store.get(spec.prompt.key)
        assert data is not None
        assert len(data) == 4 * spec.prompt.tokens
        self.prompts.append(array("i", data).tolist())
        who = {"request_id": spec.request_id, "attempt": spec.attempt, "router_id": spec.router_id}
        if self.refuse_code is not None:
            await self._tell(
                spec, RequestRefused(**who, code=self.refuse_code, message="refused by the test", retry_after_s=7)
            )
            return
        await self._tell(spec, RequestAccepted(**who))
        if not known:
            assert self._tasks is not None
            self._tasks.spawn(self._generate(spec), name=f"generate {spec.request_id}")

    async def _generate(self, spec: RequestSpec) -> None:
        for i in range(spec.max_tokens):
            index = spec.generated_before + i
            if self.hold is not None and index >= self.hold_after:
                await self.hold.wait()
            if spec.request_id in self.cancelled:
                return
            if self.interrupt_at.get(spec.attempt) == index:
                await self._tell(spec, self.interruption(spec))
                return
            token_id = self.answer_ids[index % len(self.answer_ids) if self.endless else index]
            end = token_id in spec.stop_token_ids
            finish = "stop" if end else "length" if i + 1 == spec.max_tokens else None
            if not self.lose(spec.attempt, index):
                await self.send_tokens(spec, index, [token_id], finish)
            await asyncio.sleep(0)
            if end:
                return

    async def send_tokens(self, spec: RequestSpec, index: int, token_ids: list[int], finish: Any = None) -> None:
        logprobs: tuple[TokenLogprob, ...] = ()
        if spec.sampling.logprobs is not None:
            top = tuple((t, -1.0 - t) for t in range(60, 60 + spec.sampling.logprobs))
            logprobs = tuple(TokenLogprob(logprob=-0.5, top=top) for _ in token_ids)
        chunk = TokenChunk(
            request_id=spec.request_id,
            attempt=spec.attempt,
            index=index,
            token_ids=tuple(token_ids),
            logprobs=logprobs,
            finish_reason=finish,
        )
        await self._tell(spec, TokensGenerated(worker_id=WorkerId("w"), router_id=spec.router_id, chunks=(chunk,)))

    def interruption(self, spec: RequestSpec) -> RequestInterrupted:
        return RequestInterrupted(
            request_id=spec.request_id, attempt=spec.attempt, router_id=spec.router_id, reason="its worker is lost"
        )

    async def _tell(self, spec: RequestSpec, message: Any) -> None:
        await self.bus.publish(subjects.router(spec.router_id), wire.encode(message))

    async def _asked(self, delivery: Delivery) -> None:
        if self.deaf or delivery.reply is None:
            return
        question = wire.decode(delivery.data, DescribeCluster | TellStory)
        if isinstance(question, TellStory):
            known = any(s.request_id == question.request_id for s in self.submitted)
            answer: Any = StoryTold(request_id=question.request_id, lines=("submitted",) if known else ())
        else:
            answer = self._view()
        await self.bus.publish(delivery.reply, wire.encode(answer))

    def _view(self) -> ClusterView:
        workers = tuple(
            WorkerView(profile=_profile(role, i), requests=(), queued_tokens=0, kv_reserved_tokens=0, silent_s=0.0)
            for i, role in enumerate(self.profiles)
        )
        return ClusterView(
            policy="pecsched",
            workers=workers,
            routers=(),
            coordinator_present=True,
            queued_shorts=0,
            queued_longs=0,
            queued_tokens=0,
            requests=(),
            counters={"finished": 1},
        )


def _profile(role: Any, number: int) -> WorkerProfile:
    return WorkerProfile(
        worker_id=WorkerId(f"{role}-{number}"),
        role=role,
        incarnation="1",
        node="n",
        replica="r",
        model_id=NAME,
        model_fingerprint="f",
        layers=1,
        kv_bytes_per_token=1,
        kv_capacity_tokens=1,
        context_tokens=CONTEXT,
        data_address="127.0.0.1:1",
        step_cost=StepCost(pass_s=0, token_s=0, pair_s=0),
    )


class World:
    """A router, its HTTP client, and the cluster behind it."""

    def __init__(self, router: Router, cluster: FakeCluster, http: httpx.AsyncClient, broker: MemoryBroker) -> None:
        self.router = router
        self.cluster = cluster
        self.http = http
        self.broker = broker

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)


@asynccontextmanager
async def world(
    *, answer: str = "Paris, on the Seine.", tracer: Tracer | None = None, **settings: Any
) -> AsyncIterator[World]:
    broker, store = MemoryBroker(), MemoryStore()
    buses = [MemoryBus(broker, "router"), MemoryBus(broker, "cluster")]
    cluster = FakeCluster(buses[1], store, answer)
    settings = {"drain_s": 0.05, "late_s": 0.0, **settings}
    router = Router(RouterSettings(**settings), buses[0], store, tiny_text(), tracer=tracer)
    transport = httpx.ASGITransport(create_app(router), raise_app_exceptions=False)
    async with Supervisor() as tasks, httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        await cluster.serve(tasks)
        running = tasks.spawn(router.run(), name="router")
        await router.started()
        yield World(router, cluster, http, broker)
        router.stop()
        await running
        assert not router._desk, "a request was left in hand"
        assert not router._tickets
        assert not router._prompts or all(i not in router._desk for i in router._prompts)
    for bus in buses:
        await bus.close()


def events_of(stream: str) -> list[Any]:
    """Data of every server-sent event; the last one must be [DONE]."""
    parts = [part.removeprefix("data: ") for part in stream.split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [msgspec.json.decode(part) for part in parts[:-1]]
