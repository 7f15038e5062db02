"""Makes an instance of any record from its types alone, so that no message class can be forgotten."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import msgspec
from msgspec import inspect

import common.messages
from common.messages.base import Message, Record


def all_records() -> list[type[Record]]:
    """Every concrete record of `common.messages`, messages included."""
    found: dict[str, type[Record]] = {}
    for module_info in pkgutil.iter_modules(common.messages.__path__):
        module = importlib.import_module(f"common.messages.{module_info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Record) and value not in (Record, Message):
                found[value.__qualname__] = value
    return [found[name] for name in sorted(found)]


def all_messages() -> list[type[Message]]:
    return [record for record in all_records() if issubclass(record, Message)]


def sample(record_type: type[Record], *, full: bool) -> Any:
    """`full`: every optional field is set and every sequence has two items; else the least there may be."""
    return msgspec.convert(_fields(inspect.type_info(record_type), full), record_type)


def _fields(struct: Any, full: bool) -> dict[str, Any]:
    fields = {field.encode_name: _value(field.type, full) for field in struct.fields if full or field.required}
    if struct.tag is not None:
        fields[struct.tag_field] = struct.tag
    if "v" in fields:
        fields["v"] = 1
    return fields


def _value(kind: Any, full: bool) -> Any:
    match kind:
        case inspect.StructType():
            return _fields(kind, full)
        case inspect.UnionType(types=types):
            absent = [option for option in types if isinstance(option, inspect.NoneType)]
            present = [option for option in types if not isinstance(option, inspect.NoneType)]
            return None if absent and not full else _value(present[0], full)
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return [_value(item, full)] * (2 if full else 0)
        case inspect.TupleType(item_types=items):
            return [_value(item, full) for item in items]
        case inspect.DictType(value_type=item):
            return {"one": _value(item, full)} if full else {}
        case _:
            return _scalar(kind)


def _scalar(kind: Any) -> Any:
    match kind:
        case inspect.StrType():
            return "ä-1"
        case inspect.BytesType():
            return b"\x00\xff\x80"
        case inspect.BoolType():
            return True
        case inspect.IntType(ge=ge):
            return (ge or 0) + 1 if ge is None or ge >= 0 else ge
        case inspect.FloatType():
            return 0.1
        case inspect.LiteralType(values=values):
            return values[-1]
        case inspect.NoneType():
            return None
        case inspect.AnyType():
            return {"any": [1, "two"]}
        case _:
            raise TypeError(f"no sample for {kind!r}")
