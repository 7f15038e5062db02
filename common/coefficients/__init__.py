"""Coefficients of processors, for `common.policy.cost_model`: what ships, and the only code that reads such files.

`a100.json` and `h100.json` are written by `python -m loadtest fit-costs`; each names the source of each value.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

import msgspec

from common.errors import PecSchedError
from common.policy.processors import Coefficients, Link

SUFFIX = ".json"


class CoefficientsError(PecSchedError):
    """A file of coefficients cannot be used. One line: file, place, what is wrong."""


def names() -> tuple[str, ...]:
    """Of the processors whose coefficients ship."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX)))


def load(name_or_path: str) -> Coefficients:
    """A processor by name (`names()`), or a file of its own: anything that ends in `.json` or has a folder in it.

    Raises: CoefficientsError."""
    if name_or_path in names():
        return decode((resources.files(__name__) / f"{name_or_path}{SUFFIX}").read_bytes(), name_or_path)
    path = Path(name_or_path).expanduser()
    if path.suffix != SUFFIX and path.name == name_or_path:
        raise CoefficientsError(
            f"{name_or_path}: no such processor: choose {' or '.join(names())}, or give a .json file"
        )
    try:
        return decode(path.read_bytes(), name_or_path)
    except OSError as error:
        raise CoefficientsError(f"{name_or_path}: {error.strerror}") from error


def decode(data: bytes, place: str) -> Coefficients:
    """`place` is named in errors. Raises: CoefficientsError."""
    try:
        found = msgspec.json.decode(data, type=Coefficients)
    except msgspec.DecodeError as error:
        raise CoefficientsError(f"{place}: {error}") from error
    for field in Coefficients.__struct_fields__:
        _check(field, getattr(found, field), place)
        if field not in found.sources and field not in ("name", "source", "sources"):
            raise CoefficientsError(f"{place}: `sources` does not say where {field} is from")
    if found.memory_share > 1.0:
        raise CoefficientsError(f"{place}: memory_share is {found.memory_share:g}, must be at most 1")
    return found


def _check(field: str, value: object, place: str) -> None:
    """Rates must be more than 0, times 0 or more. Raises: CoefficientsError."""
    if isinstance(value, Link):
        _check(f"{field}.latency_s", value.latency_s, place)
        _check(f"{field}.bytes_s", value.bytes_s, place)
        return
    if not isinstance(value, int | float):
        return
    may_be_zero = field in ("layer_s", "other_s", "other_tokens", "norm_element_s", "activation_element_s") or (
        field.endswith("latency_s")
    )
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        raise CoefficientsError(
            f"{place}: {field} is {value:g}, must be {'0 or more' if may_be_zero else 'more than 0'}"
        )
