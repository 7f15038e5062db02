"""`pecsched ask`: one question through either door, the answer printed as it is generated.

Also a short example of a client: over HTTP any OpenAI client does the same; over NATS it is one
published message with a reply inbox, and the answers that arrive there up to the one marked last.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec

from common.errors import StartupError
from common.runtime import subjects
from common.runtime.bus import Bus, BusError, Delivery
from common.runtime.bus_nats import connect_nats
from common.settings import AskSettings
from services.run_file import find_running

ANSWERS_MAX = 10_000
"""Answers that wait to be printed; a generation has fewer."""


def ask(settings: AskSettings) -> int:
    """Print the answer. Raises: StartupError, with the server's own words where it refused."""
    question = sys.stdin.read() if settings.question == "-" else settings.question
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
    }
    if settings.via == "nats":
        asyncio.run(_print_from_nats(settings, body))
    else:
        for text in _from_http(settings, body):
            _write(text)
    _write("\n")
    return 0


def _from_http(settings: AskSettings, body: dict[str, Any]) -> Iterator[str]:
    url = (settings.url or find_running(os.environ, "--url").url).rstrip("/")
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    try:
        # trust_env=False: a proxy meant for the web does not know this machine's ports.
        with httpx.Client(base_url=url, headers=headers, timeout=settings.timeout_s, trust_env=False) as http:
            models = _checked(http.get("/v1/models")).json()
            streamed = {**body, "model": models["data"][0]["id"], "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=streamed) as response:
                if response.is_error:
                    response.read()
                yield from _deltas(_checked(response))
    except httpx.HTTPError as error:
        raise StartupError(f"{url}: {str(error) or type(error).__name__}") from error
    except (msgspec.DecodeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StartupError(f"{url}: this is no answer of a PecSched router: {error}") from error


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise StartupError(f"{response.url}: {_refusal(response.content, f'status {response.status_code}')}")
    return response


def _deltas(response: httpx.Response) -> Iterator[str]:
    """Texts out of the server-sent events of a chat."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = msgspec.json.decode(line.removeprefix("data: "))
            if "error" in event:
                raise StartupError(event["error"]["message"])
            yield from (choice["delta"].get("content") or "" for choice in event["choices"])


async def _print_from_nats(settings: AskSettings, body: dict[str, Any]) -> None:
    url = settings.nats_url or find_running(os.environ, "--nats-url").nats_url
    try:
        bus = await connect_nats(url, "pecsched-ask")
    except BusError as error:
        raise StartupError(str(error)) from error
    try:
        async for text in _from_nats(bus, body, settings.timeout_s):
            _write(text)
    except TimeoutError:
        raise StartupError(f"silent for {settings.timeout_s:g} s") from None
    except BusError as error:
        raise StartupError(str(error)) from error
    finally:
        await bus.close()


async def _from_nats(bus: Bus, body: dict[str, Any], timeout_s: float) -> AsyncIterator[str]:
    answers: asyncio.Queue[Delivery] = asyncio.Queue(ANSWERS_MAX)
    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, answers.put)
    try:
        await bus.publish(subjects.GENERATE, msgspec.json.encode(body), reply=inbox)
        while True:
            async with asyncio.timeout(timeout_s):
                delivery = await answers.get()
            answer = _answer(delivery)
            yield answer.get("text") or ""
            if answer.get("done"):
                return
    finally:
        await subscription.unsubscribe()


def _answer(delivery: Delivery) -> dict[str, Any]:
    """One message of the reply inbox. Raises: StartupError, if it is an error or nobody serves the subject."""
    if delivery.headers.get("Status") == "503":
        raise StartupError("no router is there")
    answer = msgspec.json.decode(delivery.data, type=dict[str, Any])
    if answer.get("error"):
        raise StartupError(_refusal(delivery.data, "refused"))
    return answer


def _refusal(data: bytes, otherwise: str) -> str:
    """The message inside an OpenAI-shaped error."""
    try:
        error = msgspec.json.decode(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        return otherwise


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
