"""Engines that answer at the speed of a cost model and need neither weights nor torch.

They keep every promise of `interface.py` that a worker can see: time per step, exact KV accounting, KV
bytes that mean something, passes that stop between steps and go on there. Only the language is made up:
the next token is a hash of the whole context. A running 64-bit state is chained over all token ids, and the
KV of a token is that state after it (masked differently in every layer and head), so

- a request served again from its prompt and the tokens already delivered continues as it would have;
- a decode engine knows nothing but the KV it received: corrupt or missing KV gives wrong tokens.

`expected_tokens` says what a prompt must yield.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.messages.cluster import StepCost
from common.messages.requests import RequestSpec, TokenLogprob
from common.settings import DecodeWorkerSettings, PrefillWorkerSettings
from common.units import RequestId, TokenId
from services.engine.interface import (
    EngineError,
    EngineProfile,
    KvFull,
    KvSink,
    LayerKv,
    PassResult,
    Sampled,
    Segment,
)

STATE_BYTES = 8
PASS_ROWS_MAX = 64
"""Segments in one pass of a prefill engine."""
_WORD = (1 << 64) - 1
_MULTIPLIER = 6364136223846793005  # Knuth's MMIX: full period modulo 2**64
_START = 0x9E3779B97F4A7C15

CPU_STEP_COST = StepCost(pass_s=0.050, token_s=0.42e-3, pair_s=2.0e-7)
"""About a 135M-parameter model in bf16 on one core."""


@dataclass(frozen=True, slots=True)
class TimedShape:
    """What the engine pretends to be. Defaults: the embedded model's vocabulary and speed, tiny KV."""

    step_cost: StepCost = CPU_STEP_COST
    layers: int = 30
    kv_heads: int = 1
    kv_capacity_tokens: int = 32_768
    context_tokens: int = 8_192
    vocab: int = 49_152
    rows_max: int = 32
    model_id: str = "timed"
    stop_at_index: int | None = None
    """Emit the request's first stop token id at this output index (counted over all attempts); None: never."""
    fail_at_pass: int | None = None
    """The pass (decode: step) with this number, counted from 0, raises EngineError halfway; None: none does."""

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * 2 * STATE_BYTES

    def profile(self, rows_max: int) -> EngineProfile:
        return EngineProfile(
            model_id=self.model_id,
            model_fingerprint=f"timed-{self.layers}x{self.kv_heads}-{self.vocab}",
            layers=self.layers,
            kv_bytes_per_token=self.kv_bytes_per_token,
            kv_capacity_tokens=self.kv_capacity_tokens,
            context_tokens=self.context_tokens,
            rows_max=rows_max,
            step_cost=self.step_cost,
        )


# --- the made-up language ------------------------------------------------------------------------


def chain(state: int, token_id: int) -> int:
    """The state after one more token."""
    return ((state ^ token_id) * _MULTIPLIER + _START) & _WORD


def next_token(state: int, vocab: int, stop_token_ids: Sequence[int] = ()) -> TokenId:
    """The token that follows a context with this state; never a stop token."""
    mixed = state ^ (state >> 31)
    mixed = (mixed * 0x94D049BB133111EB) & _WORD
    token = (mixed >> 17) % vocab
    while token in stop_token_ids:
        token = (token + 1) % vocab
    return token


def expected_tokens(
    prompt_ids: Sequence[int], count: int, vocab: int, stop_token_ids: Sequence[int] = ()
) -> list[TokenId]:
    """The `count` tokens that a timed engine generates after this prompt."""
    state = _START
    for token_id in prompt_ids:
        state = chain(state, token_id)
    tokens: list[TokenId] = []
    for _ in range(count):
        tokens.append(next_token(state, vocab, stop_token_ids))
        state = chain(state, tokens[-1])
    return tokens


def _mask(layer: int, buffer: int) -> int:
    return chain(chain(_START, layer), buffer)


def _masked(states: bytes, mask: int) -> bytes:
    """XOR every 8-byte word with `mask`; its own inverse."""
    words = len(states) // STATE_BYTES
    pattern = mask.to_bytes(STATE_BYTES, "little") * words
    mixed = int.from_bytes(states, "little") ^ int.from_bytes(pattern, "little")
    return mixed.to_bytes(len(states), "little")


def _sampled(spec: RequestSpec, index: int, state: int, shape: TimedShape) -> Sampled:
    """Output token number `index` (over all attempts) of a request whose context has this state."""
    if index == shape.stop_at_index and spec.stop_token_ids:
        token = spec.stop_token_ids[0]
    else:
        token = next_token(state, shape.vocab, spec.stop_token_ids)
    return Sampled(request_id=spec.request_id, token_id=token, logprob=_logprob(spec, token, shape))


