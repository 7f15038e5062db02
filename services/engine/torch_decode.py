"""`DecodeEngine` on torch: computes in its own thread, talks on the event loop's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages.cluster import StepCost
from common.messages.requests import RequestSpec, TokenLogprob
from common.model_files import model_name
from common.settings import DecodeWorkerSettings
from common.units import RequestId, TokenId
from services.engine.calibrate import compute_clock
from services.engine.compute_thread import compute_thread, core_wait_s
from services.engine.convert import ensure_model
from services.engine.decode import Decoder, DecodeRow
from services.engine.interface import DecodeEngine, EngineError, EngineProfile, KvFull, Sampled
from services.engine.kv_cache import KvShape
from services.engine.model import LoadedModel, load_model
from services.engine.sampler import sample
from services.engine.slots import UNIT_TOKENS, Slot, SlotKv, SlotPool

_ROWS, _PAST_TOKENS, _REPETITIONS = 8, 2048, 7
"""Sizes of the measurement at the start, where the capacity allows."""

_LEAST_S = 1e-12
"""Measured slopes below it are noise."""


@dataclass(slots=True, eq=False)
class _Sequence:
    spec: RequestSpec
    slot: Slot
    pending: TokenId | None = None
    """What the next step feeds; None: not active yet."""
    generated: int = 1
    """Tokens of this attempt, the first one counted."""
    finite: bool = False
    """Its last logits were numbers, and so is all of its KV."""

    @property
    def position(self) -> int:
        """Of the pending token."""
        return self.spec.prompt.tokens + self.generated - 1


class TorchDecodeEngine:
    """See `DecodeEngine`. Starts its thread at the first step."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        kv_capacity_tokens: int,
        rows_max: int,
        threads: int = 1,
        nice: int = 0,
        step_cost: StepCost | None = None,
    ) -> None:
        """Takes the weights out of `model`. Without a `step_cost` it is measured, which takes half a second
        for a small model on a CPU. Raises: EngineError (capacity too small)."""
        self._pool = SlotPool(kv_capacity_tokens)
        self._kv = SlotKv(KvShape(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device), self._pool)
        self._decoder = Decoder(model, self._kv)
        self._vocab = model.vocab
        self._sequences: dict[RequestId, _Sequence] = {}
        self._in_step: frozenset[RequestId] = frozenset()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = compute_thread("decode", threads, nice, model.device)
        self._core_wait_s = 0.0
        context_tokens = min(model.context_tokens, self._pool.largest_tokens)
        self._profile = EngineProfile(
            model_id=model.model_id,
            model_fingerprint=model.fingerprint,
            layers=model.layers,
            kv_bytes_per_token=model.kv_bytes_per_token,
            kv_capacity_tokens=self._pool.capacity_tokens,
            context_tokens=context_tokens,
            rows_max=rows_max,
            step_cost=step_cost or measure_step_cost(self._decoder, self._pool, context_tokens),
        )

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    @property
    def kv_used_tokens(self) -> int:
        """Of the slots reserved, which are powers of two: what is really taken from the capacity."""
        return self._pool.used_tokens

    @property
    def core_wait_s(self) -> float:
        return self._core_wait_s

    def reserve(self, spec: RequestSpec) -> None:
        name = spec.request_id
        if name in self._sequences:
            raise EngineError(f"request {name} is there already")
        if spec.prompt.tokens < 1 or spec.kv_tokens > self._profile.context_tokens:
            raise EngineError(
                f"request {name}: {spec.prompt.tokens} prompt and {spec.max_tokens} new tokens do not fit a context "
                f"of {self._profile.context_tokens}"
            )
        if len(self._sequences) >= self._profile.rows_max:
            raise KvFull(f"request {name}: all {self._profile.rows_max} rows are taken")
        self._sequences[name] = _Sequence(spec, self._pool.take(spec.kv_tokens))

    def layer_buffers(self, request_id: RequestId, layer: int, start: int, tokens: int) -> tuple[memoryview, ...]:
        """Raises: EngineError (unknown or active sequence, layer or tokens outside its prompt)."""
        sequence = self._held(request_id)
        if sequence.pending is not None:
            raise EngineError(f"request {request_id} is active: its KV is complete")
        end = start + tokens
        if not 0 <= layer < self._profile.layers or not 0 <= start < end <= sequence.spec.prompt.tokens:
            raise EngineError(f"request {request_id}: layer {layer}, tokens [{start}, {end}) are not of its prompt")
        return self._kv.buffers(sequence.slot, layer, start, tokens)

    def activate(self, request_id: RequestId, first_token: TokenId) -> None:
        """Raises: EngineError (unknown or active sequence, token out of the vocabulary)."""
        sequence = self._held(request_id)
        if sequence.pending is not None:
            raise EngineError(f"request {request_id} is active already")
        if not 0 <= first_token < self._vocab:
            raise EngineError(f"request {request_id}: token {first_token} is outside the vocabulary of {self._vocab}")
        self._kv.land(sequence.slot, sequence.spec.prompt.tokens)
        sequence.pending = first_token

    async def step(self, request_ids: Sequence[RequestId]) -> tuple[Sampled, ...]:
        """A caller that is cancelled leaves when the step is done: nothing computes without somebody waiting.
        The sequences have then advanced, and are as good as released."""
        sequences = self._runnable(request_ids)
        self._in_step = frozenset(request_ids)
        self._idle.clear()
        computing = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, sequences)
        try:
            await asyncio.wait([computing])
        except asyncio.CancelledError:
            await _ended(computing)
            raise
        finally:
            self._in_step = frozenset()
            self._idle.set()
        return computing.result()

    def release(self, request_id: RequestId) -> None:
        if request_id in self._in_step:
            raise EngineError(f"request {request_id} is being computed: await the step before releasing it")
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if not sequence.finite:
            self._kv.wipe(sequence.slot)
        self._pool.give_back(sequence.slot)

    async def shutdown(self) -> None:
        await self._idle.wait()
        for request_id in list(self._sequences):
            self.release(request_id)
        self._thread.shutdown()

    def _compute(self, sequences: Sequence[_Sequence]) -> tuple[Sampled, ...]:
        """In the compute thread."""
        waited_s = core_wait_s()
        for sequence in sequences:
            sequence.finite = False  # until it is known
        try:
            logits = self._decoder.step([_row(sequence) for sequence in sequences]).float()
            drawn = self._draw(sequences, logits)
        except Exception as error:
            raise EngineError(f"a decode step of {len(sequences)} sequences failed: {error}") from error
        for sequence, (token_id, _), finite in zip(sequences, drawn, _finite(logits), strict=True):
            sequence.pending, sequence.finite = token_id, finite
            sequence.generated += 1
        self._core_wait_s = core_wait_s() - waited_s
        return tuple(
            Sampled(sequence.spec.request_id, token_id, logprob)
            for sequence, (token_id, logprob) in zip(sequences, drawn, strict=True)
        )

    def _draw(self, sequences: Sequence[_Sequence], logits: Tensor) -> list[tuple[int, TokenLogprob | None]]:
        with torch.inference_mode():
            return sample(
                logits,
                [sequence.spec.sampling for sequence in sequences],
                [sequence.spec.generated_before + sequence.generated for sequence in sequences],
            )

    def _runnable(self, request_ids: Sequence[RequestId]) -> list[_Sequence]:
        """Raises: EngineError."""
        if self._in_step:
            raise EngineError("a step is running: one at a time")
        if not request_ids or len(set(request_ids)) < len(request_ids):
            raise EngineError("a step takes each of one or more sequences once")
        sequences = [self._held(request_id) for request_id in request_ids]
        for sequence in sequences:
            if sequence.pending is None:
                raise EngineError(f"request {sequence.spec.request_id} is not active")
            if sequence.position >= sequence.slot.tokens:
                raise EngineError(f"request {sequence.spec.request_id} has used up the KV it reserved")
        return sequences

    def _held(self, request_id: RequestId) -> _Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise EngineError(f"request {request_id} has no KV here")
        return sequence


