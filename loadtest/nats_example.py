"""Ask PecSched over NATS: `python -m loadtest.nats_example "The capital of France is"`.

The whole protocol: publish a JSON object to `pecsched.v1.generate` with a reply inbox; every message on the
inbox carries new text, until one has the header `Pecsched-Done`, with the usage or an `error`. Closing
the client does not cancel the request: that is a message to `pecsched.v1.cancel`.
The same from a shell, as a single answer: `nats request pecsched.v1.generate '{"prompt": "…", "stream": false}'`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import nats
from nats.aio.client import Client

SILENCE_S = 120.0
"""Longest wait for the next message."""


async def generate(client: Client, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Messages of one request as they come, the last one (`"done": true`) too. Leaving early cancels it.

    Raises: nats.errors.NoRespondersError, if no router runs; TimeoutError, after a long silence.
    """
    request_id = f"example-{uuid.uuid4().hex}"
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    done = False
    try:
        body = json.dumps({"request_id": request_id, **request}).encode()
        await client.publish("pecsched.v1.generate", body, reply=inbox, headers={"Content-Type": "application/json"})
        while not done:
            message = await answers.next_msg(timeout=SILENCE_S)
            headers = message.headers or {}
            if headers.get("Status") == "503":
                done = True
                raise nats.errors.NoRespondersError
            done = headers.get("Pecsched-Done") == "true"
            yield json.loads(message.data)
    finally:
        if not done:
            await client.publish("pecsched.v1.cancel", json.dumps({"request_id": request_id}).encode(), reply=inbox)
            await client.flush()
        await answers.unsubscribe()


async def main(prompt: str, *, nats_url: str, max_tokens: int) -> int:
    """Print the answer as it is generated. Returns the exit status."""
    client = await nats.connect(nats_url, name="nats-example")
    try:
        messages = [{"role": "user", "content": prompt}]
        async for part in generate(client, {"messages": messages, "max_tokens": max_tokens, "temperature": 0}):
            if "error" in part:
                print(f"\nerror: {part['error']['message']}", file=sys.stderr)
                return 1
            print(part.get("text", ""), end="", flush=True)
            if part.get("done"):
                print(f"\n{part['usage']}")
    except nats.errors.NoRespondersError:
        print("no router serves pecsched.v1.generate here", file=sys.stderr)
        return 1
    finally:
        await client.close()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask PecSched over NATS.")
    parser.add_argument("prompt")
    parser.add_argument("--nats-url", default="nats://127.0.0.1:4222")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    sys.exit(asyncio.run(main(given.prompt, nats_url=given.nats_url, max_tokens=given.max_tokens)))
