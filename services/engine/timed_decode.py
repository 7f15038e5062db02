"""A decode engine that continues at the speed of a cost model; see `timed_language.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.messages.requests import RequestSpec
from common.units import RequestId, TokenId
from services.engine.interface import EngineError, EngineProfile, KvFull, Sampled
from services.engine.timed_language import (
    STATE_BYTES,
    WORD,
    TimedShape,
    chain,
    mask_of,
    masked,
    now_s,
    sampled_token,
    sleep_until,
)


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
        self.core_wait_s = 0.0
        """It computes nothing, so it waits for no core."""
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
        step_s = self._step_s(rows)
        try:
            if step_s > 0.0:
                await sleep_until(now_s() + step_s)
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
        drawn = sampled_token(row.spec, row.spec.generated_before + row.generated, row.state, self.shape)
        row.pending = drawn.token_id
        row.generated += 1
        return drawn

    def _state_in(self, row: _Row) -> int:
        """The context's state, if all layers and heads tell the same; otherwise one that no context has."""
        told = {
            masked(bytes(buffer), mask_of(layer, number))
            for layer, buffers in enumerate(row.buffers)
            for number, buffer in enumerate(buffers)
        }
        state = int.from_bytes(min(told)[-STATE_BYTES:], "little")
        return state if len(told) == 1 else state ^ WORD

    def _step_s(self, rows: Sequence[_Row]) -> float:
        cost = self.shape.step_cost
        past = sum(row.spec.prompt.tokens + row.generated for row in rows)
        return cost.pass_s + cost.token_s * len(rows) + cost.pair_s * past

    def _row(self, request_id: RequestId) -> _Row:
        row = self._rows.get(request_id)
        if row is None:
            raise EngineError(f"{request_id} has no KV here")
        return row
