"""Fits the cost model's coefficients of a GPU to measured tables (`gpu_profiles.py`: what they must hold).

What is fitted: matmuls and the other kernels of a layer over all shapes, tensor-parallel degrees and numbers of tokens
in the tables, with the least squared relative error; links (all-reduce and send/receive) as a latency and a bandwidth,
with the least absolute relative error, because the tables of collectives have outliers.

What is not in the tables stands in the result as what it is: data sheet, or ASSUMPTION (attention's share of the peak,
bandwidth between nodes, usable share of the memory), settable by flags here and in every scenario.

Printed: the fit's relative error per table, (fitted − measured) ÷ measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from common.policy.cost_model import FLOPS_PER_MAC, CostModel
from common.policy.processors import Coefficients, Link
from loadtest import gpu_profiles, report
from loadtest.gpu_profiles import CollectiveTable, LinearTable, Operation, Profiles, ProfilesError

DTYPE_BYTES = 2
"""The tables are of bf16."""
DIGITS = 4
"""Significant ones that are written: the fit is no better."""

TOKEN_RANGES = ((1, 64), (65, 256), (257, 1023), (1024, 4096))
BYTE_RANGES = ((1, 64 << 10), (64 << 10, 4 << 20), (4 << 20, 16 << 20), (16 << 20, 1 << 40))


@dataclass(frozen=True, slots=True)
class DataSheet:
    memory_bytes: int
    peak_flops: float
    """Dense bf16, a multiply-add counts 2."""


DATA_SHEETS = {
    "a100": DataSheet(memory_bytes=80_000_000_000, peak_flops=312e12),
    "h100": DataSheet(memory_bytes=80_000_000_000, peak_flops=989e12),
}
"""NVIDIA A100 80GB SXM, H100 80GB SXM."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    profiles: str
    gpu: str = "a100"
    out: str = ""
    attention_share: float = 0.6
    inter_node_gbps: float = 400.0
    memory_share: float = 0.9


class LayerSample(NamedTuple):
    table: LinearTable
    tokens: int
    weights: float
    """Elements on one rank."""
    hidden: int
    activation_width: float
    """Elements on one rank."""
    matmuls_s: float
    other_s: float


class LinkSample(NamedTuple):
    table: CollectiveTable
    size: int
    volume: float
    """Bytes over one rank's link."""
    seconds: float


@dataclass(frozen=True, slots=True)
class FittedLink:
    title: str
    samples: Sequence[LinkSample]
    link: Link


def run(options: FitOptions) -> dict[str, Any]:
    """The coefficients and the errors of the fit; writes the file if one is named.

    Raises: ProfilesError, report.ReportError."""
    profiles = gpu_profiles.read(options.profiles)
    samples = layer_samples(profiles, options.gpu)
    if not samples:
        raise ProfilesError(f"{options.profiles}: $.linear_ms_per_layer has no table of {options.gpu}")
    links = {
        "all_reduce": _fit_link(profiles, options, "all_reduce", crosses_nodes=False),
        "intra_node": _fit_link(profiles, options, "send_recv", crosses_nodes=False),
        "inter_node": _fit_link(profiles, options, "send_recv", crosses_nodes=True),
    }
    coefficients = _coefficients(profiles, options, samples, links)
    if options.out:
        _write(options.out, coefficients)
    return {
        "coefficients": msgspec.to_builtins(coefficients),
        "linear_errors": _linear_errors(coefficients, samples),
        "link_errors": [
            row for fitted in (*links.values(), *_unused_links(profiles, options)) for row in _link_errors(fitted)
        ],
        "out": options.out,
    }


