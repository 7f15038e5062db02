"""Shapes of the requests that clients send. An unknown field is refused, never ignored.

Fields typed `Any` under "accepted at their default" are parameters of OpenAI's API (or of common extensions)
that have no effect at the values in `NO_EFFECT`: those are accepted, any other value is refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What chat, completions and NATS have in common."""

    model: str | None = None
    """None: the one that is served."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None
    deadline_s: float | None = None
    """Seconds by which the first token is wanted: of shorts that wait, the one due first goes first."""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # Accepted at their default.
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    min_p: Any = None
    logit_bias: Any = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class OpenAiRequest(Request, kw_only=True):
    stream_options: StreamOptions | None = None
    safety_identifier: str | None = None
    # Accepted at their default.
    service_tier: Any = None
    prompt_cache_key: Any = None


class ContentPart(msgspec.Struct, kw_only=True):
    """Unknown fields are kept out of the check, so that an image part is refused as such, not for its field."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    # What a client sends back from an earlier answer; accepted when empty.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class ChatRequest(OpenAiRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Accepted at their default.
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    store: Any = None


class CompletionRequest(OpenAiRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: Any
    """Text, list of texts, token ids, or list of token id lists."""
    logprobs: int | None = None
    # Accepted at their default.
    echo: Any = None
    best_of: Any = None
    suffix: Any = None


class GenerateRequest(Request, kw_only=True):
    """`pecsched.v1.generate`: exactly one of `prompt`, `messages`, `prompt_token_ids`."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    prompt_token_ids: list[int] | None = None
    request_id: str | None = None
    logprobs: int | None = None
    max_completion_tokens: int | None = None


class CancelRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`pecsched.v1.cancel`."""

    request_id: str


NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "prompt_cache_key": (),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
"""Values (besides null) at which a parameter that is not supported changes nothing."""

NO_EFFECT_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
}
