"""A causal language model, loaded for serving: transformers' own modules and weights, and what the
rest of the engine must know about them.

The five families supported share one shape: `model.embed_tokens`, `model.layers`, `model.norm`,
`model.rotary_emb`, `lm_head`, pre-norm layers with rotary positions and grouped-query attention.
Layers attend by the function that `attention.py` registers, so a layer can be called alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from common.errors import StartupError
from common.messages.cluster import LayerShape
from common.settings import DtypeName
from services.engine import attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""transformers' `model_type` of what the engine serves."""

_LOCAL_FIELDS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Fields of a configuration that say nothing about what the model computes."""


class ModelError(StartupError):
    """The model cannot be served: one line, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on their device, and the figures that size everything else."""

    model_id: str
    module: nn.Module
    """transformers' `…ForCausalLM`, in eval mode."""
    config: Any
    """transformers' configuration of it."""
    dtype: torch.dtype
    device: torch.device
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_tokens: int
    eos_ids: tuple[int, ...]
    fingerprint: str
    """Equal for equal configuration, dtype and shapes of the weights."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def layer_shape(self) -> LayerShape:
        """Of one layer, for who splits its work."""
        return LayerShape(
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden=self.config.hidden_size,
            intermediate=self.config.intermediate_size,
        )

    @property
    def decoder(self) -> Any:
        """The part below the head: `embed_tokens`, `layers`, `norm`, `rotary_emb`."""
        return self.module.model


def load_model(
    folder: Path, *, dtype: DtypeName = "auto", device: str = "auto", model_id: str | None = None
) -> LoadedModel:
    """Load a folder written by `save_pretrained` (`convert.ensure_model` gets one from the hub). Blocking.
    Raises: ModelError."""
    location = _locate(folder)
    config = _read_config(location)
    chosen_device = pick_device(device)
    chosen_dtype = pick_dtype(dtype, chosen_device)
    attention.register()
    disable_progress_bar()
    module = _read_weights(location, chosen_dtype).to(chosen_device).eval()
    return LoadedModel(
        model_id=model_id or location.name,
        module=module,
        config=module.config,
        dtype=chosen_dtype,
        device=chosen_device,
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=module.get_input_embeddings().num_embeddings,
        context_tokens=context_tokens(config),
        eos_ids=_eos_ids(location, config),
        fingerprint=_fingerprint(module, chosen_dtype),
    )


def context_tokens(config: Any) -> int:
    """Longest sequence served. Inside a sliding window attention is plain causal attention, which is
    what the engine computes: so an active window bounds the context."""
    limit = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    active = layer_types is None or "sliding_attention" in layer_types
    return min(limit, int(window)) if window and active else limit


def pick_device(name: str) -> torch.device:
    """Raises: ModelError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r} is not on this machine: use --device auto or cpu")
    return device


def pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    features = torch.cpu.get_capabilities()
    fast = features.get("amx_bf16") or features.get("avx512_bf16")
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def _locate(folder: Path) -> Path:
    """Raises: ModelError."""
    path = folder.expanduser()
    if not path.exists():
        raise ModelError(f"model folder {folder} does not exist: give an existing folder or a hub id such as org/name")
    if not path.is_dir():
        raise ModelError(f"model {folder} is a file: give the folder that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json: give a folder written by save_pretrained")
    return path


def _read_config(location: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of model {location}: {_first_line(error)}") from error
    architectures = tuple(getattr(config, "architectures", None) or ())
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise ModelError(
            f"model {location} is not a causal language model ({', '.join(architectures)}): "
            "give one that generates text"
        )
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model {location} is of family {config.model_type!r}, which is not supported: "
            f"use one of {', '.join(FAMILIES)}"
        )
    return config


def _read_weights(location: Path, dtype: torch.dtype) -> Any:
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, attn_implementation=attention.NAME, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot read the weights of model {location}: {_first_line(error)}") from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(f"model {location} lacks {len(names)} weights ({names[0]}, …): its files are incomplete")
    return module


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _eos_ids(location: Path, config: Any) -> tuple[int, ...]:
    """The ids that end a generation: of the generation configuration if there is one."""
    try:
        ids = GenerationConfig.from_pretrained(location).eos_token_id
    except OSError:
        ids = None
    ids = config.eos_token_id if ids is None else ids
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def _fingerprint(module: Any, dtype: torch.dtype) -> str:
    fields = {key: value for key, value in module.config.to_dict().items() if key not in _LOCAL_FIELDS}
    shapes = [(name, tuple(weight.shape)) for name, weight in module.named_parameters()]
    text = json.dumps([fields, str(dtype), shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
