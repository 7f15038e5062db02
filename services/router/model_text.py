"""Words of the model: its tokenizer, its chat template, and what its folder says of lengths and stop tokens.

`tokenizers` and `jinja2` are used directly: transformers' own classes import torch, which a router does not need.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from common.errors import StartupError
from services.router.api_errors import bad_request
from services.router.validate import ChatPrompt, ModelFacts, PromptInput


class ModelText:
    """Immutable, and safe to use from several threads. Make one with `load`."""

    def __init__(
        self, tokenizer: Tokenizer, facts: ModelFacts, template: jinja2.Template | None, template_words: dict[str, str]
    ) -> None:
        self.facts = facts
        self._tokenizer = tokenizer
        self._template = template
        self._template_words = template_words
        self._byte_level = "ByteLevel" in str(tokenizer.decoder)

    def encode(self, prompt: PromptInput) -> Sequence[int]:
        """Token ids of a prompt. Raises: ApiError 400, if the chat template refuses the conversation."""
        if isinstance(prompt, tuple):
            return prompt
        text, special = (self.render(prompt), False) if isinstance(prompt, ChatPrompt) else (prompt, True)
        # The batch form releases the interpreter's lock.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def render(self, prompt: ChatPrompt) -> str:
        """The conversation as the model was trained to read it, up to the start of its answer."""
        if self._template is None:
            raise bad_request("the model has no chat template", param="messages", code="no_chat_template")
        try:
            return self._template.render(
                messages=list(prompt.messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._template_words,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise bad_request(f"the model's chat template refuses this: {error}", param="messages") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for; it may be a part of a character."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(c in _byte_of_char() for c in token):
            return bytes(_byte_of_char()[c] for c in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def load(folder: Path, *, name: str, default_max_tokens: int) -> ModelText:
    """Read tokenizer.json, config.json and, where present, generation_config.json, tokenizer_config.json and
    the chat template. Raises: StartupError."""
    config = _json(folder / "config.json")
    text_config = config.get("text_config", config)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise StartupError(f"cannot read the tokenizer {folder / 'tokenizer.json'}: {error}") from error
    # A tokenizer.json may carry the truncation of its training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = _json(folder / "tokenizer_config.json", optional=True)
    source = _template_source(folder, words)
    facts = ModelFacts(
        name=name,
        context_tokens=_positive(text_config, "max_position_embeddings", folder),
        vocab_size=_positive(text_config, "vocab_size", folder),
        stop_token_ids=_stop_ids(folder, config, words, tokenizer),
        default_max_tokens=default_max_tokens,
        has_chat_template=source is not None,
    )
    return ModelText(tokenizer, facts, None if source is None else _compile(source, folder), _special_words(words))


def _json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise StartupError(f"{path} is not a JSON object")
    return found


def _positive(config: dict[str, Any], field: str, folder: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise StartupError(f"{folder / 'config.json'} has no usable {field}: {value!r}")
    return value


def _stop_ids(folder: Path, config: dict[str, Any], words: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end-of-text tokens: the generation config's, else the model's; and the tokenizer's own."""
    ids: set[int] = set()
    for source in (_json(folder / "generation_config.json", optional=True), config):
        found = source.get("eos_token_id")
        ids.update(found if isinstance(found, list) else [found] if isinstance(found, int) else [])
        if ids:
            break
    own = tokenizer.token_to_id(_special_words(words).get("eos_token", ""))
    return tuple(sorted(ids if own is None else ids | {own}))


def _special_words(words: dict[str, Any]) -> dict[str, str]:
    """Special tokens by their role (`bos_token` …), as chat templates name them."""
    found: dict[str, str] = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = words.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[role] = value
    return found


def _template_source(folder: Path, words: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = words.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _compile(source: str, folder: Path) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # The settings that templates are written for; sandboxed, because a template comes with the weights.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise StartupError(f"the chat template in {folder} cannot be used: {error}") from error


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """How byte-level tokenizers write the 256 bytes as printable characters (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
