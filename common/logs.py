"""Structured logs on stderr: one JSON object per line, or coloured text for people.

A log line carries whatever `bind` put into the current context (`request_id`, `cause` …), and a line about a message
what `about` takes from it, so that everything said of a request can be found by its id. What a client sent or was
answered is in no line: neither are messages logged whole, nor the local variables of a traceback.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

SPOKEN_OF = ("request_id", "attempt", "worker_id", "cause")
"""Fields of a message that its log lines have."""

QUIET_LIBRARIES = ("nats", "redis", "httpx", "httpcore", "asyncio", "uvicorn", "transformers", "urllib3")
"""Libraries that say at most warnings, whatever the level of our own lines."""
MUTE_LIBRARIES = ("opentelemetry",)
"""At most errors: it warns of every try to reach a collector."""


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
    for name in MUTE_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def get_logger(name: str) -> Any:
    """A logger that takes keyword fields: `log.info("worker lost", worker_id=...)`."""
    return structlog.stdlib.get_logger(name)


def about(message: object) -> dict[str, object]:
    """Fields that name a message in a log line: its class, and whose it is. Never what is in a prompt."""
    spec = getattr(message, "spec", None)
    found = {name: getattr(message, name, None) or getattr(spec, name, None) for name in SPOKEN_OF}
    return {"what": type(message).__name__, **{name: value for name, value in found.items() if value}}


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
    # The default formatter would print the local variables of every frame, prompts among them.
    plain = structlog.dev.plain_traceback
    return [drop, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