def _logprob(spec: RequestSpec, token: TokenId, shape: TimedShape) -> TokenLogprob | None:
    top = spec.sampling.logprobs
    if top is None:
        return None
    likeliest = tuple(((token + rank) % shape.vocab, -0.5 - rank) for rank in range(min(top, shape.vocab)))
    return TokenLogprob(logprob=-0.5, top=likeliest)


async def _sleep_until(at_s: float) -> None:
    """Also yields when the time has passed: a stop asked for meanwhile must be heard between steps."""
    await asyncio.sleep(max(0.0, at_s - asyncio.get_running_loop().time()))


def _now_s() -> float:
    return asyncio.get_running_loop().time()


# --- prefill -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Sequence:
    spec: RequestSpec
    token_ids: list[int]
    """The prompt, then what was sampled."""
    sink: KvSink | None
    kv_reserved: int
    computed: int = 0
    state: int = _START
    buffers: list[list[bytearray]] = field(default_factory=list)
    """[layers][2 * kv_heads] of [prompt tokens * STATE_BYTES]; empty without a sink: nobody reads them."""


@dataclass(slots=True, eq=False)
class _Pass:
    segments: list[Segment]
    step_s: float
    states: dict[RequestId, bytes]
    """Of each segment: its tokens' states, as KV carries them."""
    fails: bool
    steps_done: int = 0


