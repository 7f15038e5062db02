"""The only encode and decode: records to MessagePack and back.

A record becomes builtins (`msgspec.to_builtins`), builtins become bytes (`msgpack`). On receipt the
bytes become builtins again and every field is validated against the record's types, so that a wrong
message is refused with the path to its wrong field, and nothing behind this file sees a half-valid one.
"""

from __future__ import annotations

from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, get_args, overload

import msgpack
import msgspec

from common.errors import PecSchedError
from common.messages.base import SCHEMA_VERSION, Message, Record

MESSAGE_BYTES_MAX = 8 * 1024 * 1024
"""Largest message that is decoded at all; the bus refuses to send ones above its own, smaller limit."""

_TAG_FIELD = b"\xa4type"
"""How every message goes on after its first bytes, the map's size: msgspec writes the tag first, and a class name of up
to 31 letters behind one byte."""

MessageT = TypeVar("MessageT", bound=Message)
RecordT = TypeVar("RecordT", bound=Record)


class WireError(PecSchedError):
    """Bytes that are not a valid record. The text names the wrong field, such as `$.spec.max_tokens`."""


def encode(message: Message) -> bytes:
    """MessagePack of a tagged message."""
    return _pack(message)


@overload
def decode(data: bytes, types: type[MessageT]) -> MessageT: ...
@overload
def decode(data: bytes, types: UnionType) -> Any: ...
def decode(data: bytes, types: type[MessageT] | UnionType) -> Any:
    """The message of one of these classes (a class, or a union `A | B` of classes).

    Raises: WireError, for bytes that are no MessagePack, for a class not in `types`, a newer schema, a
    missing field or a field of a wrong type.
    """
    fields = _unpack(data)
    known = _classes_by_tag(types)
    tag = fields.get("type")
    found = known.get(tag) if isinstance(tag, str) else None
    if found is None:
        raise WireError(f"unknown message type {str(tag)[:80]!r} at `$.type`; expected one of {', '.join(known)}")
    message: Message = _convert(fields, found)
    if message.v > SCHEMA_VERSION:
        raise WireError(f"{found.__name__} is of schema {message.v} at `$.v`; this process reads {SCHEMA_VERSION}")
    return message


def tag_of(data: bytes) -> str:
    """Class name of an encoded message, read off its first bytes; empty: there is none. For who hears much and reads
    little: nothing is validated."""
    start = {0xDE: 3, 0xDF: 5}.get(data[0], 1) if data else 0
    if data[start : start + len(_TAG_FIELD)] != _TAG_FIELD:
        return ""
    start += len(_TAG_FIELD) + 1
    length = data[start - 1 : start][0] & 0x1F if data[start - 1 : start] else 0
    return data[start : start + length].decode(errors="replace")


def encode_record(record: Record) -> bytes:
    """MessagePack of an untagged record, for the store: the reader knows what to expect."""
    return _pack(record)


def decode_record(data: bytes, record_type: type[RecordT]) -> RecordT:
    """Raises: WireError."""
    return _convert(_unpack(data), record_type)


def _pack(record: Record) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(record, builtin_types=(bytes,)), use_bin_type=True)
    return packed


def _unpack(data: bytes) -> dict[str, Any]:
    if len(data) > MESSAGE_BYTES_MAX:
        raise WireError(f"{len(data)} bytes; at most {MESSAGE_BYTES_MAX} are read")
    try:
        # unpackb bounds every length inside by the length of the data, so that no header can ask for more memory.
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not MessagePack: {error or type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise WireError(f"expected a map at `$`, got {type(fields).__name__}")
    return fields


def _convert(fields: dict[str, Any], record_type: type[RecordT]) -> RecordT:
    try:
        return msgspec.convert(fields, record_type)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WireError(f"{record_type.__name__}: {error}") from error


@lru_cache(maxsize=256)
def _classes_by_tag(types: type[Message] | UnionType) -> dict[str, type[Message]]:
    # msgspec would rebuild its tables for a union at every call; looked up here, a class's own are kept.
    return {str(cls.__struct_config__.tag): cls for cls in get_args(types) or (types,)}