def make_decode_engine(settings: DecodeWorkerSettings) -> DecodeEngine:
    """Load the model and measure it. Blocking, seconds. Raises: StartupError, EngineError."""
    torch.set_num_threads(settings.threads)
    folder = ensure_model(settings.model, settings.cache_dir)
    model = load_model(folder, dtype=settings.dtype, device=settings.device, model_id=model_name(settings.model))
    return TorchDecodeEngine(
        model,
        kv_capacity_tokens=settings.kv_capacity_tokens,
        rows_max=settings.rows_max,
        threads=settings.threads,
        nice=settings.decode_nice,
    )


def measure_step_cost(decoder: Decoder, pool: SlotPool, context_tokens: int) -> StepCost:
    """Time a step of one short row, of several, and of one long row, and solve for `StepCost`'s coefficients.
    Must be called while nothing else uses the decoder or the pool."""
    short, long = 1, max(2, min(_PAST_TOKENS, context_tokens - 1))
    several = max(1, min(_ROWS, pool.capacity_tokens // UNIT_TOKENS))
    sizes = ((1, short), (several, short), (1, long))
    # The least of each: what else happens on the machine can only add.
    rounds = [[_timed_step(decoder, pool, rows, past) for rows, past in sizes] for _ in range(_REPETITIONS)]
    one_s, several_s, long_s = (min(times) for times in zip(*rounds[1:], strict=True))
    pair_s = max(_LEAST_S, (long_s - one_s) / (long - short))
    token_s = max(_LEAST_S, (several_s - one_s) / max(1, several - 1) - pair_s * (short + 0.5))
    return StepCost(pass_s=max(_LEAST_S, one_s - token_s - pair_s * (short + 0.5)), token_s=token_s, pair_s=pair_s)


def _timed_step(decoder: Decoder, pool: SlotPool, rows: int, past: int) -> float:
    """Seconds of a step of `rows` rows with `past` tokens before each; sampling is not in it."""
    clock = compute_clock(decoder.device)
    slots = [pool.take(past + 1) for _ in range(rows)]
    begun = clock()
    decoder.step([DecodeRow(slot, past, 0) for slot in slots])[:, :1].cpu()  # the copy waits for the device
    seconds = clock() - begun
    for slot in slots:
        pool.give_back(slot)
    return seconds


def _row(sequence: _Sequence) -> DecodeRow:
    assert sequence.pending is not None  # checked before the step
    return DecodeRow(sequence.slot, sequence.position, sequence.pending)


def _finite(logits: Tensor) -> list[bool]:
    """Per row, whether all logits are numbers: a sum is not, once one of its terms is not."""
    return [bool(yes) for yes in torch.isfinite(logits.sum(-1)).tolist()]


async def _ended(computing: asyncio.Future[tuple[Sampled, ...]]) -> None:
    """Wait for the thread, one step long, whoever cancels meanwhile. The result is nobody's."""
    while not computing.done():
        try:
            await asyncio.wait([computing])
        except asyncio.CancelledError:
            continue
    if not computing.cancelled():
        computing.exception()
