"""`pecsched`: the whole of it on this machine, one role of it, or a question to it.

Every command imports what it needs when it runs: a scheduler or a `--help` never loads torch.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import logs
from common.errors import PecSchedError
from common.messages.base import Record
from common.settings import (
    AskSettings,
    CoordinatorSettings,
    DecodeWorkerSettings,
    PrefillWorkerSettings,
    RouterSettings,
    SchedulerSettings,
    ServeSettings,
    StatusSettings,
    StorySettings,
)
from common.settings_loader import SettingsError, load

EXIT_MISUSE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its settings, and what it does with them. Returns the exit status."""

    name: str
    summary: str
    settings: type[Record]
    run: Callable[[Any], int]


def _serve(settings: ServeSettings) -> int:
    from services.local import main

    return main(settings)


def _router(settings: RouterSettings) -> int:
    from services.router.main import main

    return main(settings)


def _scheduler(settings: SchedulerSettings) -> int:
    from services.scheduler.main import main

    return main(settings)


def _prefill_worker(settings: PrefillWorkerSettings) -> int:
    from services.prefill_worker.main import main

    return main(settings)


def _decode_worker(settings: DecodeWorkerSettings) -> int:
    from services.decode_worker.main import main

    return main(settings)


def _sp_coordinator(settings: CoordinatorSettings) -> int:
    from services.sp_coordinator.main import main

    return main(settings)


def _status(settings: StatusSettings) -> int:
    from services.status import status

    return status(settings)


def _story(settings: StorySettings) -> int:
    from services.status import story

    return story(settings)


def _ask(settings: AskSettings) -> int:
    from services.ask import ask

    return ask(settings)


GROUPS: Mapping[str, tuple[Command, ...]] = {
    "on this machine": (
        Command(
            "serve", "start everything: NATS, Redis and every role; Ctrl-C drains and stops it", ServeSettings, _serve
        ),
        Command("status", "show the workers, what each runs, queues and KV", StatusSettings, _status),
        Command("ask", "ask the model; the answer appears as it is generated", AskSettings, _ask),
        Command("story", "tell what happened to one request", StorySettings, _story),
    ),
    "one role (for compose, or a cluster of machines)": (
        Command("router", "the door: OpenAI API over HTTP, requests over NATS", RouterSettings, _router),
        Command("scheduler", "decides who runs what; one is active, others stand by", SchedulerSettings, _scheduler),
        Command("prefill-worker", "computes prompts; long ones can be paused", PrefillWorkerSettings, _prefill_worker),
        Command("decode-worker", "generates the tokens of short requests", DecodeWorkerSettings, _decode_worker),
        Command("sp-coordinator", "leads the workers of a long prompt", CoordinatorSettings, _sp_coordinator),
    ),
}
COMMANDS = {command.name: command for commands in GROUPS.values() for command in commands}


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("", "-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("version", "--version", "-V"):
        print(f"pecsched {importlib.metadata.version('pecsched')}")
        return 0
    try:
        command = _find(name)
        settings = load(command.settings, rest, os.environ if env is None else env, prog=f"pecsched {command.name}")
        logs.setup(command.name, level="error", as_json=False)  # roles set up their own
        return command.run(settings)
    except SettingsError as error:
        return _complain(name, error, EXIT_MISUSE)
    except PecSchedError as error:
        return _complain(name, error, 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def overview() -> str:
    """What `pecsched --help` says."""
    lines = [
        "PecSched serves a language model; short requests pause a long prefill, and it resumes where it stood.",
        "",
    ]
    lines += ["usage: pecsched COMMAND [flags]        flags of a command: pecsched COMMAND --help", ""]
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {command.name:<16}{command.summary}" for command in commands), ""]
    lines += ["  version         print the version", ""]
    lines += ["Every flag has an environment variable: --nats-url is PECSCHED_NATS_URL. The flag wins."]
    return "\n".join(lines)


def _find(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    raise SettingsError(f"no such command{f'; did you mean {close[0]}?' if close else ''} (see pecsched --help)")


def _complain(name: str, error: Exception, status: int) -> int:
    print(f"pecsched {name}: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
