"""What a real server writes to its log, and what it never writes there."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import Message

import serving
from loraplex.config import ServerConfig
from loraplex.routing.router import Router
from loraplex.server.app import create_app
from loraplex.server.lifecycle import Lifecycle

KEY = "infer-secret-0123456789"
SAID = "my-mothers-maiden-name"  # stands in what clients send, and must not stand in the log
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def http(tiny_bundle: Path, log: Path) -> Iterator[httpx.Client]:
    environment = {"LORAPLEX_API_KEYS": f"ci:infer:{KEY} ops:admin:{KEY}-too", "LORAPLEX_LOG_FORMAT": "json"}
    with serving.serve(tiny_bundle, "--dtype", "float32", log=str(log), **environment) as server:
        with serving.client(server) as client:
            client.headers["X-API-Key"] = KEY
            yield client
        assert server.stop() == 0
        assert server.stdout.read() == ""
    assert lines_of(log)[-1]["message"] == "stopped"


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def logged(log: Path, request_id: str) -> list[dict[str, Any]]:
    """The lines of a request, of which the last is the access line: that is written after the answer."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        lines = [line for line in lines_of(log) if line.get("request_id") == request_id]
        if lines and lines[-1]["logger"] == "loraplex.access":
            return lines
        time.sleep(0.01)
    return []


def access(log: Path, response: httpx.Response) -> dict[str, Any]:
    [line] = logged(log, response.headers["X-Request-ID"])
    assert line.pop("time") and line.pop("logger") and line.pop("level") == "info"
    assert line.pop("request_id") == response.headers["X-Request-ID"]
    assert line.pop("message").startswith(f"{line['method']} {line['path']} {line['status']} ")
    assert 0 < line.pop("duration_ms") < 5000 and line.pop("client") == "127.0.0.1"
    return line


def test_each_request_has_one_line(http: httpx.Client, log: Path) -> None:
    response = http.post("/v1/classify", json={"input": SAID})
    assert access(log, response) == {"method": "POST", "path": "/v1/classify", "status": 200, "key": "ci"}
    response = http.get(f"/v1/adapters/{SAID}", headers={"X-API-Key": f"{KEY}-too"})
    expected = {"method": "GET", "path": "/v1/adapters/{name}", "status": 404, "key": "ops"}
    assert access(log, response) == {**expected, "error": "unknown_classifier"}


def test_refused_requests_have_theirs(http: httpx.Client, log: Path) -> None:
    cases: list[tuple[str, str, dict[str, Any], str, int, str | None, str]] = [
        ("GET", f"/v1/adapters/{SAID}", {}, "/v1/adapters/{name}", 403, "ci", "forbidden"),
        ("POST", "/v1/classify", {"headers": {"X-API-Key": SAID}}, "/v1/classify", 401, None, "unauthorized"),
        ("POST", f"/{SAID}", {"headers": {"X-API-Key": f"{KEY}-too"}}, "(unknown)", 404, "ops", "not_found"),
        ("GET", "/v1/classify", {"headers": {"X-API-Key": f"{KEY}-too"}}, "/v1/classify", 405, "ops", "m"),
        ("POST", "/v1/classify", {"json": {"input": "x", SAID: 1}}, "/v1/classify", 422, "ci", "invalid_request"),
        ("POST", "/v1/classify", {"content": b" " * 3_000_000}, "/v1/classify", 413, "ci", "body_too_large"),
        ("POST", "/v1/classify", {"json": {"input": 1}, "params": {SAID: 1}}, "/v1/classify", 422, "ci", "i"),
    ]
    for method, url, arguments, path, status, key, error in cases:
        line = access(log, http.request(method, url, **arguments))
        assert line.pop("error").startswith(error)
        assert line == {"method": method, "path": path, "status": status} | ({} if key is None else {"key": key})


def test_nothing_that_was_said_is_logged(http: httpx.Client, log: Path) -> None:
    http.post("/v1/classify", json={"input": SAID, "classifiers": SAID})
    http.post("/v1/classify", json={"input": [{"role": SAID, "content": SAID}]})
    http.post("/v1/classify", content=SAID, headers={"Content-Type": "application/json"})
    http.post("/invocations", json={"input_text": SAID, "adapter_name": SAID})
    http.request(SAID.upper(), f"/v1/models/{SAID}?{SAID}", headers={"User-Agent": SAID})
    assert logged(log, http.get("/v1/models").headers["X-Request-ID"])
    text = log.read_text()
    assert SAID not in text and KEY not in text


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_probes_are_quiet(http: httpx.Client, log: Path, path: str) -> None:
    probe = http.get(path)
    assert probe.status_code == 200 and probe.headers["X-Request-ID"]
    assert logged(log, http.get("/v1/models").headers["X-Request-ID"])
    assert probe.headers["X-Request-ID"] not in log.read_text()


