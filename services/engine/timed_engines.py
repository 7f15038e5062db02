"""The timed engines that a worker's settings name."""

from __future__ import annotations

from dataclasses import replace

from common.settings import DecodeWorkerSettings, PrefillWorkerSettings
from services.engine.timed_decode import TimedDecodeEngine
from services.engine.timed_language import TimedShape
from services.engine.timed_prefill import TimedPrefillEngine


def make_timed_prefill_engine(settings: PrefillWorkerSettings) -> TimedPrefillEngine:
    shape = TimedShape(model_id=settings.model, kv_capacity_tokens=settings.kv_capacity_tokens)
    if settings.spill == "off":
        return TimedPrefillEngine(replace(shape, spill_bytes_max=0), tally=False)
    shape = replace(shape, spill_to=settings.spill, spill_bytes_max=settings.spill_bytes_max)
    return TimedPrefillEngine(shape, tally=False)


def make_timed_decode_engine(settings: DecodeWorkerSettings) -> TimedDecodeEngine:
    return TimedDecodeEngine(
        TimedShape(model_id=settings.model, kv_capacity_tokens=settings.kv_capacity_tokens, rows_max=settings.rows_max)
    )
