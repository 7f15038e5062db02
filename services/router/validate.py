"""From what a client sent to what the cluster is to generate, or to one clear error. Pure.

Two halves, with tokenizing (the router's, off the event loop) between them: `plan_*` checks every
parameter, `drafts` checks lengths once the prompts are token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from common.messages.requests import SamplingParams
from common.units import RequestId
from services.router.api_errors import ApiError, bad_request
from services.router.api_types import (
    NO_EFFECT,
    NO_EFFECT_IN_MESSAGE,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    OpenAiRequest,
    Request,
)

N_MAX = 16
CHOICES_MAX = 128
STOPS_MAX = 4
STOP_CHARS_MAX = 512
TOP_K_MAX = 1_000_000
DEADLINE_S_MAX = 86_400.0
SEED_MAX = 2**63 - 1
METADATA_MAX = 16
REQUEST_ID = re.compile(r"[A-Za-z0-9._@=+-]{1,128}")

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role in the API → role in the chat template."""

Encoding = Literal["json", "msgpack"]
RequestT = TypeVar("RequestT", bound=msgspec.Struct)
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What must be known of the model to judge a request."""

    name: str
    context_tokens: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    default_max_tokens: int
    has_chat_template: bool = True


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, in the words of the chat template."""

    messages: tuple[dict[str, str], ...]


PromptInput = str | ChatPrompt | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A request whose parameters are in order. Choice index: `prompt * n + i`."""

    prompts: tuple[PromptInput, ...]
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    sampling: SamplingParams
    """Its seed is not set yet."""
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """One generation of a request, ready to be submitted."""

    prompt_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    deadline_s: float | None = None


def parse(body: bytes, shape: type[RequestT], encoding: Encoding = "json") -> RequestT:
    """Bytes to a request of this shape. Raises: ApiError 400 that names the wrong field."""
    try:
        if encoding == "json":
            return msgspec.json.decode(body, type=shape)
        return msgspec.msgpack.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = "JSON" if encoding == "json" else "MessagePack"
        raise bad_request(f"the body is not valid {name}: {error}", code="malformed_body") from error


def _field_error(text: str) -> ApiError:
    what, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if what.startswith("Object contains unknown field"):
        field = what.split("`")[1]
        where = f" (in {path})" if path else ""
        return bad_request(f"unknown parameter: {field!r}{where}", param=field, code="unknown_parameter")
    if what.startswith("Object missing required field"):
        field = what.split("`")[1]
        return bad_request(f"missing parameter: {field!r}", param=path or field, code="missing_parameter")
    param = path.split("[")[0].split(".")[0] or None
    return bad_request(f"{path}: {what}" if path else what, param=param, code="invalid_type")


def plan_chat(request: ChatRequest, facts: ModelFacts) -> Plan:
    """Raises: ApiError 400, or 404 for another model's name."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    top = _within("top_logprobs", request.top_logprobs, 0, 20)
    return _plan(
        request,
        facts,
        prompts=(_chat(request.messages, facts),),
        max_tokens=_max_tokens(request.max_tokens, request.max_completion_tokens),
        logprobs=(top or 0) if request.logprobs else None,
    )


def plan_completion(request: CompletionRequest, facts: ModelFacts) -> Plan:
    """Raises: ApiError 400, or 404 for another model's name."""
    return _plan(
        request,
        facts,
        prompts=_prompts(request.prompt, facts),
        max_tokens=_max_tokens(request.max_tokens, None),
        logprobs=_within("logprobs", request.logprobs, 0, 5),
    )


