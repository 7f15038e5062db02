"""`PrefillEngine` on torch: computes in its own threads, talks on the event loop's.

Two threads, of which one computes at a time: chunks of long prefills run at a lower priority of the
operating system (`long_nice`), so that on a shared CPU the decode workers and other prefill workers,
which serve shorts, go first. A stop takes effect between two steps; the loop thread only sets a flag.
A pass with a shared sequence runs in step with the same pass on other workers (`sequence_parallel.py`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import torch

from common.logs import get_logger
from common.messages.cluster import ExchangeCost, StepCost
from common.messages.groups import Announcement
from common.messages.requests import RequestSpec
from common.model_files import model_name
from common.policy.sp_shares import head_shares, kv_of_rank
from common.runtime.cores import usable_cores
from common.settings import PrefillWorkerSettings
from common.units import RequestId
from services.engine.batch import HeldSequence, pack
from services.engine.calibrate import measure_step_cost
from services.engine.calibrate_exchange import measure_exchange_cost
from services.engine.collectives import GroupBroken, GroupShare, OnCalled
from services.engine.compute_thread import compute_thread
from services.engine.convert import ensure_model
from services.engine.interface import (
    BrokenOff,
    EngineError,
    EngineProfile,
    KvSink,
    LayerKv,
    PassResult,
    PrefillEngine,
    Segment,
    Spilled,
    SpillRefused,
)
from services.engine.kv_cache import KvShape, KvStore
from services.engine.model import LoadedModel, load_model
from services.engine.prefill import PassRun
from services.engine.sequence_parallel import GroupPass
from services.engine.shared_sequence import SharedSequence
from services.engine.spill import KvMover, SpillLimits, spill_limits
from services.engine.weight_shares import WeightShares

log = get_logger(__name__)

ROWS_MAX = 64
"""Sequences in one pass; a bound, far above what the token limits of a pass let through."""
HOST = torch.device("cpu")


class TorchPrefillEngine:
    """See `PrefillEngine`. Starts its threads at the first pass."""

    def __init__(
        self,
        model: LoadedModel,
        step_cost: StepCost,
        *,
        kv_capacity_tokens: int,
        threads: int = 1,
        long_nice: int = 0,
        exchange: ExchangeCost | None = None,
        core_share: float = 0.0,
        spill: SpillLimits | None = None,
    ) -> None:
        self._model = model
        self._store = KvStore(kv_shape(model), kv_capacity_tokens)
        self._weights = WeightShares(model)
        self._sequences: dict[RequestId, HeldSequence] = {}
        self._running: PassRun | None = None
        self._stop_wanted = threading.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._foreground = compute_thread("prefill", threads, 0, model.device)
        self._background = compute_thread("prefill-long", threads, long_nice, model.device)
        self._profile = EngineProfile(
            model_id=model.model_id,
            model_fingerprint=model.fingerprint,
            layers=model.layers,
            kv_bytes_per_token=model.kv_bytes_per_token,
            kv_capacity_tokens=kv_capacity_tokens,
            context_tokens=model.context_tokens,
            rows_max=ROWS_MAX,
            step_cost=step_cost,
            layer=model.layer_shape,
            exchange=exchange,
            core_share=core_share,
            spill_bytes_max=0 if spill is None else spill.bytes_max,
        )
        self._mover = None if spill is None else KvMover(spill, model.device)

    @property
    def profile(self) -> EngineProfile:
        return self._profile

    @property
    def kv_used_tokens(self) -> int:
        return self._store.used_tokens

    def tokens_computed(self, request_id: RequestId) -> int:
        """Tokens of this sequence computed so far, summed over layers: `layers` times its computed
        tokens when no pass is under way, unless something was computed twice."""
        return self._held(request_id).layer_tokens

    def open(self, spec: RequestSpec, token_ids: Sequence[int], sink: KvSink | None) -> None:
        prompt = self._checked(spec, token_ids)
        reserved = len(prompt) if sink is not None else len(prompt) + spec.max_tokens
        kv = self._store.reserve(spec.request_id, reserved)
        self._sequences[spec.request_id] = HeldSequence(spec, prompt, kv, sink)

    def open_share(self, spec: RequestSpec, token_ids: Sequence[int], share: GroupShare, on_called: OnCalled) -> None:
        prompt = self._checked(spec, token_ids)
        name, kv_tokens, kv_heads = spec.request_id, len(prompt) + spec.max_tokens, self._model.kv_heads
        heads = head_shares(self._model.query_heads, kv_heads, share.mesh.per_node)
        mine = heads[share.mesh.place(share.rank)]
        charged = kv_of_rank(share.scheme, share.size, share.rank, kv_tokens, self._model.layer_shape)
        tokens = charged if mine.kv_heads == kv_heads else share.mesh.reserved_tokens(kv_tokens)
        kv = self._store.reserve(name, tokens, kv_heads=mine.kv_heads, charged=charged)
        held = self._sequences[name] = HeldSequence(spec, prompt, kv, None)
        held.shared = SharedSequence(share, len(prompt), kv_tokens, heads, self._weights)
        held.shared.listen(name, on_called)

    def regroup(self, request_id: RequestId, share: GroupShare, on_called: OnCalled) -> None:
        held = self._held(request_id)
        former = held.parted if held.shared is None else held.shared.share.link
        is_new = former is share.link
        if held.active_pass is not None or (held.computed != share.base and not is_new):
            raise EngineError(
                f"request {request_id} has {held.computed} tokens computed, not {share.base}, or is in a pass"
            )
        heads = head_shares(self._model.query_heads, self._model.kv_heads, share.mesh.per_node)
        kv_tokens = held.prompt_tokens + held.spec.max_tokens
        held.shared = SharedSequence(share, held.prompt_tokens, kv_tokens, heads, self._weights)
        held.computed, held.parted = share.base, None
        held.shared.listen(request_id, on_called)
        if former is not None and not is_new:
            former.close()

    def _checked(self, spec: RequestSpec, token_ids: Sequence[int]) -> list[int]:
        """The prompt. Raises: EngineError."""
        name = spec.request_id
        if name in self._sequences:
            raise EngineError(f"request {name} is already open")
        prompt = list(token_ids)
        if not prompt:
            raise EngineError(f"request {name} has an empty prompt")
        if min(prompt) < 0 or max(prompt) >= self._model.vocab:
            raise EngineError(f"request {name} has token ids outside the vocabulary of {self._model.vocab}")
        if len(prompt) + spec.max_tokens > self._model.context_tokens:
            raise EngineError(
                f"request {name}: {len(prompt)} prompt and {spec.max_tokens} new tokens exceed the context "
                f"of {self._model.context_tokens}"
            )
        return prompt

    async def run(self, segments: Sequence[Segment], *, background: bool = False) -> PassResult:
        self._refuse_if_running()
        if len(segments) > ROWS_MAX:
            raise EngineError(f"a pass of {len(segments)} segments, at most {ROWS_MAX} are allowed")
        held = [(self._here(segment.request_id), segment) for segment in segments]
        shared = [(each, segment) for each, segment in held if each.shared is not None]
        if len(shared) > 1:
            raise EngineError("a pass takes one sequence that a group shares: two could wait for each other")
        group = None
        for each, segment in shared:
            assert each.shared is not None
            gathers = segment.gathers
            group = GroupPass(each.shared, segment.start, segment.tokens, self._stop_wanted.is_set, gathers=gathers)
        if group is not None and group.splits_weights and len(segments) > 1:
            raise EngineError("a chunk whose linear work is split among ranks takes no other sequence into its pass")
        batch = pack(held, self._model.device, group)
        return await self._drive(PassRun(self._model, batch, background=background))

    async def resume(self, request_id: RequestId) -> PassResult:
        self._refuse_if_running()
        stopped = self._here(request_id).active_pass
        if stopped is None:
            raise EngineError(f"request {request_id} is in no stopped pass")
        return await self._drive(stopped)

    def stop(self) -> None:
        if self._running is not None:
            self._stop_wanted.set()

    def close(self, request_id: RequestId) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if self._mover is not None:
            if self._mover.is_moving(request_id):
                raise EngineError(f"the KV of request {request_id} is being moved: stop that before closing it")
            self._mover.forget(request_id)
        in_pass = sequence.active_pass
        if in_pass is not None:
            if in_pass is self._running:
                raise EngineError(f"request {request_id} is being computed: stop the pass before closing it")
            in_pass.drop(sequence)
        del self._sequences[request_id]
        self._store.free(request_id)
        link = sequence.parted if sequence.shared is None else sequence.shared.share.link
        if link is not None:
            link.close()

    async def spill(self, request_id: RequestId) -> Spilled:
        sequence = self._here(request_id)
        if self._mover is None:
            raise SpillRefused("this worker moves no KV: it was started with --spill off")
        stopped = sequence.active_pass
        if stopped is not None and (stopped is self._running or len(stopped.batch.rows) > 1):
            raise EngineError(f"request {request_id} does not stand still alone: its KV cannot be moved")
        moved = await self._mover.move_out(request_id, sequence.kv)
        moved.charged_tokens = self._store.leave(request_id)
        sequence.kv.leave()
        if stopped is not None:
            stopped.park(HOST)
        return Spilled(moved.nbytes, self._mover.limits.to)

    async def restore(self, request_id: RequestId) -> None:
        sequence = self._held(request_id)
        if self._mover is None or not self._mover.holds(request_id) or self._mover.is_moving(request_id):
            raise EngineError(f"the KV of request {request_id} is not elsewhere")
        self._store.come_back(request_id, self._mover.charged_tokens(request_id))
        try:
            sequence.kv.come_back()
        except RuntimeError as error:
            raise EngineError(f"no memory for the KV of request {request_id}: {error}") from error
        await self._mover.bring_back(request_id, sequence.kv)
        if sequence.active_pass is not None:
            sequence.active_pass.park(self._model.device)

    def stop_move(self, request_id: RequestId) -> None:
        if self._mover is not None:
            self._mover.stop(request_id)

    async def shutdown(self) -> None:
        self._give_up()
        await self._idle.wait()
        if self._mover is not None:
            await self._mover.close()
        for request_id in list(self._sequences):
            self.close(request_id)
        self._foreground.shutdown()
        self._background.shutdown()

    def _held(self, request_id: RequestId) -> HeldSequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise EngineError(f"request {request_id} is not open")
        return sequence

    def _here(self, request_id: RequestId) -> HeldSequence:
        sequence = self._held(request_id)
        if self._mover is not None and self._mover.holds(request_id):
            raise EngineError(f"the KV of request {request_id} is elsewhere")
        return sequence

    def _refuse_if_running(self) -> None:
        if self._running is not None:
            raise EngineError("a pass is running: one at a time")

    async def _drive(self, pass_run: PassRun) -> PassResult:
        """Let a thread compute until the pass ends or is stopped. A caller that is cancelled stops the
        pass and leaves when its step is done: no thread ever computes without somebody waiting."""
        loop = asyncio.get_running_loop()
        group, announcement, broken_off = pass_run.group, None, None
        if group is not None:
            try:
                announcement = group.agreed(pass_run.steps_done)
                group.link.begin()
            except GroupBroken as error:
                broken_off = _leave_group(pass_run, error)
                if broken_off is None:
                    pass_run.release()
                    raise
                group = None
        self._stop_wanted.clear()
        self._idle.clear()
        self._running = pass_run
        executor = self._background if pass_run.background else self._foreground
        computing = loop.run_in_executor(executor, self._compute, pass_run, announcement, broken_off, loop)
        try:
            await asyncio.wait([computing])
        except asyncio.CancelledError:
            self._give_up()
            await _ended(computing)
            raise
        finally:
            self._running = None
            self._idle.set()
            if group is not None:
                group.link.end()
        result = computing.result()
        if group is not None and group.gathers and result.finished and result.broken_off is None:
            _part(pass_run)
        return result

    def _give_up(self) -> None:
        """End the running pass at once, also where other ranks would have to agree: that breaks the group."""
        self.stop()
        if self._running is not None and self._running.group is not None:
            self._running.group.link.abort()

    def _compute(
        self,
        pass_run: PassRun,
        announcement: Announcement | None,
        broken_off: BrokenOff | None,
        loop: asyncio.AbstractEventLoop,
    ) -> PassResult:
        """In a compute thread: steps until the end or a stop."""
        begun = time.monotonic()
        group = pass_run.group
        try:
            with torch.inference_mode():
                try:
                    ended = self._steps(pass_run, announcement, loop)
                except GroupBroken as error:
                    broken_off = _leave_group(pass_run, error)
                    if broken_off is None:
                        raise
                    ended = self._steps(pass_run, None, loop)
                sampled = pass_run.settle() if pass_run.finished else ()
        except Exception as error:
            pass_run.release()
            if group is not None:
                group.link.abort()  # before anybody waits for this rank
            kind = GroupBroken if isinstance(error, GroupBroken) else EngineError
            raise kind(f"the pass failed after {pass_run.steps_done} steps: {error}") from error
        return PassResult(
            finished=pass_run.finished,
            steps_done=pass_run.steps_done,
            sampled=sampled,
            compute_s=time.monotonic() - begun,
            last_layer_computed_s=ended,
            broken_off=broken_off,
        )

    def _steps(self, pass_run: PassRun, announcement: Announcement | None, loop: asyncio.AbstractEventLoop) -> float:
        """Until the end or a stop. Returns when the last one ended. Raises: GroupBroken, and whatever the model
        raises."""
        ended, group = time.monotonic(), pass_run.group
        if group is not None and announcement is not None:
            group.open(announcement)
        while not pass_run.finished:
            done = pass_run.step()
            ended = time.monotonic()
            if done and (pieces := pass_run.layer_kv(pass_run.steps_done - 1)):
                loop.call_soon_threadsafe(_deliver, pieces)
            if self._stop_wanted.is_set() if group is None else group.stopping:
                break
        if group is not None:
            group.close()
        return ended


def make_prefill_engine(settings: PrefillWorkerSettings) -> PrefillEngine:
    """Load the model and measure it. Blocking, seconds. Raises: ModelError."""
    torch.set_num_threads(settings.threads)
    folder = ensure_model(settings.model, settings.cache_dir)
    model = load_model(folder, dtype=settings.dtype, device=settings.device, model_id=model_name(settings.model))
    return TorchPrefillEngine(
        model,
        measure_step_cost(model, tokens_max=settings.kv_capacity_tokens),
        kv_capacity_tokens=settings.kv_capacity_tokens,
        threads=settings.threads,
        long_nice=settings.long_nice,
        exchange=_exchange_cost(model),
        core_share=settings.threads / usable_cores() if model.device.type == "cpu" else 0.0,
        spill=spill_limits(settings),
    )


def _exchange_cost(model: LoadedModel) -> ExchangeCost | None:
    try:
        return measure_exchange_cost(model)
    except OSError as error:
        log.warning("not known what exchanges cost here: groups are rings", error=str(error))
        return None


def _leave_group(pass_run: PassRun, error: GroupBroken) -> BrokenOff | None:
    """None: there is nothing else in the pass."""
    shared, group = pass_run.batch.shared, pass_run.group
    assert shared is not None
    assert group is not None
    if not pass_run.leave_group():
        return None
    group.link.abort()  # before anybody waits for this rank
    return BrokenOff(shared.sequence.spec.request_id, str(error))


def _part(pass_run: PassRun) -> None:
    """The group's last common pass is done: on rank 0 the sequence is one like any other from now on. Its link stays
    until the sequence is closed: to close it now would break the others' pass, which may not have ended yet."""
    shared = pass_run.batch.shared
    assert shared is not None
    sequence = shared.sequence
    if sequence.shared is not None and sequence.shared.share.rank == 0:
        sequence.parted, sequence.shared = sequence.shared.share.link, None


def kv_shape(model: LoadedModel) -> KvShape:
    return KvShape(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device)


def _deliver(pieces: list[tuple[HeldSequence, LayerKv]]) -> None:
    """On the loop's thread."""
    for sequence, kv in pieces:
        if sequence.sink is not None:
            sequence.sink(kv)


async def _ended(computing: asyncio.Future[PassResult]) -> None:
    """Wait for the thread, at most one step long, whoever cancels meanwhile. The result is nobody's."""
    while not computing.done():
        try:
            await asyncio.wait([computing])
        except asyncio.CancelledError:
            continue
    if not computing.cancelled():
        computing.exception()