class TimedPrefillEngine:
    """A `PrefillEngine` whose steps take the time that `StepCost` names."""

    def __init__(self, shape: TimedShape) -> None:
        self.shape = shape
        self.computed_tokens: Counter[tuple[RequestId, int]] = Counter()
        """For tests: how often each (request, position) went through a whole pass."""
        self.passes_started = 0
        self.stops = 0
        self._profile = shape.profile(rows_max=PASS_ROWS_MAX)
        self._sequences: dict[RequestId, _Sequence] = {}
        self._stopped: list[_Pass] = []
        self._running: _Pass | None = None
        self._stop_asked = False

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    @property
    def kv_used_tokens(self) -> int:
        return sum(sequence.kv_reserved for sequence in self._sequences.values())

    def open(self, spec: RequestSpec, token_ids: Sequence[int], sink: KvSink | None) -> None:
        _require_valid(spec, token_ids, self.shape, already=spec.request_id in self._sequences)
        need = len(token_ids) if sink is not None else spec.kv_tokens
        if self.kv_used_tokens + need > self.shape.kv_capacity_tokens:
            raise KvFull(f"{spec.request_id} needs {need} tokens of KV; {self.kv_used_tokens} are in use")
        sequence = _Sequence(spec=spec, token_ids=list(token_ids), sink=sink, kv_reserved=need)
        if sink is not None:
            size = len(token_ids) * STATE_BYTES
            heads = range(2 * self.shape.kv_heads)
            sequence.buffers = [[bytearray(size) for _ in heads] for _ in range(self.shape.layers)]
        self._sequences[spec.request_id] = sequence

    async def run(self, segments: Sequence[Segment], *, background: bool = False) -> PassResult:
        self._require_idle()
        for segment in segments:
            self._require_runnable(segment)
        if not segments or len({segment.request_id for segment in segments}) != len(segments):
            raise EngineError("a pass takes one segment of each of one or more sequences")
        if len(segments) > PASS_ROWS_MAX:
            raise EngineError(f"a pass of {len(segments)} segments; at most {PASS_ROWS_MAX} are allowed")
        fails = self.passes_started == self.shape.fail_at_pass
        self.passes_started += 1
        started = _Pass(
            segments=list(segments),
            step_s=self._pass_s(segments) / self.shape.layers,
            states={segment.request_id: self._states_of(segment) for segment in segments},
            fails=fails,
        )
        return await self._advance(started)

    async def resume(self, request_id: RequestId) -> PassResult:
        self._require_idle()
        stopped = self._stopped_with(request_id)
        if stopped is None:
            raise EngineError(f"no stopped pass contains {request_id}")
        self._stopped.remove(stopped)
        return await self._advance(stopped)

    def stop(self) -> None:
        if self._running is not None:
            self._stop_asked = True

    def close(self, request_id: RequestId) -> None:
        running = self._running
        if running is not None and any(segment.request_id == request_id for segment in running.segments):
            raise EngineError(f"a pass with {request_id} runs")
        self._sequences.pop(request_id, None)
        stopped = self._stopped_with(request_id)
        if stopped is not None:
            stopped.segments = [segment for segment in stopped.segments if segment.request_id != request_id]
            if not stopped.segments:
                self._stopped.remove(stopped)

    async def shutdown(self) -> None:
        self.stop()

    # --- inside ---

    async def _advance(self, work: _Pass) -> PassResult:
        begun_s = at_s = _now_s()
        self._running, self._stop_asked = work, False
        try:
            while work.steps_done < self.shape.layers:
                at_s += work.step_s
                await _sleep_until(at_s)
                if work.fails and work.steps_done >= self.shape.layers // 2:
                    raise EngineError("failed as it was told to")
                self._emit_layer(work, work.steps_done)
                work.steps_done += 1
                if self._stop_asked and work.steps_done < self.shape.layers:
                    return self._stop_here(work, begun_s)
            return PassResult(
                finished=True,
                steps_done=work.steps_done,
                sampled=self._finish(work),
                compute_s=_now_s() - begun_s,
                last_layer_computed_s=_now_s(),
            )
        finally:
            self._running = None

    def _stop_here(self, work: _Pass, begun_s: float) -> PassResult:
        self.stops += 1
        self._stopped.append(work)
        now_s = _now_s()
        return PassResult(
            finished=False,
            steps_done=work.steps_done,
            sampled=(),
            compute_s=now_s - begun_s,
            last_layer_computed_s=now_s,
        )

    def _emit_layer(self, work: _Pass, layer: int) -> None:
        for segment in work.segments:
            sequence = self._sequences[segment.request_id]
            if sequence.sink is None:
                continue
            begin, end = segment.start * STATE_BYTES, (segment.start + segment.tokens) * STATE_BYTES
            states = work.states[segment.request_id]
            for number, buffer in enumerate(sequence.buffers[layer]):
                buffer[begin:end] = _masked(states, _mask(layer, number))
            views = tuple(memoryview(buffer)[begin:end] for buffer in sequence.buffers[layer])
            sequence.sink(LayerKv(layer=layer, start=segment.start, tokens=segment.tokens, buffers=views))

    def _finish(self, work: _Pass) -> tuple[Sampled, ...]:
        sampled: list[Sampled] = []
        for segment in work.segments:
            sequence = self._sequences[segment.request_id]
            sequence.computed = segment.start + segment.tokens
            sequence.state = int.from_bytes(work.states[segment.request_id][-STATE_BYTES:], "little")
            for position in range(segment.start, sequence.computed):
                self.computed_tokens[segment.request_id, position] += 1
            if segment.sample:
                index = sequence.spec.generated_before + len(sequence.token_ids) - sequence.spec.prompt.tokens
                drawn = _sampled(sequence.spec, index, sequence.state, self.shape)
                sequence.token_ids.append(drawn.token_id)
                sampled.append(drawn)
        return tuple(sampled)

    def _states_of(self, segment: Segment) -> bytes:
        sequence = self._sequences[segment.request_id]
        state, states = sequence.state, array("Q")
        for token_id in sequence.token_ids[segment.start : segment.start + segment.tokens]:
            state = chain(state, token_id)
            states.append(state)
        return states.tobytes()

    def _pass_s(self, segments: Sequence[Segment]) -> float:
        cost = self.shape.step_cost
        own_s = (
            cost.token_s * segment.tokens + cost.pair_s * segment.tokens * (segment.start + segment.tokens / 2)
            for segment in segments
        )
        return cost.pass_s + sum(own_s)

    def _stopped_with(self, request_id: RequestId) -> _Pass | None:
        for stopped in self._stopped:
            if any(segment.request_id == request_id for segment in stopped.segments):
                return stopped
        return None

    def _require_idle(self) -> None:
        if self._running is not None:
            raise EngineError("a pass runs already")

    def _require_runnable(self, segment: Segment) -> None:
        sequence = self._sequences.get(segment.request_id)
        if sequence is None:
            raise EngineError(f"{segment.request_id} is not open")
        if self._stopped_with(segment.request_id) is not None:
            raise EngineError(f"{segment.request_id} stands in a stopped pass: resume it")
        end = segment.start + segment.tokens
        if segment.tokens < 1 or segment.start != sequence.computed or end > len(sequence.token_ids):
            raise EngineError(
                f"{segment.request_id}: [{segment.start}, {end}) does not follow the {sequence.computed} computed"
                f" of {len(sequence.token_ids)} known tokens"
            )


# --- decode --------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Row:
    spec: RequestSpec
    buffers: list[list[bytearray]]
    """[layers][2 * kv_heads] of [prompt tokens * STATE_BYTES]"""
    state: int = 0
    pending: TokenId | None = None
    """What the next step feeds; None: not active yet."""
    generated: int = 1
    """The first token counts."""