def plan_generate(request: GenerateRequest, facts: ModelFacts) -> Plan:
    """Raises: ApiError 400, or 404 for another model's name."""
    given = [f for f in ("prompt", "messages", "prompt_token_ids") if getattr(request, f) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise bad_request(f"exactly one of prompt, messages, prompt_token_ids is needed, got {found}", param="prompt")
    prompts: tuple[PromptInput, ...]
    if request.messages is not None:
        prompts = (_chat(request.messages, facts),)
    elif request.prompt_token_ids is not None:
        prompts = (_token_ids(request.prompt_token_ids, facts, "prompt_token_ids"),)
    else:
        prompts = _prompts(request.prompt, facts)
    return _plan(
        request,
        facts,
        prompts=prompts,
        max_tokens=_max_tokens(request.max_tokens, request.max_completion_tokens),
        logprobs=_within("logprobs", request.logprobs, 0, 20),
        stream=request.stream is not False,
    )


def _plan(
    request: Request,
    facts: ModelFacts,
    *,
    prompts: tuple[PromptInput, ...],
    max_tokens: int | None,
    logprobs: int | None,
    stream: bool | None = None,
) -> Plan:
    if request.model is not None and request.model != facts.name:
        message = f"the model {request.model!r} is not served here; {facts.name!r} is"
        raise ApiError(404, "model_not_found", message, param="model")
    n = _within("n", request.n, 1, N_MAX) or 1
    if len(prompts) * n > CHOICES_MAX:
        raise bad_request(f"{len(prompts)} prompts times n={n}: at most {CHOICES_MAX} choices", param="n")
    _only_defaults(request, NO_EFFECT)
    if request.metadata is not None and len(request.metadata) > METADATA_MAX:
        raise bad_request(f"metadata has {len(request.metadata)} entries; at most {METADATA_MAX}", param="metadata")
    streaming = bool(request.stream) if stream is None else stream
    return Plan(
        prompts=prompts,
        n=n,
        stream=streaming,
        include_usage=_include_usage(request, streaming),
        max_tokens=max_tokens,
        sampling=_sampling(request, logprobs),
        seed=_within("seed", request.seed, 0, SEED_MAX),
        stop=_stops(request.stop),
        ignore_eos=bool(request.ignore_eos),
        deadline_s=_within("deadline_s", request.deadline_s, 0.0, DEADLINE_S_MAX),
    )


def drafts(plan: Plan, prompts_ids: Sequence[Sequence[int]], facts: ModelFacts, fresh_seed: int) -> list[Draft]:
    """One draft per choice. `fresh_seed` serves where the client names none; choices draw from different seeds.

    Raises: ApiError 400 for an empty prompt or one that does not fit the context.
    """
    seed = plan.seed if plan.seed is not None else fresh_seed
    found: list[Draft] = []
    for ids in prompts_ids:
        max_tokens = _fitting(len(ids), plan.max_tokens, facts)
        for _ in range(plan.n):
            sampling = msgspec.structs.replace(plan.sampling, seed=(seed + len(found)) % (SEED_MAX + 1))
            stop_ids = () if plan.ignore_eos else facts.stop_token_ids
            found.append(Draft(ids, max_tokens, sampling, stop_ids, plan.stop, plan.deadline_s))
    return found


def _fitting(prompt_tokens: int, max_tokens: int | None, facts: ModelFacts) -> int:
    if prompt_tokens == 0:
        raise bad_request("the prompt is empty", param="prompt", code="empty_prompt")
    room = facts.context_tokens - prompt_tokens
    wanted = min(facts.default_max_tokens, room) if max_tokens is None else max_tokens
    if wanted > room or room < 1:
        total = "" if max_tokens is None else f" + max_tokens {max_tokens} = {prompt_tokens + max_tokens}"
        advice = f"ask for {room} tokens at most, or shorten the prompt" if room >= 1 else "shorten the prompt"
        raise bad_request(
            f"the context holds {facts.context_tokens} tokens; prompt {prompt_tokens}{total}: {advice}",
            param="max_tokens" if room >= 1 else "prompt",
            code="context_length_exceeded",
        )
    return wanted


def check_request_id(request_id: str) -> RequestId:
    """Raises: ApiError 400."""
    if not REQUEST_ID.fullmatch(request_id):
        raise bad_request("a request id has 1 to 128 characters out of A-Z a-z 0-9 . _ @ = + -", param="request_id")
    return RequestId(request_id)


# --- parts ----------------------------------------------------------------------------------------


def _prompts(prompt: Any, facts: ModelFacts) -> tuple[PromptInput, ...]:
    if isinstance(prompt, str):
        return (_text(prompt),)
    if not isinstance(prompt, list):
        raise bad_request(
            "prompt must be a text, a list of texts, token ids, or a list of token id lists",
            param="prompt",
            code="invalid_type",
        )
    if not prompt:
        raise bad_request("the prompt is empty", param="prompt", code="empty_prompt")
    if isinstance(prompt[0], str):
        return tuple(_text(text) for text in _as(prompt, list[str]))
    if isinstance(prompt[0], list):
        return tuple(_token_ids(ids, facts, "prompt") for ids in prompt)
    return (_token_ids(prompt, facts, "prompt"),)


def _text(text: str) -> str:
    if not text:
        raise bad_request("the prompt is empty", param="prompt", code="empty_prompt")
    return text


def _token_ids(ids: Any, facts: ModelFacts, param: str) -> tuple[int, ...]:
    if not ids:
        raise bad_request("the prompt is empty", param=param, code="empty_prompt")
    found: tuple[int, ...] = _as(ids, tuple[Annotated[int, msgspec.Meta(ge=0)], ...], param)
    highest = max(found)
    if highest >= facts.vocab_size:
        raise bad_request(f"token id {highest} is outside the vocabulary of {facts.vocab_size}", param=param)
    return found


def _as(value: Any, kind: Any, param: str = "prompt") -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace(" - at $", f" - at {param}")
        raise bad_request(text, param=param, code="invalid_type") from error


def _chat(messages: list[ChatMessage], facts: ModelFacts) -> ChatPrompt:
    if not facts.has_chat_template:
        raise bad_request(
            f"the model {facts.name!r} has no chat template; use a text prompt",
            param="messages",
            code="no_chat_template",
        )
    if not messages:
        raise bad_request("messages is empty", param="messages", code="empty_prompt")
    return ChatPrompt(tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages)))


