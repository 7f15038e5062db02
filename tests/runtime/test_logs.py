from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from common import logs


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_is_one_json_object_with_what_was_bound(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("router")
    log = logs.get_logger("tests")
    with logs.bind(request_id="r-1", cause="c-1"):
        log.info("request accepted", tokens=3)
    log.warning("and after")
    first, second = lines(capsys)
    assert first["message"] == "request accepted"
    assert (first["role"], first["level"], first["tokens"]) == ("router", "info", 3)
    assert (first["request_id"], first["cause"]) == ("r-1", "c-1")
    assert "timestamp" in first
    assert "request_id" not in second


def test_an_exception_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("router")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logs.get_logger("tests").exception("it failed")
    (line,) = lines(capsys)
    assert "ValueError" in line["exception"]


def test_levels_and_quiet_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("router", level="info")
    logs.get_logger("tests").debug("too fine")
    logging.getLogger("nats.aio.client").info("too chatty")
    logging.getLogger("some.library").info("heard")
    logging.getLogger("nats.aio.client").error("heard too")
    assert [line["message"] for line in lines(capsys)] == ["heard", "heard too"]


def test_text_for_people_has_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("router", as_json=False)
    logs.get_logger("tests").info("worker lost", worker_id="w-1")
    text = capsys.readouterr().err
    assert "worker lost" in text
    assert "w-1" in text
    assert "{" not in text
