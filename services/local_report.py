"""What `pecsched serve` tells the person who started it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from common.messages.views import ClusterView
from common.runtime import subjects
from common.runtime.urls import redacted
from common.settings import ServeSettings
from services.local_plan import Plan


def say(text: str) -> None:
    """A line now, also where the output is a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def missing_parts(plan: Plan, view: ClusterView | None, *, router_healthy: bool) -> tuple[str, ...]:
    """Names of the roles that are not yet part of the cluster. `view` None: the scheduler does not answer."""
    if view is None:
        return (plan.scheduler.name,)
    present = {str(worker.profile.worker_id) for worker in view.workers}
    missing = [worker.name for worker in plan.workers if worker.name not in present]
    if not view.coordinator_present:
        missing.append(plan.coordinator.name)
    if not router_healthy or not view.routers:
        missing.append(plan.router.name)
    return tuple(missing)


def announcement(
    rows: Iterable[tuple[str, int, str, str, Path]], url: str, nats_url: str, settings: ServeSettings, took_s: float
) -> str:
    """The table of what runs, and commands to paste."""
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    key = " -H 'Authorization: Bearer '\"$PECSCHED_API_KEY\"" if settings.api_key else ""
    server = "" if redacted(nats_url) != nats_url else f"--server {nats_url} "
    request = """'{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "stream": false}'"""
    return "\n".join(
        [
            "",
            f"PecSched is ready ({took_s:.1f} s). Policy {settings.policy}; prompts over "
            f"{settings.threshold_tokens} tokens are long. Ctrl-C drains and stops it.",
            "",
            *table(
                ("ROLE", "PID", "ADDRESS", "METRICS", "LOG"),
                [(name, str(pid), *places, shlex.quote(str(log))) for name, pid, *places, log in rows],
            ),
            "",
            f"Watch it in a browser: {url}/",
            "Ask it over HTTP, or over NATS:",
            f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
            '  .venv/bin/pecsched ask --via nats "What is the capital of France?"',
            "The same with the nats command line:",
            f"  nats {server}--timeout 60s request {subjects.GENERATE} {request}",
            "",
        ]
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Aligned columns, nothing cut off: a path is there to be copied."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
