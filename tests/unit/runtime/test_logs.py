"""Log lines: their shape, their trace id, and that no secret gets into one."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from runtime import logs, trace


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logs.configure("payment", "debug", "json", stream)
    yield stream
    logs.configure("test")


def lines(stream: io.StringIO) -> list[dict[str, str]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_process_trace_and_facts(stream: io.StringIO) -> None:
    with trace.bind() as traceparent:
        logs.get_logger("bus").info("message handled", topic="payment.events", count=3)
    (line,) = lines(stream)
    assert (
        line.items()
        >= {
            "level": "info",
            "process": "payment",
            "room": "bus",
            "event": "message handled",
            "topic": "payment.events",
            "count": 3,
            "trace_id": traceparent[3:35],
        }.items()
    )
    assert line["time"].endswith("+00:00")


TOKEN = "Zm9vYmFyYmF6-Zm9vYmFyYmF6_Zm9vYmFyYmF6-abc"
SECRETS = {
    "authorization": "Bearer abcdefghijklmnop",
    "api_key": "anything",
    "webhook_secret": SecretStr("anything"),
    "iban": "GB82WEST12345698765432",
    "account_number": "12345678",
    "auth_token": "anything",
}


@pytest.mark.parametrize("format", ["json", "text"])
def test_no_secret_by_name_or_by_shape(format: str) -> None:
    stream = io.StringIO()
    logs.configure("payment", "info", format, stream)
    log = logs.get_logger()
    log.info("call", **SECRETS, psp_token="pi_123")
    log.info(
        "sent Bearer abcdefghijklmnop to https://user:hunter2pass@db/x with sk_live_abcdef123 and whsec_qwertyuiop"
    )
    try:
        raise ValueError(
            "postgresql://ducat:hunter2pass@db:5432 refused ducat_" + TOKEN + " ?user=d&password=hunter2pass"
        )
    except ValueError:
        log.exception("failed", room="x")
    logging.getLogger("some.library").warning("got token ducat_%s, not ducat_rpc_server_handled", TOKEN)
    text = stream.getvalue()
    logs.configure("test")
    for secret in (
        "abcdefghijklmnop",
        "anything",
        "GB82WEST",
        "12345678",
        "hunter2pass",
        "sk_live_abc",
        "qwertyuiop",
        "Zm9v",
    ):
        assert secret not in text
    assert "pi_123" in text, "the PSP's own name of a payment is no secret"
    assert "@db/x" in text
    assert "ValueError" in text
    assert "ducat_rpc_server_handled" in text, "not every word of ours is a token"


def test_a_value_cannot_write_a_line_of_its_own() -> None:
    stream = io.StringIO()
    logs.configure("payment", "info", "text", stream)
    logs.get_logger().info("rejected", reason="no\n12:00:00.000 info    payment  payment created checkout_id=FORGED")
    logs.configure("test")
    assert len(stream.getvalue().splitlines()) == 1


def test_a_bug_is_logged_with_its_traceback(stream: io.StringIO) -> None:
    try:
        raise RuntimeError("bug")
    except RuntimeError as error:
        logs.get_logger().error("call failed", exc_info=error)
    (line,) = lines(stream)
    assert line["error"] == "RuntimeError: bug"
    assert "test_logs.py" in line["traceback"]


def test_libraries_log_in_the_same_shape(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("odd %s", "thing")
    (line,) = lines(stream)
    assert (line["event"], line["room"], line["level"], line["process"]) == (
        "odd thing",
        "uvicorn.error",
        "warning",
        "payment",
    )


def test_levels_below_the_limit_cost_nothing_and_say_nothing() -> None:
    stream = io.StringIO()
    logs.configure("payment", "warning", "json", stream)
    logs.get_logger().info("chatter")
    logging.getLogger("x").info("chatter")
    logs.configure("test")
    assert stream.getvalue() == ""


def test_a_reader_that_is_gone_does_not_fail_the_work() -> None:
    stream = io.StringIO()
    logs.configure("payment", "info", "json", stream)
    stream.close()
    logs.get_logger().info("nobody reads this")
    logs.configure("test")


@pytest.mark.parametrize("row", ["(PO-1, two\nlines of jane@example.com).", "(PO-1, two\nlines of jane@exam"])
def test_a_row_of_several_lines_or_one_that_is_cut_off_is_not_repeated(row: str, stream: io.StringIO) -> None:
    logs.get_logger("room").warning("a message failed", why=f"breaks a check\nDETAIL:  Failing row contains {row}")
    (line,) = lines(stream)
    assert "jane" not in line["why"]
    assert line["why"].startswith("breaks a check")


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_row_that_breaks_a_constraint_is_not_repeated(format: str) -> None:
    """Risk: PostgreSQL's error puts a buyer's address or a bank account into the log."""
    stream = io.StringIO()
    logs.configure("test", format=format, stream=stream)
    error = ValueError(
        "breaks a check\nDETAIL:  Failing row contains (1, jane@example.com, (x), 000123456789).\nHINT: none"
    )
    logs.get_logger("room").error("call failed", exc_info=error)
    logs.get_logger("room").warning("a message failed", why=f"ValueError: {error}")
    shown = stream.getvalue()
    assert "jane" not in shown
    assert "000123456789" not in shown
    assert shown.count("HINT: none") >= 3, "the rest of the error stays"
