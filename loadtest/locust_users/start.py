"""Before the first user: where the cluster is, whether it is there, what it takes; weights, lengths, the shape.

Whatever is wrong is one line, and locust ends with status 1: a thousand users that fail one by one tell less.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import httpx
from locust.env import Environment
from locust.runners import MasterRunner

from common.errors import PecSchedError
from loadtest.fitting import LONG_SHARES
from loadtest.locust_users.bridge import LoopThread
from loadtest.locust_users.options import Options, options_of
from loadtest.locust_users.shape import TraceShape
from loadtest.locust_users.users import HttpPrompts, NatsPrompts, PromptUser, long, short
from loadtest.nats_client import NatsClient
from loadtest.simulator.traces import read_trace
from services.run_file import find_running

DESCRIBED_S = 10.0


USERS = 8
SPAWN_PER_S = 4.0


class LoadError(PecSchedError):
    """The load test cannot begin. Its text is one line."""


def prepare(environment: Environment, **_: Any) -> None:
    """Listener of locust's `init`. Ends the process with one line if the load cannot begin."""
    assert environment.parsed_options is not None
    try:
        _prepare(environment, options_of(environment.parsed_options))
    except PecSchedError as error:
        sys.exit(f"locustfile: {error}")


def finish(environment: Environment, **_: Any) -> None:
    """Listener of locust's `quitting`."""
    if NatsPrompts in environment.user_classes and hasattr(NatsPrompts, "connection"):
        NatsPrompts.loop_thread.run(NatsPrompts.connection.close)
        NatsPrompts.loop_thread.stop()


def _prepare(environment: Environment, options: Options) -> None:
    """Raises: PecSchedError."""
    wanted = weigh(environment, options)
    if options.trace:
        shape_of(environment, options)
    else:
        crowd(environment)
    if isinstance(environment.runner, MasterRunner):
        return  # its workers ask
    contexts = []
    if HttpPrompts in wanted:
        environment.host = (environment.host or find_running(os.environ, "--host").url).rstrip("/")
        HttpPrompts.host = environment.host
        HttpPrompts.network_timeout = options.answer_s
        contexts.append(_context_over_http(environment.host, options))
    if NatsPrompts in wanted:
        contexts.append(_context_over_nats(options))
    PromptUser.options = options
    PromptUser.lengths = {"short": options.short_tokens, "long": options.long_tokens or _longs(min(contexts))}
    longest = PromptUser.lengths["long" if options.long_weight else "short"][1] + options.output_tokens
    if longest > min(contexts):
        raise LoadError(f"prompts and outputs of {longest} tokens: the model's context is {min(contexts)}")


def weigh(environment: Environment, options: Options) -> list[type[PromptUser]]:
    """Give users and tasks their weights; leave out what weighs nothing. Raises: LoadError."""
    weights: dict[type[PromptUser], int] = {HttpPrompts: options.http_weight, NatsPrompts: options.nats_weight}
    chosen = [kind for kind in weights if kind in environment.user_classes]
    wanted = [kind for kind in chosen if weights[kind]]
    tasks = [short] * options.short_weight + [long] * options.long_weight
    if not wanted or not tasks:
        raise LoadError("all weights are 0: nobody would ask anything")
    for kind in wanted:
        kind.weight = weights[kind]
        kind.tasks = list(tasks)
    environment.user_classes[:] = list(wanted)
    return wanted


def crowd(environment: Environment) -> None:
    """Where nobody says how many users, there are some of each kind: locust's own one would be of one kind only."""
    said = environment.parsed_options
    assert said is not None
    if said.num_users is None:
        said.num_users = USERS
    if said.spawn_rate is None:
        said.spawn_rate = SPAWN_PER_S


def shape_of(environment: Environment, options: Options) -> None:
    """Let the trace say how many users there are. Raises: WorkloadError."""
    workload = read_trace(options.trace)
    if options.trace_first_s is not None:
        workload = workload.first(options.trace_first_s)
    times_s = [arrival.at_s for arrival in workload.scaled(options.trace_rate_scale).arrivals]
    assert environment.parsed_options is not None
    shape = TraceShape(times_s, options.user_rps, environment.parsed_options.run_time)
    shape.runner = environment.runner
    environment.shape_class = shape


def _context_over_http(host: str, options: Options) -> int:
    """Tokens of the model's context. Raises: LoadError."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        # trust_env=False: a proxy meant for the web does not know this machine's ports.
        answer = httpx.get(f"{host}/v1/models", headers=headers, timeout=DESCRIBED_S, trust_env=False)
        return _context(answer.raise_for_status().json())
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoadError(f"no router answers at {host} (--host): {str(error) or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise LoadError(f"{host} (--host) answers, but not as a PecSched router: {error}") from error


def _context_over_nats(options: Options) -> int:
    """Connects all NATS users. Raises: LoadError, ClientError."""
    url = options.nats_url or find_running(os.environ, "--nats-url").nats_url
    NatsPrompts.loop_thread = LoopThread()
    NatsPrompts.connection = NatsPrompts.loop_thread.run(lambda: NatsClient.connect(url, timeout_s=options.answer_s))
    return _context(NatsPrompts.loop_thread.run(lambda: NatsPrompts.connection.get("/v1/models")))


def _context(models: Any) -> int:
    return int(models["data"][0]["max_model_len"])


def _longs(context_tokens: int) -> tuple[int, int]:
    return round(LONG_SHARES[0] * context_tokens), round(LONG_SHARES[1] * context_tokens)
