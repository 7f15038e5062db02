"""Engines that answer at the speed of a cost model and need neither weights nor torch (`timed_prefill.py`,
`timed_decode.py`): their language, and what they pretend to be.

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
from collections.abc import Sequence
from dataclasses import dataclass

from common.messages.cluster import ExchangeCost, LayerShape, StepCost
from common.messages.locations import MovedTo
from common.messages.requests import RequestSpec, TokenLogprob
from common.units import TokenId
from services.engine.interface import EngineError, EngineProfile, Sampled

STATE_BYTES = 8
WORD = (1 << 64) - 1
_MULTIPLIER = 6364136223846793005  # Knuth's MMIX: full period modulo 2**64
START = 0x9E3779B97F4A7C15
"""The state of an empty context."""

CPU_STEP_COST = StepCost(pass_s=0.050, token_s=0.42e-3, pair_s=2.0e-7)
"""About a 135M-parameter model in bf16 on one core."""


@dataclass(frozen=True, slots=True)
class TimedShape:
    """What the engine pretends to be. Defaults: the embedded model's vocabulary and speed, tiny KV."""

    step_cost: StepCost = CPU_STEP_COST
    layers: int = 30
    query_heads: int = 1
    kv_heads: int = 1
    kv_capacity_tokens: int = 32_768
    context_tokens: int = 8_192
    vocab: int = 49_152
    rows_max: int = 32
    model_id: str = "timed"
    exchange: ExchangeCost | None = None
    """What it says that swapping tensors with others costs; it swaps none. None: nothing."""
    stop_at_index: int | None = None
    """Emit the request's first stop token id at this output index (counted over all attempts); None: never."""
    spill_bytes_max: int = 2**30
    """0: it moves no KV elsewhere."""
    spill_bytes_s: float = 2e9
    spill_to: MovedTo = "memory"
    fail_at_pass: int | None = None
    """The pass (decode: step) with this number, counted from 0, raises EngineError halfway; None: none does."""

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * 2 * STATE_BYTES

    @property
    def layer(self) -> LayerShape:
        """Widths of the embedded model, and the KV that there is here."""
        head_dim = STATE_BYTES // 2  # of two bytes each
        return LayerShape(
            query_heads=self.query_heads, kv_heads=self.kv_heads, head_dim=head_dim, hidden=576, intermediate=1536
        )

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
            layer=self.layer,
            exchange=self.exchange,
            spill_bytes_max=self.spill_bytes_max,
        )


def chain(state: int, token_id: int) -> int:
    """The state after one more token."""
    return ((state ^ token_id) * _MULTIPLIER + START) & WORD


def next_token(state: int, vocab: int, stop_token_ids: Sequence[int] = ()) -> TokenId:
    """The token that follows a context with this state; never a stop token."""
    mixed = state ^ (state >> 31)
    mixed = (mixed * 0x94D049BB133111EB) & WORD
    token = (mixed >> 17) % vocab
    while token in stop_token_ids:
        token = (token + 1) % vocab
    return token


def expected_tokens(
    prompt_ids: Sequence[int], count: int, vocab: int, stop_token_ids: Sequence[int] = ()
) -> list[TokenId]:
    """The `count` tokens that a timed engine generates after this prompt."""
    state = START
    for token_id in prompt_ids:
        state = chain(state, token_id)
    tokens: list[TokenId] = []
    for _ in range(count):
        tokens.append(next_token(state, vocab, stop_token_ids))
        state = chain(state, tokens[-1])
    return tokens


def mask_of(layer: int, buffer: int) -> int:
    return chain(chain(START, layer), buffer)


def masked(states: bytes, mask: int) -> bytes:
    """XOR every 8-byte word with `mask`; its own inverse."""
    words = len(states) // STATE_BYTES
    pattern = mask.to_bytes(STATE_BYTES, "little") * words
    mixed = int.from_bytes(states, "little") ^ int.from_bytes(pattern, "little")
    return mixed.to_bytes(len(states), "little")


def sampled_token(spec: RequestSpec, index: int, state: int, shape: TimedShape) -> Sampled:
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


async def sleep_until(at_s: float) -> None:
    """Also yields when the time has passed: a stop asked for meanwhile must be heard between steps."""
    await asyncio.sleep(max(0.0, at_s - asyncio.get_running_loop().time()))


def now_s() -> float:
    return asyncio.get_running_loop().time()


def require_valid(spec: RequestSpec, token_ids: Sequence[int], shape: TimedShape, *, already: bool) -> None:
    if already:
        raise EngineError(f"{spec.request_id} is open already")
    if len(token_ids) != spec.prompt.tokens or not token_ids:
        raise EngineError(f"{spec.request_id}: {len(token_ids)} token ids for a prompt of {spec.prompt.tokens}")
    if min(token_ids) < 0 or max(token_ids) >= shape.vocab:
        raise EngineError(f"{spec.request_id}: a token id is out of the vocabulary of {shape.vocab}")