def test_scrapes_are_quiet_but_not_when_they_are_refused(http: httpx.Client, log: Path) -> None:
    answered, refused = http.get("/metrics"), http.get("/metrics", headers={"X-API-Key": "wrong"})
    assert access(log, refused)["status"] == 401
    assert answered.status_code == 200 and answered.headers["X-Request-ID"] not in log.read_text()


@pytest.mark.parametrize("status", [200, 401, 404, 413, 422])
def test_a_sane_request_id_comes_back_whatever_the_answer(http: httpx.Client, log: Path, status: int) -> None:
    request_id = f"client/{status}:{'x' * 100}"
    response = http.post(
        "/nowhere" if status == 404 else "/v1/classify",
        content=b'{"input": 1}' if status == 422 else b'{"input": "x"}' + b" " * (3_000_000 if status == 413 else 0),
        headers={
            "X-Request-ID": request_id,
            "Content-Type": "application/json",
            "X-API-Key": {401: "wrong", 404: f"{KEY}-too"}.get(status, KEY),
        },
    )
    assert response.status_code == status
    assert response.headers["X-Request-ID"] == request_id and access(log, response)["status"] == status


@pytest.mark.parametrize("request_id", [b"", b"x" * 129, b"with space", b"tab\there", b"\xfcmlaut", b"a" * 8000])
def test_another_is_replaced(http: httpx.Client, log: Path, request_id: bytes) -> None:
    response = http.get("/v1/models", headers=[(b"X-Request-ID", request_id)])
    assert len(response.headers["X-Request-ID"]) == 32 and access(log, response)["status"] == 200


# ------------------------------------------------------------------------------------------- other settings


def test_text_is_the_default_and_inputs_are_logged_when_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    with serving.serve(tiny_bundle, "--dtype", "float32", "--log-inputs", log=str(log)) as server:
        with serving.client(server) as http:
            http.headers["X-Request-ID"] = "mine"
            http.post("/v1/classify", json={"input": SAID, "classifiers": "nope"})
            http.post("/v1/classify", json={"input": SAID + "y" * 100_000, "classifiers": "task0"})
            http.get("/v1/models")
        assert server.stop() == 0
    first, second, third = [line for line in log.read_text().splitlines() if "loraplex.access" in line]
    assert " INFO loraplex.access [mine]: POST /v1/classify 404 " in first
    assert "error=unknown_classifier error_message=\"no classifier named 'nope'\"" in first and SAID in first
    assert SAID in second and 8192 < len(second) < 8400
    assert "GET /v1/models 200 " in third and third.endswith(" ms client=127.0.0.1")


def app_of(**config: Any) -> FastAPI:
    router = cast(Router, object())  # these routes ask nobody
    app = create_app(ServerConfig(**config), (), Lifecycle(router))

    async def fail() -> None:
        raise KeyError(SAID)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"the first"
        raise KeyError(SAID)

    async def begin() -> StreamingResponse:
        return StreamingResponse(pieces())

    app.add_api_route("/fail", fail)
    app.add_api_route("/begin", begin)
    return app


def get(app: FastAPI, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://any") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_an_unexpected_error_is_logged_with_its_place_and_without_its_message(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    response = get(app_of(), "/fail")
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"
    assert response.headers["X-Request-ID"] and SAID not in response.text
    [record] = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert "in fail" in record.getMessage() and "KeyError" in record.getMessage()
    assert SAID not in caplog.text


def test_with_inputs_its_message_is_logged_too(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    get(app_of(log_inputs=True), "/fail")
    assert f"KeyError: '{SAID}'" in caplog.text


def test_an_answer_that_fails_after_its_beginning_is_logged_and_not_begun_again(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Message] = []
    received: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not received:
            await asyncio.Event().wait()
        return received.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/begin", "query_string": b"", "headers": []}
    asyncio.run(app_of()(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1] == {"type": "http.response.body", "body": b"the first", "more_body": True}
    assert "in pieces" in caplog.text and SAID not in caplog.text
