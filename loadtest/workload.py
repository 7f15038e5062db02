"""What is sent, and when. Seeded: the same arguments give the same requests at the same times.

Arrivals are two independent Poisson processes. Prompts are random token ids of exact length, so that
lengths are lengths, nothing is tokenized, and no two prompts share a prefix. Every request asks for
exactly `OUTPUT_TOKENS` tokens (`ignore_eos`), greedy, streamed, with logprobs of the drawn token alone:
so tokens can be counted, however many an event brings, also those whose bytes are half a character.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from common.messages.requests import LengthClass

SHORT_TOKENS = (32, 256)
LONG_TOKENS = (6_000, 7_500)
OUTPUT_TOKENS = 16
FIRST_ID, VOCAB = 100, 32_000
"""Token ids are drawn from [FIRST_ID, VOCAB): no special tokens, and every model that is served has them."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, encoded ahead of time so that sending it costs the client little."""

    kind: LengthClass
    prompt_tokens: int
    output_tokens: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    """After the start of the schedule."""
    ask: Ask


@dataclass(frozen=True, slots=True)
class Schedule:
    """Arrivals in order of time."""

    arrivals: tuple[Arrival, ...]

    @classmethod
    def at_once(cls, asks: Iterable[Ask]) -> Schedule:
        """All of them at time zero."""
        return cls(tuple(Arrival(0.0, ask) for ask in asks))

    def only(self, kind: LengthClass) -> Schedule:
        """The same without the others."""
        return Schedule(tuple(arrival for arrival in self.arrivals if arrival.ask.kind == kind))

    def count(self, kind: LengthClass) -> int:
        return len(self.only(kind).arrivals)

    @property
    def duration_s(self) -> float:
        return self.arrivals[-1].at_s if self.arrivals else 0.0


def make_ask(rng: random.Random, kind: LengthClass, tokens: int, output_tokens: int = OUTPUT_TOKENS) -> Ask:
    """A random prompt of `tokens` tokens, to be sent over HTTP."""
    prompt = [rng.randrange(FIRST_ID, VOCAB) for _ in range(tokens)]
    return Ask(kind, tokens, output_tokens, http_body(prompt, output_tokens))


def http_body(prompt: Sequence[int], output_tokens: int) -> bytes:
    """For `/v1/completions`."""
    return msgspec.json.encode(
        {"prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        | {"logprobs": 0}
    )


def nats_body(prompt: Sequence[int], output_tokens: int, request_id: str) -> bytes:
    """For `pecsched.v1.generate`, whose messages tell token ids anyway."""
    return msgspec.json.encode(
        {"prompt_token_ids": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        | {"request_id": request_id}
    )


def poisson_times(rate: float, rng: random.Random) -> Iterator[float]:
    """Times of a Poisson process with `rate` arrivals per second, without end."""
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate)
        yield at_s


def make_schedule(
    seed: int,
    *,
    short_rps: float,
    long_rps: float,
    shorts_min: int,
    longs_min: int,
    short_tokens: tuple[int, int] = SHORT_TOKENS,
    long_tokens: tuple[int, int] = LONG_TOKENS,
) -> Schedule:
    """Both processes, up to the time when each has had its minimum of arrivals."""
    short_times = poisson_times(short_rps, _generator(seed, "short times"))
    shorts = [next(short_times) for _ in range(shorts_min)]
    longs: list[float] = []
    if longs_min:
        long_times = poisson_times(long_rps, _generator(seed, "long times"))
        longs = [next(long_times) for _ in range(longs_min)]
        end_s = max(shorts[-1], longs[-1])
        shorts += _until(short_times, end_s, after=shorts)
        longs += _until(long_times, end_s, after=longs)
    arrivals = _with_prompts(shorts, "short", short_tokens, seed) + _with_prompts(longs, "long", long_tokens, seed)
    return Schedule(tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)))


def even_asks(seed: int, purpose: str, kind: LengthClass, tokens: tuple[int, int], number: int) -> Iterator[Ask]:
    """Asks without end whose lengths are spread evenly from end to end of `tokens` within every `number` of them:
    the rate at which they are served then varies little by the lengths that happened to be drawn."""
    rng = _generator(seed, purpose)
    low, high = tokens
    while True:
        lengths = [low + round((high - low) * i / (number - 1)) for i in range(number)]
        rng.shuffle(lengths)
        for length in lengths:
            yield make_ask(rng, kind, length)


def _until(times: Iterator[float], end_s: float, *, after: list[float]) -> list[float]:
    """The next times up to `end_s`; none if the process is there already."""
    more: list[float] = []
    if after[-1] < end_s:
        for at_s in times:
            if at_s > end_s:
                break
            more.append(at_s)
    return more


def _with_prompts(times: list[float], kind: LengthClass, tokens: tuple[int, int], seed: int) -> list[Arrival]:
    rng = _generator(seed, f"{kind} prompts")
    return [Arrival(at_s, make_ask(rng, kind, rng.randint(*tokens))) for at_s in times]


def _generator(seed: int, purpose: str) -> random.Random:
    """A stream of its own per purpose, so that another rate does not change the prompts."""
    return random.Random(f"{seed}/{purpose}")
