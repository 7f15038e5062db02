from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from common import logs
from common.messages.prefill import KvReleased, RunPrefill
from common.messages.requests import Prompt, RequestSpec
from common.units import RequestId, RouterId, WorkerId


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


def test_a_line_about_a_message_names_the_request_and_the_cause_and_not_the_prompt() -> None:
    prompt = Prompt(tokens=2, inline=b"secretly")
    spec = RequestSpec(
        request_id=RequestId("q"), attempt=2, router_id=RouterId("r"), prompt=prompt, max_tokens=1, traceparent="t"
    )
    order = RunPrefill(
        worker_id=WorkerId("p0"),
        spec=spec,
        decode_worker_id=WorkerId("d0"),
        decode_address="",
        cause="RequestSubmitted#1.7",
    )
    expected = {"what": "RunPrefill", "request_id": "q", "attempt": 2, "worker_id": "p0"}
    assert logs.about(order) == expected | {"cause": "RequestSubmitted#1.7"}
    released = KvReleased(worker_id=WorkerId("p0"), request_id=RequestId("q"), attempt=0)
    assert logs.about(released) == {"what": "KvReleased", "request_id": "q", "worker_id": "p0"}


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_does_not_show_what_was_in_the_variables(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.setup("router", as_json=as_json)

    def serve(prompt: str) -> None:
        raise ValueError(f"no room for {len(prompt)} characters")

    try:
        serve(" ".join(["my", "secret"]))
    except ValueError:
        logs.get_logger("tests").exception("it failed")
    text = capsys.readouterr().err
    assert "no room for 9 characters" in text
    assert "my secret" not in text