def least(loss: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """Positive parameters at a local minimum: each in turn is tried a factor up and down, and the factor shrinks when
    nothing gets better. Deterministic; the losses here are smooth with few parameters of known magnitude."""
    found, best, step = list(start), loss(start), 0.3
    while step > 1e-4:
        better = False
        for at in range(len(found)):
            for factor in (math.exp(step), math.exp(-step)):
                tried = [*found[:at], found[at] * factor, *found[at + 1 :]]
                lost = loss(tried)
                if lost < best:
                    found, best, better = tried, lost, True
        if not better:
            step /= 2
    return found


def layer_samples(profiles: Profiles, gpu: str) -> list[LayerSample]:
    """Every entry of its tables of linear work."""
    samples = []
    for table in profiles.linear(gpu):
        shape = table.model_shape()
        weights = shape.linear_macs_per_token / table.tp
        width = shape.activation_width / table.tp
        for tokens, took in table.by_tokens.items():
            samples.append(LayerSample(table, tokens, weights, shape.hidden, width, took.matmuls_s, took.other_s))
    return samples


def fit_matmuls(samples: Sequence[LayerSample]) -> tuple[float, float, float]:
    """(linear_flops, memory_bytes_s, layer_s)."""

    def loss(parameters: Sequence[float]) -> float:
        flops, memory, fixed = parameters
        return sum(
            ((fixed + s.weights * math.hypot(DTYPE_BYTES / memory, FLOPS_PER_MAC * s.tokens / flops)) / s.matmuls_s - 1)
            ** 2
            for s in samples
        )

    flops, memory, fixed = least(loss, (3e14, 2e12, 1e-5))
    return flops, memory, fixed


def fit_other(samples: Sequence[LayerSample]) -> tuple[float, float, float, float]:
    """(other_s, other_tokens, norm_element_s, activation_element_s)."""

    def loss(parameters: Sequence[float]) -> float:
        fixed, tokens, norm, activation = parameters
        return sum(
            ((fixed + max(s.tokens, tokens) * (norm * s.hidden + activation * s.activation_width)) / s.other_s - 1) ** 2
            for s in samples
        )

    fixed, tokens, norm, activation = least(loss, (8e-6, 100.0, 1e-11, 3e-12))
    return fixed, tokens, norm, activation


def fit_link(samples: Sequence[LinkSample]) -> Link:
    """Latency, and bytes per second of a rank's own link."""

    def loss(parameters: Sequence[float]) -> float:
        latency, bandwidth = parameters
        return sum(abs((latency + s.volume / bandwidth) / s.seconds - 1) for s in samples)

    latency, bandwidth = least(loss, (2e-5, 1e11))
    return Link(latency_s=_rounded(latency), bytes_s=_rounded(bandwidth))


def _fit_link(profiles: Profiles, options: FitOptions, op: Operation, *, crosses_nodes: bool) -> FittedLink:
    """Raises: ProfilesError."""
    where = "between nodes" if crosses_nodes else "in a node"
    samples = []
    for table in profiles.collectives(options.gpu, op, crosses_nodes=crosses_nodes):
        # A ring sends each byte of an all-reduce twice, less the share each rank keeps.
        load = 2 * (table.workers - 1) / table.workers if op == "all_reduce" else 1.0
        samples += [LinkSample(table, size, size * load, ms / 1e3) for size, ms in table.by_bytes.items()]
    if len(samples) < 2:
        raise ProfilesError(f"{options.profiles}: $.collective_ms has no table of {op} {where} for {options.gpu}")
    return FittedLink(f"{op.replace('_', '-')} {where}", samples, fit_link(samples))


def _unused_links(profiles: Profiles, options: FitOptions) -> list[FittedLink]:
    """What the model never does (tensor parallelism stays in a node), shown for comparison."""
    if not profiles.collectives(options.gpu, "all_reduce", crosses_nodes=True):
        return []
    return [_fit_link(profiles, options, "all_reduce", crosses_nodes=True)]


def _coefficients(
    profiles: Profiles, options: FitOptions, samples: Sequence[LayerSample], links: dict[str, FittedLink]
) -> Coefficients:
    sheet = DATA_SHEETS[options.gpu]
    flops, memory, layer_s = fit_matmuls(samples)
    other_s, other_tokens, norm, activation = fit_other(samples)
    between = links["inter_node"].link
    return Coefficients(
        name=options.gpu,
        source=f"python -m loadtest fit-costs --gpu {options.gpu}, from these tables: {profiles.source}",
        sources=_sources(options, samples, links),
        memory_bytes=sheet.memory_bytes,
        peak_flops=sheet.peak_flops,
        memory_share=options.memory_share,
        linear_flops=_rounded(flops),
        memory_bytes_s=_rounded(memory),
        layer_s=_rounded(layer_s),
        other_s=_rounded(other_s),
        other_tokens=_rounded(other_tokens),
        norm_element_s=_rounded(norm),
        activation_element_s=_rounded(activation),
        attention_flops=_rounded(options.attention_share * sheet.peak_flops),
        all_reduce=links["all_reduce"].link,
        intra_node=links["intra_node"].link,
        inter_node=Link(latency_s=between.latency_s, bytes_s=options.inter_node_gbps * 1e9 / 8),
    )


def _sources(options: FitOptions, samples: Sequence[LayerSample], links: dict[str, FittedLink]) -> dict[str, str]:
    """Field of `Coefficients` → where its value is from."""
    shapes = ", ".join(sorted({s.table.shape_of for s in samples}))
    degrees = ", ".join(str(tp) for tp in sorted({s.table.tp for s in samples}))
    counts = [s.tokens for s in samples]
    fit = f"fitted over {shapes}; tp {degrees}; {min(counts)} to {max(counts)} tokens"
    pair_gb_s = links["inter_node"].link.bytes_s / 1e9
    sheet = "data sheet of the SXM version with 80 GB"
    return {
        "memory_bytes": sheet,
        "peak_flops": f"{sheet}, dense bf16",
        "memory_share": f"ASSUMPTION: {options.memory_share:.0%} for weights and KV, the rest for activations",
        **dict.fromkeys(("linear_flops", "memory_bytes_s", "layer_s"), f"matmuls, {fit}"),
        **dict.fromkeys(
            ("other_s", "other_tokens", "norm_element_s", "activation_element_s"),
            f"all but matmuls and attention, {fit}",
        ),
        "attention_flops": f"ASSUMPTION: {options.attention_share:.0%} of peak_flops; the tables have no attention",
        "all_reduce": "fitted to all-reduce in a node",
        "intra_node": "fitted to send/receive in a node",
        "inter_node": (
            f"latency fitted to send/receive between nodes; bandwidth ASSUMPTION: {options.inter_node_gbps:g} Gb/s per "
            f"node (in the tables one pair of GPUs reached {pair_gb_s:.3g} GB/s)"
        ),
    }


def _write(path: str, coefficients: Coefficients) -> None:
    """Raises: report.ReportError."""
    try:
        Path(path).expanduser().write_bytes(msgspec.json.format(msgspec.json.encode(coefficients)) + b"\n")
    except OSError as error:
        raise report.ReportError(f"--out {path}: {error.strerror}") from error


def _linear_errors(coefficients: Coefficients, samples: Sequence[LayerSample]) -> list[dict[str, Any]]:
    """Per table: error of a whole layer, by range of tokens."""
    rows = []
    for table in dict.fromkeys((s.table.shape_of, s.table.tp) for s in samples):
        mine = [s for s in samples if (s.table.shape_of, s.table.tp) == table]
        model = CostModel(mine[0].table.model_shape(), coefficients, tp=table[1], gpus_per_node=table[1])
        errors = [(s.tokens, _layer_s(model, s) / (s.matmuls_s + s.other_s) - 1) for s in mine]
        rows.append({"shape_of": table[0], "tp": table[1], "by_range": _by_range(errors, TOKEN_RANGES)})
    return rows


def _layer_s(model: CostModel, sample: LayerSample) -> float:
    return model.matmul_s(sample.weights, sample.tokens) + model.other_s(sample.tokens, model.tp)


def _link_errors(fitted: FittedLink) -> list[dict[str, Any]]:
    rows = []
    for workers in sorted({s.table.workers for s in fitted.samples}):
        errors = [
            (s.size, fitted.link.seconds(s.volume) / s.seconds - 1)
            for s in fitted.samples
            if s.table.workers == workers
        ]
        by_range = _by_range(errors, BYTE_RANGES)
        rows.append(
            {
                "link": fitted.title,
                "workers": workers,
                "fitted": f"{fitted.link.latency_s * 1e6:.0f} µs, {fitted.link.bytes_s / 1e9:.3g} GB/s",
                "by_range": by_range,
            }
        )
    return rows


def _by_range(errors: Sequence[tuple[int, float]], ranges: Sequence[tuple[int, int]]) -> list[dict[str, float] | None]:
    """Mean and largest of each range; None where it has none."""
    found: list[dict[str, float] | None] = []
    for low, high in ranges:
        here = [error for size, error in errors if low <= size <= high]
        found.append({"mean": statistics.fmean(here), "worst": max(here, key=abs)} if here else None)
    return found


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def show(figures: dict[str, Any]) -> None:
    """Print the coefficients and the errors."""
    found = figures["coefficients"]
    rows = [[field, _text(found[field])] for field in found["sources"]]
    fields_by_source: dict[str, list[str]] = {}
    for field, source in found["sources"].items():
        fields_by_source.setdefault(source, []).append(field)
    notes = ["", *(f"{', '.join(fields)}: {source}" for source, fields in fields_by_source.items())]
    report.table(f"{found['name']}: coefficients", ("field", "value"), rows, notes)
    heads = [f"{low}–{high} tokens" for low, high in TOKEN_RANGES]
    rows = [[f"{row['shape_of']}, tp {row['tp']}", *map(_cell, row["by_range"])] for row in figures["linear_errors"]]
    report.table("A layer without attention: mean (worst) relative error", ("table", *heads), rows)
    heads = ["fitted", "up to 64 KB", "to 4 MB", "to 16 MB", "larger"]
    rows = [
        [f"{row['link']}, {row['workers']} GPUs", row["fitted"], *map(_cell, row["by_range"])]
        for row in figures["link_errors"]
    ]
    notes = [
        "Between nodes the model takes the bandwidth assumed above, not the one fitted here, and reduces nothing there."
    ]
    report.table("Links: mean (worst) relative error", ("table", *heads), rows, notes)
    if figures["out"]:
        print(f"\nwritten to {figures['out']}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['latency_s']:.4g} s, {value['bytes_s']:.4g} B/s"
    return f"{value:.4g}"


def _cell(errors: dict[str, float] | None) -> str:
    return report.MISSING if errors is None else f"{errors['mean']:+.0%} ({errors['worst']:+.0%})"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    defaults = FitOptions(profiles="")
    parser.add_argument("--profiles", required=True, metavar="FILE", help="the measured tables")
    parser.add_argument("--gpu", choices=sorted(DATA_SHEETS), default=defaults.gpu, help=f"[{defaults.gpu}]")
    parser.add_argument("--out", default="", metavar="FILE", help="write the coefficients there [only print them]")
    parser.add_argument(
        "--attention-share", type=_share, default=defaults.attention_share, help="of the peak, in prefill [0.6]"
    )
    parser.add_argument(
        "--inter-node-gbps", type=_more_than_0, default=defaults.inter_node_gbps, help="of a whole node [400]"
    )
    parser.add_argument("--memory-share", type=_share, default=defaults.memory_share, help="for weights and KV [0.9]")


def run_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """See `run`."""
    return run(
        FitOptions(
            profiles=flags.profiles,
            gpu=flags.gpu,
            out=flags.out,
            attention_share=flags.attention_share,
            inter_node_gbps=flags.inter_node_gbps,
            memory_share=flags.memory_share,
        )
    )


def _more_than_0(text: str) -> float:
    number = float(text)
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 1")
    return number
