"""Arguments of the locustfile. Each is also an environment variable, as locust's own are; NATS's is the one that all of
PecSched reads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from loadtest.flags import not_negative, positive, rate, token_range

SHORT_TOKENS = (32, 256)
ANSWER_S = 300.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the arguments say."""

    nats_url: str
    api_key: str
    http_weight: int
    nats_weight: int
    short_weight: int
    long_weight: int
    short_tokens: tuple[int, int]
    long_tokens: tuple[int, int] | None
    """None: a share of the model's context."""
    output_tokens: int
    user_rps: float
    answer_s: float
    load_seed: int
    trace: tuple[str, ...]
    trace_first_s: float | None
    trace_rate_scale: float

    @property
    def weights(self) -> tuple[int, int]:
        """Of shorts and longs."""
        return self.short_weight, self.long_weight


def add_arguments(parser: Any) -> None:
    """To locust's parser, which takes a variable's name with each. They count when locust starts: its web page, where
    they could be changed later, does not show them."""

    def add(flag: str, default: Any, read: Any, about: str, *, env: str = "", **more: Any) -> None:
        name = env or f"LOCUST_{flag.strip('-').replace('-', '_').upper()}"
        parser.add_argument(flag, default=default, type=read, help=about, env_var=name, include_in_web_ui=False, **more)

    add("--nats-url", "", str, "of the NATS user [that of a `pecsched serve` here]", env="PECSCHED_NATS_URL")
    add("--api-key", "", str, "bearer token, where the router asks for one", env="PECSCHED_API_KEY", is_secret=True)
    add("--http-weight", 1, not_negative, "of users over HTTP; 0: none [1]")
    add("--nats-weight", 1, not_negative, "of users over NATS; 0: none [1]")
    add("--short-weight", 9, not_negative, "of the task short; 0: none [9]")
    add("--long-weight", 1, not_negative, "of the task long; 0: none [1]")
    add("--short-tokens", SHORT_TOKENS, token_range, "prompt of a short, LOW-HIGH [32-256]")
    add("--long-tokens", None, token_range, "prompt of a long [75 to 90 %% of the model's context]")
    add("--output-tokens", 16, positive, "of every answer [16]")
    add("--user-rps", 0.5, rate, "requests per second of each user, at most [0.5]")
    add("--answer-s", ANSWER_S, rate, "longest wait for a whole answer [300]")
    add("--load-seed", 0, not_negative, "of all that is random [0]")
    add("--trace", [], str, "Azure CSV or Mooncake JSONL: as many users as its rate wants", nargs="+")
    add("--trace-first", None, rate, "only its first so many seconds")
    add("--trace-rate-scale", 1.0, rate, "its rate, as a multiple [1]")


def options_of(said: argparse.Namespace) -> Options:
    """As locust parsed them."""
    return Options(
        nats_url=said.nats_url,
        api_key=said.api_key,
        http_weight=said.http_weight,
        nats_weight=said.nats_weight,
        short_weight=said.short_weight,
        long_weight=said.long_weight,
        short_tokens=said.short_tokens,
        long_tokens=said.long_tokens,
        output_tokens=said.output_tokens,
        user_rps=said.user_rps,
        answer_s=said.answer_s,
        load_seed=said.load_seed,
        trace=tuple(said.trace or ()),
        trace_first_s=said.trace_first,
        trace_rate_scale=said.trace_rate_scale,
    )
