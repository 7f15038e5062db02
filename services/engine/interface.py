"""What a worker asks of an engine. Two implementations: torch (`torch_prefill.py`, `torch_decode.py`) and one that
answers at the speed of a cost model and needs no GPU (`timed_prefill.py`, `timed_decode.py`); one contract suite for
both.

A *pass* is one ragged batch of new tokens through all layers. A *step* is one layer of one pass: the
smallest piece of work, never interrupted. A pass can be stopped between two steps and continued there
later; its hidden state and the KV of the layers done are kept, nothing is computed twice.

A sequence may be *shared*: computed by a group of workers, each with a part of its tokens (or heads) and of its KV.
Rank 0 runs passes of it as of any other; the others are called to them (`collectives.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.messages.cluster import ExchangeCost, LayerShape, StepCost
from common.messages.locations import MovedTo
from common.messages.requests import RequestSpec, TokenLogprob
from common.units import RequestId, TokenId

if TYPE_CHECKING:
    from services.engine.collectives import GroupShare, OnCalled


class EngineError(Exception):
    """The engine could not do what it was asked; the sequences named in the call are in doubt."""


class KvFull(EngineError):
    """No room for the KV of this sequence."""


class SpillRefused(EngineError):
    """The KV of this sequence was not moved: it is where it was."""


class MoveStopped(EngineError):
    """Its KV was being brought back, and `stop_move` ended that."""


@dataclass(frozen=True, slots=True)
class Spilled:
    kv_bytes: int
    """What was moved: of the tokens computed so far."""
    moved_to: MovedTo


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What the engine says of itself; constant."""

    model_id: str
    model_fingerprint: str
    layers: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    context_tokens: int
    rows_max: int
    step_cost: StepCost
    layer: LayerShape | None = None
    """As in `WorkerProfile`, like the next three."""
    exchange: ExchangeCost | None = None
    core_share: float = 0.0
    spill_bytes_max: int = 0


@dataclass(frozen=True, slots=True)
class LayerKv:
    """Keys and values of one layer for tokens [start, start + tokens) of one sequence, ready to be sent.

    `buffers`: contiguous byte views in wire order: the keys of KV head 0, 1, …, then the values of KV
    head 0, 1, …; each [tokens, head_dim] in the model's dtype. Valid until the sequence is closed.
    """

    layer: int
    start: int
    tokens: int
    buffers: tuple[memoryview, ...]


KvSink = Callable[[LayerKv], None]
"""Called on the event loop's thread, in layer order, as soon as a layer of a pass is computed."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens [start, start + tokens) of one sequence, as part of a pass. All before `start` must have
    been computed. A decode row is a segment of one token: the last one sampled."""

    request_id: RequestId
    start: int
    tokens: int
    sample: bool
    """Draw a token from the logits of the segment's last position."""
    gathers: bool = False
    """Of a ring's chunk: when it is done, rank 0 has the KV of all, and computes the sequence alone."""


