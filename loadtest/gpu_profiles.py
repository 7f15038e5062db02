"""Measured times of a GPU's work, as tables in a JSON file: what `fit-costs` fits.

```
{"source": "…",
 "linear_ms_per_layer": [{"gpu": "a100", "shape_of": "…", "shape": {"hidden", "heads", "kv_heads", "ffn", "gated"},
                          "tp": 1, "by_tokens": {"1": {"qkv": ms, "out", "mlp_up", "mlp_down", "other"}, …}}, …],
 "collective_ms": [{"machine": "a100_dgx", "op": "all_reduce" | "send_recv", "workers": 2, "devices_per_node": 2,
                    "crosses_nodes": false, "by_bytes": {"2048": ms, …}}, …]}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.errors import PecSchedError
from common.messages.base import Record
from common.policy.cost_model import ModelShape

Count = Annotated[int, Meta(gt=0)]
Milliseconds = Annotated[float, Meta(gt=0.0)]
Operation = Literal["all_reduce", "send_recv"]


class ProfilesError(PecSchedError):
    """The tables cannot be used. One line: file, place, what is wrong."""


class LayerShape(Record, frozen=True, kw_only=True):
    hidden: Count
    heads: Count
    kv_heads: Count
    ffn: Count
    gated: bool


class LayerMs(Record, frozen=True, kw_only=True):
    """Of one layer on one rank. `other`: norms, rotations, activations, additions; attention is in none."""

    qkv: Milliseconds
    out: Milliseconds
    mlp_up: Milliseconds
    mlp_down: Milliseconds
    other: Milliseconds

    @property
    def matmuls_s(self) -> float:
        return (self.qkv + self.out + self.mlp_up + self.mlp_down) / 1e3

    @property
    def other_s(self) -> float:
        return self.other / 1e3


class LinearTable(Record, frozen=True, kw_only=True):
    gpu: str
    shape_of: str
    shape: LayerShape
    tp: Count
    by_tokens: dict[Count, LayerMs]

    def model_shape(self) -> ModelShape:
        """One layer of it, without a vocabulary."""
        of = self.shape
        return ModelShape(
            name=self.shape_of,
            layers=1,
            hidden=of.hidden,
            heads=of.heads,
            kv_heads=of.kv_heads,
            head_dim=of.hidden // of.heads,
            ffn=of.ffn,
            vocab=0,
            gated=of.gated,
        )


class CollectiveTable(Record, frozen=True, kw_only=True):
    machine: str
    """The GPU's name, or that and a suffix after `_`."""
    op: Operation
    workers: Annotated[int, Meta(ge=2)]
    devices_per_node: Count
    crosses_nodes: bool
    by_bytes: dict[Count, Milliseconds]

    @property
    def gpu(self) -> str:
        return self.machine.partition("_")[0]


class Profiles(Record, frozen=True, kw_only=True):
    source: str
    linear_ms_per_layer: Sequence[LinearTable]
    collective_ms: Sequence[CollectiveTable]

    def linear(self, gpu: str) -> list[LinearTable]:
        return [table for table in self.linear_ms_per_layer if table.gpu == gpu]

    def collectives(self, gpu: str, op: Operation, *, crosses_nodes: bool) -> list[CollectiveTable]:
        return [
            table
            for table in self.collective_ms
            if (table.gpu, table.op, table.crosses_nodes) == (gpu, op, crosses_nodes)
        ]


def read(path: str) -> Profiles:
    """Raises: ProfilesError."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ProfilesError(f"{path}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=Profiles)
    except msgspec.DecodeError as error:
        raise ProfilesError(f"{path}: {error}") from error
    for number, table in enumerate(found.linear_ms_per_layer):
        place = f"{path}: $.linear_ms_per_layer[{number}]"
        of = table.shape
        if of.hidden % of.heads:
            raise ProfilesError(f"{place}.shape: hidden {of.hidden} is not a multiple of its {of.heads} heads")
        if of.heads % table.tp or of.kv_heads % table.tp or of.ffn % table.tp:
            raise ProfilesError(f"{place}.tp: {table.tp} does not divide heads, KV heads or ffn of its shape")
    return found
