"""The tracer that the settings ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from common.errors import StartupError
from common.metrics import SPANS_DROPPED, Metrics
from common.tracing import Tracer

TRACES_PATH = "/v1/traces"


@asynccontextmanager
async def traced(role: str, endpoint: str, metrics: Metrics) -> AsyncIterator[Tracer | None]:
    """A tracer for the length of the block; none for "". Raises: StartupError, for what is no URL."""
    if not endpoint:
        yield None
        return
    from common.runtime.otlp import OtlpTracer  # a third of a second, and 20 MB: for those who want traces

    tracer = OtlpTracer(role, url_of(endpoint))
    metrics.read(SPANS_DROPPED, lambda: {(): tracer.dropped})
    try:
        yield tracer
    finally:
        await asyncio.to_thread(tracer.close)


def url_of(endpoint: str) -> str:
    """Where traces go, of a collector's address with or without the path. Raises: StartupError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise StartupError(f"--otlp-endpoint {endpoint}: not the address of a collector, such as http://127.0.0.1:4318")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith(TRACES_PATH) else path + TRACES_PATH).geturl()
