"""The users: prompts of random tokens, short ones and long ones, streamed over HTTP or over NATS.

Three statistics for each, all in milliseconds, under names like `short http`: `TTFT` (to the first token), `ITL` (mean
time between two tokens of a request) and `JCT` (to the last token; a request that failed is a failure of this one). A
user waits for its answer before it asks again: a closed loop, in which a cluster that stalls is asked less. For
arrivals that do not wait there is `python -m loadtest run`.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from locust import FastHttpUser, User, constant_throughput
from locust.env import Environment

from common.errors import PecSchedError
from common.messages.requests import LengthClass
from loadtest.client import ERROR_CHARS_MAX, Answer, take_event
from loadtest.locust_users.bridge import LoopThread
from loadtest.locust_users.options import Options
from loadtest.nats_client import NatsClient
from loadtest.workload import FIRST_ID, VOCAB, Ask, http_body, nats_body

SSE_END = b"\n\n"
MILLISECONDS = 1e3


class AnswerFailed(PecSchedError):
    """What locust shows among its failures."""


class PromptUser(User):
    """What both kinds of user have in common. The tasks stand in `tasks`, as often as they weigh: see `start.py`."""

    abstract = True
    way: ClassVar[str] = ""
    options: ClassVar[Options]
    lengths: ClassVar[dict[LengthClass, tuple[int, int]]]
    _numbers: ClassVar[Any] = itertools.count()

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.number = next(self._numbers)
        self.rng = random.Random(f"{self.options.load_seed}/{self.way} user {self.number}")
        self._asked = itertools.count()
        self._pace: Callable[[PromptUser], float] = constant_throughput(self.options.user_rps)

    def wait_time(self) -> float:
        """Until the next request, so that there are `user_rps` of them at most."""
        return self._pace(self)

    def one(self, kind: LengthClass) -> None:
        """Ask, and report."""
        prompt = self.rng.choices(range(FIRST_ID, VOCAB), k=self.rng.randint(*self.lengths[kind]))
        name = f"locust-{self.way}-{self.number}-{next(self._asked)}-{self.rng.getrandbits(32):08x}"
        begun_s = time.monotonic()
        ask = Ask(kind, len(prompt), self.options.output_tokens, self.body(prompt, name))
        answer = self.send(ask, name)
        report(self.environment, f"{kind} {self.way}", answer, answer.failure(ask), time.monotonic() - begun_s)

    def body(self, prompt: list[int], name: str) -> bytes:
        """Of the request."""
        raise NotImplementedError

    def send(self, ask: Ask, name: str) -> Answer:
        """What came; an error stands in it."""
        raise NotImplementedError


def short(user: PromptUser) -> None:
    """Task."""
    user.one("short")


def long(user: PromptUser) -> None:
    """Task."""
    user.one("long")


class HttpPrompts(PromptUser, FastHttpUser):
    """OpenAI's API, streamed, over one kept-open connection per user."""

    way = "http"

    def body(self, prompt: list[int], name: str) -> bytes:
        """See `PromptUser`."""
        return http_body(prompt, self.options.output_tokens)

    def send(self, ask: Ask, name: str) -> Answer:
        """See `PromptUser`. Locust's own event is left out: it would tell the time to the answer's head."""
        headers = {"Content-Type": "application/json", "X-Request-Id": name}
        if self.options.api_key:
            headers["Authorization"] = f"Bearer {self.options.api_key}"
        answer = Answer(time.monotonic())
        client: Any = self.client  # typed for text alone
        response = client.post("/v1/completions", data=ask.body, headers=headers, stream=True, catch_response=True)
        answer.status = response.status_code
        if response.status_code != 200:
            reason = getattr(response, "error", None) or response.text
            answer.error = f"status {response.status_code}: {reason}"[:ERROR_CHARS_MAX]
            return answer
        try:
            while not answer.done and (event := response.stream.readline(SSE_END)):
                take_event(answer, event.removesuffix(SSE_END), time.monotonic())
            response.stream.read()  # the end of the body: then the connection is good for another
        except (OSError, msgspec.MsgspecError) as error:
            answer.error = str(error) or type(error).__name__
        finally:
            response.stream.release()  # closed, if a user is killed in the midst of it: the router cancels
        return answer


class NatsPrompts(PromptUser):
    """`pecsched.v1.generate`, by nats-py: one connection for all users of this process."""

    way = "nats"
    loop_thread: ClassVar[LoopThread]
    connection: ClassVar[NatsClient]

    def body(self, prompt: list[int], name: str) -> bytes:
        """See `PromptUser`."""
        return nats_body(prompt, self.options.output_tokens, name)

    def send(self, ask: Ask, name: str) -> Answer:
        """See `PromptUser`."""
        return self.loop_thread.run(lambda: self.connection.complete(ask, name))


def report(environment: Environment, name: str, answer: Answer, failure: str | None, took_s: float) -> None:
    """To locust's statistics. Times count from the sending; `took_s`: how long a failed one took."""
    fire = environment.events.request.fire
    common: dict[str, Any] = {"name": name, "response_length": 0, "context": {}}
    if failure is not None or answer.first_s is None or answer.last_s is None:
        error = AnswerFailed(failure or "no token")
        fire(request_type="JCT", response_time=took_s * MILLISECONDS, exception=error, **common)
        return
    figures = {"TTFT": answer.first_s - answer.sent_s, "JCT": answer.last_s - answer.sent_s}
    if answer.tokens > 1:
        figures["ITL"] = (answer.last_s - answer.first_s) / (answer.tokens - 1)
    for kind, seconds in figures.items():
        fire(request_type=kind, response_time=seconds * MILLISECONDS, exception=None, **common)