class TimedDecodeEngine:
    """A `DecodeEngine` that continues from the states it finds in the KV it was given."""

    def __init__(self, shape: TimedShape) -> None:
        self.shape = shape
        self.steps_started = 0
        self._profile = shape.profile(rows_max=shape.rows_max)
        self._rows: dict[RequestId, _Row] = {}
        self._in_step: frozenset[RequestId] = frozenset()

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    @property
    def kv_used_tokens(self) -> int:
        return sum(row.spec.kv_tokens for row in self._rows.values())

    def reserve(self, spec: RequestSpec) -> None:
        if spec.request_id in self._rows:
            raise EngineError(f"{spec.request_id} is there already")
        if len(self._rows) >= self.shape.rows_max:
            raise KvFull(f"all {self.shape.rows_max} rows are taken")
        if self.kv_used_tokens + spec.kv_tokens > self.shape.kv_capacity_tokens:
            raise KvFull(f"{spec.request_id} needs {spec.kv_tokens} tokens of KV; {self.kv_used_tokens} are in use")
        size = spec.prompt.tokens * STATE_BYTES
        heads = range(2 * self.shape.kv_heads)
        buffers = [[bytearray(size) for _ in heads] for _ in range(self.shape.layers)]
        self._rows[spec.request_id] = _Row(spec=spec, buffers=buffers)

    def layer_buffers(self, request_id: RequestId, layer: int, start: int, tokens: int) -> tuple[memoryview, ...]:
        row = self._row(request_id)
        if not 0 <= layer < self.shape.layers or not 0 <= start < start + tokens <= row.spec.prompt.tokens:
            raise EngineError(f"{request_id}: layer {layer} tokens [{start}, {start + tokens}) are not in its cache")
        begin, end = start * STATE_BYTES, (start + tokens) * STATE_BYTES
        return tuple(memoryview(buffer)[begin:end] for buffer in row.buffers[layer])

    def activate(self, request_id: RequestId, first_token: TokenId) -> None:
        row = self._row(request_id)
        if row.pending is not None:
            raise EngineError(f"{request_id} is active already")
        row.state, row.pending = self._state_in(row), first_token

    async def step(self, request_ids: Sequence[RequestId]) -> tuple[Sampled, ...]:
        if self._in_step:
            raise EngineError("a step runs already")
        rows = [self._row(request_id) for request_id in request_ids]
        if not rows or len(set(request_ids)) != len(rows) or any(row.pending is None for row in rows):
            raise EngineError("a step takes each of one or more active sequences once")
        fails = self.steps_started == self.shape.fail_at_pass
        self.steps_started += 1
        self._in_step = frozenset(request_ids)
        try:
            await _sleep_until(_now_s() + self._step_s(rows))
        finally:
            self._in_step = frozenset()
        if fails:
            raise EngineError("failed as it was told to")
        return tuple(self._advance(row) for row in rows)

    def release(self, request_id: RequestId) -> None:
        if request_id in self._in_step:
            raise EngineError(f"a step with {request_id} runs")
        self._rows.pop(request_id, None)

    async def shutdown(self) -> None:
        return

    def _advance(self, row: _Row) -> Sampled:
        assert row.pending is not None  # checked at the start of the step
        row.state = chain(row.state, row.pending)
        drawn = _sampled(row.spec, row.spec.generated_before + row.generated, row.state, self.shape)
        row.pending = drawn.token_id
        row.generated += 1
        return drawn

    def _state_in(self, row: _Row) -> int:
        """The context's state, if all layers and heads tell the same; otherwise one that no context has."""
        told = {
            _masked(bytes(buffer), _mask(layer, number))
            for layer, buffers in enumerate(row.buffers)
            for number, buffer in enumerate(buffers)
        }
        state = int.from_bytes(min(told)[-STATE_BYTES:], "little")
        return state if len(told) == 1 else state ^ _WORD

    def _step_s(self, rows: Sequence[_Row]) -> float:
        cost = self.shape.step_cost
        past = sum(row.spec.prompt.tokens + row.generated for row in rows)
        return cost.pass_s + cost.token_s * len(rows) + cost.pair_s * past

    def _row(self, request_id: RequestId) -> _Row:
        row = self._rows.get(request_id)
        if row is None:
            raise EngineError(f"{request_id} has no KV here")
        return row


def _require_valid(spec: RequestSpec, token_ids: Sequence[int], shape: TimedShape, *, already: bool) -> None:
    if already:
        raise EngineError(f"{spec.request_id} is open already")
    if len(token_ids) != spec.prompt.tokens or not token_ids:
        raise EngineError(f"{spec.request_id}: {len(token_ids)} token ids for a prompt of {spec.prompt.tokens}")
    if min(token_ids) < 0 or max(token_ids) >= shape.vocab:
        raise EngineError(f"{spec.request_id}: a token id is out of the vocabulary of {shape.vocab}")


def make_timed_prefill_engine(settings: PrefillWorkerSettings) -> TimedPrefillEngine:
    return TimedPrefillEngine(TimedShape(model_id=settings.model, kv_capacity_tokens=settings.kv_capacity_tokens))


def make_timed_decode_engine(settings: DecodeWorkerSettings) -> TimedDecodeEngine:
    return TimedDecodeEngine(
        TimedShape(model_id=settings.model, kv_capacity_tokens=settings.kv_capacity_tokens, rows_max=settings.rows_max)
    )
