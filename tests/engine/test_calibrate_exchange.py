"""What swapping tensors costs, measured on this machine: figures of the right kind, soon."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.engine import calibrate_exchange
from services.engine.calibrate_exchange import measure_exchange_cost
from services.engine.model import load_model
from tests.engine.models import tiny_model


def test_a_message_costs_more_than_its_bytes_and_all_of_them_something(tmp_path: Path):
    model = load_model(tiny_model("llama", tmp_path), dtype="float32")
    cost = measure_exchange_cost(model)
    assert 0.0 < cost.byte_s * 64 < cost.message_s < calibrate_exchange._SILENCE_S
    assert 0.0 < cost.merge_element_s < cost.message_s


def test_an_echo_that_stays_away_is_a_slow_message_and_no_hang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate_exchange, "_SILENCE_S", 0.05)
    monkeypatch.setattr(calibrate_exchange, "_echo", lambda end: None)
    with calibrate_exchange._connected() as (here, there):
        assert calibrate_exchange._message_s(here, there) == pytest.approx(0.05)


def test_what_does_not_arrive_ends_the_measurement(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate_exchange, "_SILENCE_S", 0.05)
    with calibrate_exchange._connected() as (here, _):
        other, unheard = socket.socketpair()
        with other, unheard:
            for end in (here, unheard):
                end.setblocking(False)
            with pytest.raises(TimeoutError):
                calibrate_exchange._swap(here, memoryview(bytes(10)), unheard, memoryview(bytearray(10)))
