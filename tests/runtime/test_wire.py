"""Every message goes through bytes unharmed; nothing else gets through at all."""

from __future__ import annotations

import gc
from functools import reduce
from operator import or_
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages.base import SCHEMA_VERSION, Message, Record
from common.messages.prefill import DropRequest, KvReleased, PrefillFinished
from common.messages.requests import RequestSpec
from common.messages.scheduling import RequestSubmitted
from common.runtime import wire
from common.runtime.wire import WireError
from tests.runtime.records import all_messages, all_records, sample

MESSAGES = all_messages()
ANY_MESSAGE: Any = reduce(or_, MESSAGES)


def test_the_introspection_finds_the_messages() -> None:
    assert {"RequestSubmitted", "TokensGenerated", "WorkerHeartbeat", "FormGroup", "DropRequest"} <= {
        message.__name__ for message in MESSAGES
    }


def test_no_two_messages_share_a_tag() -> None:
    tags = [message.__struct_config__.tag for message in MESSAGES]
    assert len(set(tags)) == len(MESSAGES)


@pytest.mark.parametrize("full", [False, True], ids=["least", "full"])
@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_message_survives_the_wire(message_type: type[Message], full: bool) -> None:
    message = sample(message_type, full=full)
    assert wire.decode(wire.encode(message), ANY_MESSAGE) == message
    assert wire.decode(wire.encode(message), message_type) == message


@pytest.mark.parametrize("record_type", all_records(), ids=lambda cls: cls.__name__)
def test_every_record_survives_the_store(record_type: type[Record]) -> None:
    record = sample(record_type, full=True)
    assert wire.decode_record(wire.encode_record(record), record_type) == record


def test_no_record_is_walked_by_the_collector() -> None:
    """Stories hold tens of thousands; a full walk over them took most of a second."""
    assert not [each.__name__ for each in all_records() if gc.is_tracked(sample(each, full=True))]


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_field_of_a_wrong_type_is_refused_by_name(message_type: type[Message]) -> None:
    fields = msgpack.unpackb(wire.encode(sample(message_type, full=True)))
    for name in fields:
        if name == "type":
            continue
        wrong = {**fields, name: msgpack.ExtType(5, b"no record has one")}
        with pytest.raises(WireError, match=rf"\$\.{name}\b"):
            wire.decode(msgpack.packb(wrong), ANY_MESSAGE)


SUBMITTED: RequestSubmitted = sample(RequestSubmitted, full=True)


def altered(path: str, value: object) -> bytes:
    """The bytes of a submission with the field at a dotted path replaced."""
    fields = msgpack.unpackb(wire.encode(SUBMITTED))
    *way, last = path.split(".")
    reduce(lambda inner, name: inner[name], way, fields)[last] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.max_tokens", 0),
        ("spec.max_tokens", "many"),
        ("spec.max_tokens", 2**40),
        ("spec.prompt.tokens", -1),
        ("spec.prompt.tokens", 1.5),
        ("spec.prompt.inline", "text, not bytes"),
        ("spec.sampling.temperature", -0.1),
        ("spec.sampling.top_p", 0.0),
        ("spec.attempt", None),
        ("spec.request_id", 7),
        ("cause", b"bytes"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(path: str, value: object) -> None:
    with pytest.raises(WireError) as error:
        wire.decode(altered(path, value), RequestSubmitted)
    assert f"$.{path}" in str(error.value)


def test_a_missing_field_is_named() -> None:
    fields = msgpack.unpackb(wire.encode(SUBMITTED))
    del fields["spec"]["router_id"]
    with pytest.raises(WireError, match="router_id"):
        wire.decode(msgpack.packb(fields), RequestSubmitted)


def test_a_field_of_a_newer_sender_is_ignored() -> None:
    assert wire.decode(altered("spec.added_later", [1, 2]), RequestSubmitted) == SUBMITTED


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(WireError, match=rf"schema {SCHEMA_VERSION + 1} at `\$\.v`"):
        wire.decode(altered("v", SCHEMA_VERSION + 1), RequestSubmitted)


def test_a_message_for_somebody_else_is_refused() -> None:
    with pytest.raises(WireError, match=r"'RequestSubmitted' at `\$\.type`; expected one of DropRequest, KvReleased"):
        wire.decode(wire.encode(SUBMITTED), DropRequest | KvReleased)
    with pytest.raises(WireError, match="expected one of DropRequest"):
        wire.decode(wire.encode(SUBMITTED), DropRequest)


@pytest.mark.parametrize("tag", [None, 5, [], "", "Prompt", "x" * 10_000])
def test_a_tag_that_is_none_is_refused_briefly(tag: object) -> None:
    with pytest.raises(WireError) as error:
        wire.decode(altered("type", tag), RequestSubmitted | KvReleased)
    assert len(str(error.value)) < 300


def test_every_truncation_is_refused() -> None:
    data = wire.encode(SUBMITTED)
    for length in range(len(data)):
        with pytest.raises(WireError):
            wire.decode(data[:length], RequestSubmitted)
    with pytest.raises(WireError):
        wire.decode(data + b"\x00", RequestSubmitted)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,  # nested without end
        b"\x81\xa4type\x81" * 5_000,
        b"\x81\x90\x01",  # a list as a key
        b"\xc1",
        b'{"type": "RequestSubmitted"}',
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data, RequestSubmitted)


def test_too_many_bytes_are_not_even_read() -> None:
    with pytest.raises(WireError, match="at most"):
        wire.decode(bytes(wire.MESSAGE_BYTES_MAX + 1), RequestSubmitted)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data, ANY_MESSAGE)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(data: st.DataObject) -> None:
    message = sample(PrefillFinished, full=True)
    body = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = wire.decode(bytes(body), PrefillFinished)
    except WireError:
        return
    assert isinstance(decoded, PrefillFinished)


def test_a_record_is_no_message_and_the_reverse() -> None:
    spec = SUBMITTED.spec
    assert wire.decode_record(wire.encode_record(spec), RequestSpec) == spec
    with pytest.raises(WireError):
        wire.decode(wire.encode_record(spec), RequestSubmitted)
    with pytest.raises(WireError, match="RequestSpec"):
        wire.decode_record(wire.encode(SUBMITTED), RequestSpec)


@pytest.mark.parametrize("full", [False, True], ids=["least", "full"])
@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda cls: cls.__name__)
def test_the_tag_is_read_off_the_first_bytes(message_type: type[Message], full: bool) -> None:
    data = wire.encode(sample(message_type, full=full))
    assert wire.tag_of(data) == message_type.__name__


@given(st.binary(max_size=40))
def test_the_tag_of_any_bytes_is_some_text(data: bytes) -> None:
    assert isinstance(wire.tag_of(data), str)
    assert isinstance(wire.tag_of(b"\x82\xa4type" + data), str)


@pytest.mark.parametrize("data", [b"", b"\x81", b"\x82\xa4type", b"\x82\xa4kind\xa1x", b"\xde\x00"])
def test_what_has_no_tag_has_an_empty_one(data: bytes) -> None:
    assert wire.tag_of(data) == ""