@dataclass(frozen=True, slots=True)
class Sampled:
    request_id: RequestId
    token_id: TokenId
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """A shared sequence whose group broke in a pass that had others in it too."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class PassResult:
    finished: bool
    """False: stopped between two steps; `resume` continues it."""
    steps_done: int
    """Of this pass, counted from its start (0 … layers)."""
    sampled: tuple[Sampled, ...]
    """In segment order; empty unless finished."""
    compute_s: float
    """Time spent computing in this call."""
    last_layer_computed_s: float
    """Monotonic clock at the end of the last step run."""
    broken_off: BrokenOff | None = None
    """The pass went on without this sequence: nothing of it was drawn, and nothing can be computed of it any more."""


class PrefillEngine(Protocol):
    """Runs passes over sequences it holds: short prefills, chunks of long ones, decode rows of longs.

    One pass runs at a time; several may be stopped in the middle. All methods are called on the event
    loop's thread; the computing happens elsewhere.
    """

    @property
    def profile(self) -> EngineProfile: ...

    @property
    def kv_used_tokens(self) -> int:
        """KV reserved by open sequences; exact."""
        ...

    def open(self, spec: RequestSpec, token_ids: Sequence[int], sink: KvSink | None) -> None:
        """Reserve KV for the whole sequence (with a sink, the prompt's alone: it decodes elsewhere).
        Raises: KvFull, EngineError (already open, token id out of the vocabulary)."""
        ...

    def open_share(self, spec: RequestSpec, token_ids: Sequence[int], share: GroupShare, on_called: OnCalled) -> None:
        """`open` for one rank of a group; the link is the engine's from now on, until `close`. Reserves this rank's
        part of the KV.

        Rank 0 runs the whole chunk (or the row of one token drawn) as a segment, and draws. A follower runs the same
        segment with `sample` false when `on_called` says so; it draws nothing and need not know what was drawn. At
        most one shared sequence may be in a pass. `stop` is rank 0's alone: all ranks then stop after the same step;
        on a follower it does nothing to a pass with a shared sequence. If the group breaks, `run` and `resume` raise
        GroupBroken, an EngineError; where other sequences are in the pass, it goes on with these, to its end, and says
        so (`PassResult.broken_off`). After a segment that gathers it is a sequence like any other on rank 0, which must
        have reserved all KV (`GroupScheme.gathers`), and the others are not called again.
        Raises: KvFull, EngineError (as `open`; the link is then still the caller's)."""
        ...

    def regroup(self, request_id: RequestId, share: GroupShare, on_called: OnCalled) -> None:
        """A larger group computes this sequence from now on, of which the first `share.base` tokens are computed; the
        link is the engine's from now on, and that of the former group is closed. KV stays where it is, and what is
        reserved for it. Of a newcomer, opened by `open_share` with this very link: it begins there.
        Raises: EngineError (not open, or in a pass; the link is then still the caller's)."""
        ...

    async def run(self, segments: Sequence[Segment], *, background: bool = False) -> PassResult:
        """Start a pass and run it to its end or until `stop`. `background`: on a shared processor it yields to
        shorter work. Raises: EngineError."""
        ...

    async def resume(self, request_id: RequestId) -> PassResult:
        """Continue the stopped pass that contains this sequence. Raises: EngineError."""
        ...

    def stop(self) -> None:
        """Let the running pass end after the step it is in; does nothing when none runs."""
        ...

    def close(self, request_id: RequestId) -> None:
        """Free the sequence's KV and forget any stopped pass of its own. Idempotent. Must not be called
        while a pass containing it runs: stop it and await its return first. Of a shared sequence the link is
        closed too, which breaks the group."""
        ...

    async def spill(self, request_id: RequestId) -> Spilled:
        """Move the KV of a sequence that is in no running pass elsewhere, and free its places; a stopped pass of its
        own is kept. Passes of other sequences run on meanwhile. Until `restore` it can be in no pass. Raises:
        SpillRefused, EngineError (not open, in the running pass or in one with others, elsewhere already)."""
        ...

    async def restore(self, request_id: RequestId) -> None:
        """Reserve its KV again and bring it back; it goes on where it stood. Raises: KvFull (it is still elsewhere),
        MoveStopped, EngineError (it is not elsewhere; or its KV is lost: close it)."""
        ...

    def stop_move(self, request_id: RequestId) -> None:
        """Let a running `spill` or `restore` of it end soon, in SpillRefused or MoveStopped unless it was done. Until
        it has ended the sequence must not be closed."""
        ...

    async def shutdown(self) -> None: ...


class DecodeEngine(Protocol):
    """Continuous batching of sequences whose KV arrives from elsewhere. Threads as in `PrefillEngine`."""

    @property
    def profile(self) -> EngineProfile: ...

    @property
    def kv_used_tokens(self) -> int: ...

    def reserve(self, spec: RequestSpec) -> None:
        """Reserve KV for prompt and new tokens. Raises: KvFull, EngineError (already there)."""
        ...

    def layer_buffers(self, request_id: RequestId, layer: int, start: int, tokens: int) -> tuple[memoryview, ...]:
        """Writable views of the cache itself, in the order and shapes of `LayerKv.buffers`, to receive into."""
        ...

    def activate(self, request_id: RequestId, first_token: TokenId) -> None:
        """The prompt's KV is complete and verified; the next step of this sequence feeds `first_token`."""
        ...

    @property
    def core_wait_s(self) -> float:
        """How long the last step was ready to run and had no core, as others had them; 0.0 where nobody can tell."""
        ...

    async def step(self, request_ids: Sequence[RequestId]) -> tuple[Sampled, ...]:
        """One token for each of these active sequences, in this order. Raises: EngineError."""
        ...

    def release(self, request_id: RequestId) -> None:
        """Free its KV. Idempotent. Must not be called while a step containing it runs."""
        ...

    async def shutdown(self) -> None: ...