def _message(message: ChatMessage, where: str) -> dict[str, str]:
    _only_defaults(message, NO_EFFECT_IN_MESSAGE, where + ".")
    role = ROLES.get(message.role)
    if role is None:
        known = ", ".join(ROLES)
        raise bad_request(f"{where}.role {message.role!r} is not supported; one of {known}", param=f"{where}.role")
    content = message.content
    if content is None:
        raise bad_request(f"{where}.content is missing", param=f"{where}.content", code="missing_parameter")
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise bad_request(
                    f"{where}.content: a part of type {part.type!r} is not supported; only text parts with a text",
                    param=f"{where}.content",
                )
        content = "".join(part.text or "" for part in content)
    rendered = {"role": role, "content": content}
    return rendered if message.name is None else {**rendered, "name": message.name}


def _only_defaults(request: msgspec.Struct, no_effect: dict[str, tuple[Any, ...]], where: str = "") -> None:
    for field, harmless in no_effect.items():
        value = getattr(request, field, None)
        # `==` alone would take True for 1 and False for 0.
        if value is None or any(value == h and isinstance(value, bool) == isinstance(h, bool) for h in harmless):
            continue
        raise bad_request(f"{where}{field} is not supported", param=where + field, code="unsupported_parameter")


def _sampling(request: Request, logprobs: int | None) -> SamplingParams:
    top_p = _within("top_p", request.top_p, 0.0, 1.0)
    if top_p == 0.0:
        raise bad_request("top_p must be above 0", param="top_p")
    temperature = _within("temperature", request.temperature, 0.0, 2.0)
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=_within("top_k", request.top_k, 0, TOP_K_MAX) or 0,
        logprobs=logprobs,
    )


def _within(name: str, value: Number | None, low: Number, high: Number) -> Number | None:
    # Written so that NaN, which MessagePack can carry, fails too.
    if value is not None and not low <= value <= high:
        raise bad_request(f"{name} must be between {low} and {high}, got {value}", param=name)
    return value


def _max_tokens(max_tokens: int | None, max_completion_tokens: int | None) -> int | None:
    name = "max_tokens" if max_completion_tokens is None else "max_completion_tokens"
    if None not in (max_tokens, max_completion_tokens) and max_tokens != max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", param=name)
    return _within(name, max_tokens if max_completion_tokens is None else max_completion_tokens, 1, 2**31 - 1)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > STOPS_MAX:
        raise bad_request(f"at most {STOPS_MAX} stop strings, got {len(stops)}", param="stop")
    if any(not 1 <= len(s) <= STOP_CHARS_MAX for s in stops):
        raise bad_request(f"a stop string has 1 to {STOP_CHARS_MAX} characters", param="stop")
    return stops


def _include_usage(request: Request, stream: bool) -> bool:
    options = request.stream_options if isinstance(request, OpenAiRequest) else None
    if options is None:
        return False
    if not stream:
        raise bad_request("stream_options needs stream: true", param="stream_options")
    return bool(options.include_usage)
