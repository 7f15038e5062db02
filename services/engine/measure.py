"""Times the engine's pieces by themselves, without workers around them; for benchmarks.

Prefill: one long prompt through `PassRun`, step by step in the chunks that a prefill worker would choose, and
the same prompt through transformers' own modules with their own attention in one forward, in turn, so that
a machine that slows down slows both. Decode: steps of the decode engine's layer loop at several batch sizes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common.messages.cluster import StepCost
from common.messages.requests import Prompt, RequestSpec, SamplingParams
from common.model_files import model_name
from common.policy import costs
from common.settings import PrefillWorkerSettings
from common.units import RequestId, RouterId
from services.engine.batch import HeldSequence, pack
from services.engine.calibrate import measure_step_cost
from services.engine.convert import ensure_model
from services.engine.decode import Decoder, DecodeRow
from services.engine.interface import EngineError, Segment
from services.engine.kv_cache import KvShape, SequenceKv
from services.engine.model import LoadedModel, load_model
from services.engine.prefill import PassRun
from services.engine.slots import SlotKv, SlotPool

DECODE_WARM_UP, DECODE_STEPS = 3, 15

OnDone = Callable[[], None]


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """Of one prompt, measured in turn."""

    stepped_s: tuple[float, ...]
    oneshot_s: tuple[float, ...]
    steps_s: tuple[float, ...]
    """Every step of every stepped run."""
    chunks: tuple[int, ...]
    """Tokens of each pass of a run."""
    same_token: bool
    """Both ways drew the same first token (in bfloat16 they need not)."""


def measure_prefill(settings: PrefillWorkerSettings, tokens: int, runs: int, seed: int, on_run: OnDone) -> PrefillTimes:
    """Blocking. One run of each way comes first and does not count. Raises: ModelError, EngineError."""
    folder, model = _load(settings)
    reference = _reference(folder, model)
    if tokens >= model.context_tokens:
        raise EngineError(f"a prompt of {tokens} tokens does not fit the model's context of {model.context_tokens}")
    cost = measure_step_cost(model, tokens_max=settings.kv_capacity_tokens)
    rng = random.Random(seed)
    prompt = [rng.randrange(model.vocab) for _ in range(tokens)]
    chunks = tuple(plan_chunks(cost, model.layers, tokens, settings))
    stepped, oneshot, steps = [], [], []
    tokens_drawn: set[int] = set()
    for run in range(runs + 1):
        took_s, token, step_times = _stepped(model, prompt, chunks)
        oneshot_s, reference_token = _oneshot(reference, prompt)
        tokens_drawn |= {token, reference_token}
        if run:
            stepped.append(took_s)
            oneshot.append(oneshot_s)
            steps += step_times
        on_run()
    return PrefillTimes(tuple(stepped), tuple(oneshot), tuple(steps), chunks, len(tokens_drawn) == 1)


def plan_chunks(cost: StepCost, layers: int, tokens: int, settings: PrefillWorkerSettings) -> Iterator[int]:
    """The passes in which a worker with these settings prefills a prompt."""
    past = 0
    while past < tokens:
        step_s_max = settings.step_ms_max / 1e3
        fitting = costs.chunk_tokens(cost, layers, past, step_s_max=step_s_max, tokens_max=settings.chunk_tokens)
        yield min(fitting, tokens - past)
        past += min(fitting, tokens - past)


def measure_decode(
    settings: PrefillWorkerSettings, batches: Sequence[int], context: int, on_batch: OnDone
) -> dict[int, float]:
    """Median seconds of a decode step by number of sequences, each with `context` tokens before it; drawing
    the tokens is not in it. Blocking. Raises: ModelError, EngineError."""
    _, model = _load(settings)
    slot_tokens = costs.decode_slot_tokens(context + 1)
    pool = SlotPool(max(batches) * slot_tokens)
    decoder = Decoder(model, SlotKv(_shape(model), pool))
    found = {}
    for batch in batches:
        slots = [pool.take(context + 1) for _ in range(batch)]
        rows = [DecodeRow(slot, context, token_id=number) for number, slot in enumerate(slots)]
        times = [_timed(partial(_decode_step, decoder, rows)) for _ in range(DECODE_WARM_UP + DECODE_STEPS)]
        found[batch] = statistics.median(times[DECODE_WARM_UP:])
        for slot in slots:
            pool.give_back(slot)
        on_batch()
    return found


def _load(settings: PrefillWorkerSettings) -> tuple[Path, LoadedModel]:
    torch.set_num_threads(settings.threads)
    folder = ensure_model(settings.model, settings.cache_dir)
    name = model_name(settings.model)
    return folder, load_model(folder, dtype=settings.dtype, device=settings.device, model_id=name)


def _reference(folder: Path, model: LoadedModel) -> Any:
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation="sdpa")
    return module.to(model.device).eval()


def _shape(model: LoadedModel) -> KvShape:
    return KvShape(model.layers, model.kv_heads, model.head_dim, model.dtype, model.device)


def _stepped(model: LoadedModel, prompt: list[int], chunks: Sequence[int]) -> tuple[float, int, list[float]]:
    """Seconds from an empty cache to the first token, that token, and the seconds of every step."""
    name = RequestId("measured")
    spec = RequestSpec(
        request_id=name,
        router_id=RouterId(""),
        prompt=Prompt(tokens=len(prompt)),
        max_tokens=1,
        sampling=SamplingParams(temperature=0.0),
    )
    steps: list[float] = []
    begun_s = time.perf_counter()
    sequence = HeldSequence(spec, prompt, SequenceKv(_shape(model), len(prompt) + 1), None)
    with torch.inference_mode():
        for tokens in chunks:
            start = sequence.computed
            sample = start + tokens == len(prompt)
            run = PassRun(model, pack([(sequence, Segment(name, start, tokens, sample=sample))], model.device))
            while not run.finished:
                steps.append(_timed(run.step))
            drawn = run.settle()
    return time.perf_counter() - begun_s, drawn[0].token_id, steps


def _oneshot(reference: Any, prompt: list[int]) -> tuple[float, int]:
    """The same by one forward of transformers', its cache kept."""
    begun_s = time.perf_counter()
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=reference.device)
        logits = reference(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
    return time.perf_counter() - begun_s, token


def _decode_step(decoder: Decoder, rows: Sequence[DecodeRow]) -> None:
    decoder.step(rows)[:, :1].cpu()  # the copy waits for the device


def _timed(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s
