"""Log lines: their two formats, the request they belong to, and what an unexpected error may show."""

import asyncio
import json
import logging
import sys

from loraplex.server import answers, logs


def record(message: str = "hello %s", *args: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("loraplex.x", logging.WARNING, "x.py", 1, message, args or ("you",), None)
    made.__dict__.update(more)
    return made


def test_json_is_one_object_a_line_with_traceback_and_fields() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        made = record(exc_info=sys.exc_info(), fields={"status": 200})
    text = logs.JsonFormatter().format(made)
    assert "\n" not in text
    line = json.loads(text)
    assert line.pop("time").endswith("+00:00")
    assert line.pop("exception").splitlines()[-2:] == ["ValueError: two", "lines"]
    assert line == {"level": "warning", "logger": "loraplex.x", "message": "hello you", "status": 200}


def test_what_json_cannot_hold_is_shown_as_text() -> None:
    line = json.loads(logs.JsonFormatter().format(record("\ud800 %s", "x", fields={"what": {1}})))
    assert line["message"] == "\ud800 x" and line["what"] == "{1}"


def test_lines_carry_the_request_of_their_task_also_from_threads() -> None:
    async def handle(request_id: str) -> tuple[str, str]:
        logs._current.set(logs.RequestRecord(request_id))
        await asyncio.sleep(0)
        in_thread = await asyncio.to_thread(logs.JsonFormatter().format, record())
        return json.loads(in_thread)["request_id"], logs.TextFormatter().format(record())

    async def both() -> list[tuple[str, str]]:
        return list(await asyncio.gather(handle("one"), handle("two")))

    for name, (in_json, in_text) in zip(("one", "two"), asyncio.run(both()), strict=True):
        assert in_json == name
        assert in_text.endswith(f" WARNING loraplex.x [{name}]: hello you")
    assert "request_id" not in json.loads(logs.JsonFormatter().format(record()))
    assert logs.TextFormatter().format(record()).endswith(" WARNING loraplex.x: hello you")


def test_a_trace_shows_where_and_no_message() -> None:
    said = "what the customer said"

    def fail() -> None:
        try:
            raise KeyError(said)
        except KeyError as exc:
            raise ExceptionGroup(said, [ValueError(said)]) from exc

    try:
        fail()
    except ExceptionGroup as exc:
        trace = answers.trace(exc)
    assert "in fail" in trace and said not in trace
    assert [line for line in trace.splitlines() if line[0] != " "] == ["KeyError", "ValueError", "ExceptionGroup"]
