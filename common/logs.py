"""Structured logs on stderr: one JSON object per line, or coloured text for people.

A log line carries whatever `bind` put into the current context (`request_id`, `cause` …), so that
everything said while a message is handled can be found by its request.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

QUIET_LIBRARIES = ("nats", "redis", "httpx", "httpcore", "asyncio", "uvicorn", "transformers", "urllib3")
"""Libraries that say at most warnings, whatever the level of our own lines."""


def setup(role: str, *, level: str = "info", as_json: bool = True) -> None:
    """Configure logging of this process. May be called again; the last call wins.

    `role` appears on every line. `level`: debug, info, warning or error.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_role(role),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_renderers(as_json)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def get_logger(name: str) -> Any:
    """A logger that takes keyword fields: `log.info("worker lost", worker_id=...)`."""
    return structlog.stdlib.get_logger(name)


@contextmanager
def bind(**fields: object) -> Iterator[None]:
    """Put fields (`request_id`, `cause` …) on every line logged inside the block, in this task and those it starts."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def _add_role(role: str) -> Any:
    def add(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        event["role"] = role
        return event

    return add


def _renderers(as_json: bool) -> list[Any]:
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if as_json:
        return [
            drop,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(default=str),
        ]
    return [drop, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
