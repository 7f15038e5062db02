"""`python -m loadtest engine`: what stepping costs, and how long a step is.

A prompt of 7,000 tokens goes through the prefill engine's passes, layer by layer in the chunks a worker would
choose, and through transformers' own forward in one piece, in turn; medians of three. The price of being able
to pause is their ratio; the length of a step is what a pause has to wait for. Then the milliseconds of
a decode step by batch size, at a context of 200 tokens. One thread, no other process, no network.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import msgspec

from common.settings import DtypeName, PrefillWorkerSettings
from loadtest import report
from loadtest.stats import percentiles

BATCHES = (1, 8, 16, 32)
DECODE_CONTEXT = 200
RATIO_MAX = 1.25


@dataclass(frozen=True, slots=True)
class EngineOptions:
    seed: int = 0
    model: str = "embedded"
    cache_dir: str = ""
    tokens: int = 7_000
    threads: int = 1
    dtype: DtypeName = "auto"
    runs: int = 3


def run(options: EngineOptions) -> dict[str, Any]:
    """Raises: PecSchedError, EngineError."""
    from services.engine.measure import measure_decode, measure_prefill  # loads torch: only where it is used

    settings = PrefillWorkerSettings(
        model=options.model, cache_dir=options.cache_dir, threads=options.threads, dtype=options.dtype
    )
    with report.progress() as bars:
        with bars.counting("prefill, both ways", options.runs + 1) as step:
            prefill = measure_prefill(settings, options.tokens, options.runs, options.seed, step)
        with bars.counting("decode", len(BATCHES)) as step:
            decode = measure_decode(settings, BATCHES, DECODE_CONTEXT, step)
    stepped_s, oneshot_s = statistics.median(prefill.stepped_s), statistics.median(prefill.oneshot_s)
    return {
        "tokens": options.tokens,
        "threads": options.threads,
        "settings": {"chunk_tokens": settings.chunk_tokens, "step_ms_max": settings.step_ms_max},
        "stepped_s": stepped_s,
        "oneshot_s": oneshot_s,
        "ratio": stepped_s / oneshot_s,
        "runs": msgspec.to_builtins({"stepped_s": prefill.stepped_s, "oneshot_s": prefill.oneshot_s}),
        "chunks": list(prefill.chunks),
        "same_first_token": prefill.same_token,
        "step_s": percentiles(prefill.steps_s, 50, 99) | {"max": max(prefill.steps_s)},
        "decode_step_s": {str(batch): seconds for batch, seconds in decode.items()},
        "decode_context": DECODE_CONTEXT,
    }


def show(figures: dict[str, Any]) -> None:
    step, decode = figures["step_s"], figures["decode_step_s"]
    rows = [
        ["stepped", report.s(figures["stepped_s"])],
        ["transformers, one forward", report.s(figures["oneshot_s"])],
        ["step p50", report.ms(step["p50"])],
        ["step p99", report.ms(step["p99"])],
        ["step max", report.ms(step["max"])],
        *([f"decode step, {batch} sequences", report.ms(seconds)] for batch, seconds in decode.items()),
    ]
    chunks = figures["chunks"]
    notes = [
        "",
        f"{len(chunks)} passes of {min(chunks)} to {max(chunks)} tokens; first token "
        f"{'the same' if figures['same_first_token'] else 'another one (may be, in bfloat16)'}; "
        f"decode at a context of {figures['decode_context']} tokens",
        report.target("stepped / one forward", figures["ratio"], RATIO_MAX, report.times),
    ]
    report.table(f"prefill of {figures['tokens']} tokens, {figures['threads']} thread(s)", ["", "median"], rows, notes)
