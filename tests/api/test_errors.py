"""Every code in errors.py, provoked as a user would meet it; message and remedy name what is at fault."""

import asyncio
import contextlib
import http.server
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

import serving
import tiny
from loraplex import Client, Loraplex
from loraplex.config import ServerConfig
from loraplex.engine.runner import ModelRunner
from loraplex.errors import BY_CODE, LoraplexError
from loraplex.server.app import create_app
from loraplex.server.lifecycle import Lifecycle

INFER, ADMIN = "infer-secret-0123456789", "admin-secret-0123456789"
MORE_KEYS = [f"more-secret-{i}-0123456789" for i in range(8)]
BODY = {"input": "Customer: hello", "classifiers": "task0"}
CASES: dict[str, tuple[Callable[["Served"], "Seen"], str]] = {}


@dataclass(frozen=True)
class Seen:
    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Served:
    """A server with low limits, and a folder from which it loads adapters."""

    server: serving.Server
    http: httpx.Client
    bundle: Path
    folder: Path

    def ask(self, method: str, path: str, body: Any = None, key: str = ADMIN, **more: Any) -> Seen:
        headers = {"X-API-Key": key} if key else {}
        if "content" in more:
            response = self.http.request(method, path, headers=headers | {"Content-Type": "application/json"}, **more)
        else:
            response = self.http.request(method, path, json=body, headers=headers)
        return seen(response.json()["error"])


def seen(error: Any) -> Seen:
    if isinstance(error, LoraplexError):
        return Seen(error.code, error.message, error.remedy)
    return Seen(**error)


def raised(function: Callable[[], object]) -> Seen:
    with pytest.raises(LoraplexError) as caught:
        function()
    return seen(caught.value)


def case(code: str, text: str) -> Callable[[Callable[[Served], Seen]], None]:
    """Register how `code` is provoked, and what message and remedy say then (a regular expression over both)."""

    def register(provoke: Callable[[Served], Seen]) -> None:
        assert code not in CASES, code
        CASES[code] = provoke, text

    return register


def send_half(sock: socket.socket, key: str) -> None:
    """Send a request whose body does not end, and give the server time to take it."""
    sock.sendall(f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: 9\r\n\r\n{{".encode())
    time.sleep(0.3)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("errors")
    options = (
        *("--dtype", "float32", "--state-dir", folder / "state", "--adapter-root", folder, "--max-queue", 3),
        *("--key-concurrency", 1, "--body-timeout", 1, "--max-body-bytes", 8192),
    )
    more = (f"more{i}:infer:{key}" for i, key in enumerate(MORE_KEYS))
    keys = " ".join((f"ask:infer:{INFER}", f"ops:admin:{ADMIN}", *more))
    with (
        serving.serve(tiny_bundle, *options, LORAPLEX_API_KEYS=keys) as server,
        serving.client(server) as client,
    ):
        yield Served(server, client, tiny_bundle, folder)


case("bad_input", r"JSON")(lambda on: on.ask("POST", "/v1/classify", content=b"{'input': 1}"))
case("invalid_request", r"deadline_ms")(lambda on: on.ask("POST", "/v1/classify", {**BODY, "deadline_ms": -5}))
case("unauthorized", r"key.*Authorization: Bearer")(lambda on: on.ask("POST", "/v1/classify", BODY, key=""))
case("forbidden", r"infer.*admin")(lambda on: on.ask("GET", "/v1/adapters", key=INFER))
case("unknown_classifier", r"'nope'.*task0")(lambda on: on.ask("POST", "/v1/classify", {**BODY, "classifiers": "nope"}))
case("unknown_route", r"'nope'.*/v1/routes")(lambda on: on.ask("GET", "/v1/routes/nope"))
case("unknown_verdict", r"'vrd-1'.*--keep-verdicts")(
    lambda on: on.ask("POST", "/v1/feedback", {"verdict_id": "vrd-1", "label": "yes"})
)
case("adapter_exists", r"'task0'.*PUT /v1/adapters/task0")(
    lambda on: on.ask("POST", "/adapters", {"name": "task0", "src": str(on.bundle / "task0")})
)
case("input_too_long", r"\d+ tokens.*\d+")(
    lambda on: on.ask("POST", "/v1/classify", {"input": "hello " * 1200, "classifiers": "verbatim"})
)
case("body_too_large", r"8192 bytes.*--max-body-bytes")(
    lambda on: on.ask("POST", "/v1/classify", {**BODY, "input": "hello " * 2000})
)
case("deadline_exceeded", r"deadline.*more time")(
    lambda on: on.ask("POST", "/v1/classify", {**BODY, "deadline_ms": 0.001})
)
case("configuration_error", r"device=tpu.*cpu")(lambda on: raised(lambda: Loraplex.load(on.bundle, device="tpu")))
case("bundle_error", r"no-such-folder.*")(lambda on: raised(lambda: Loraplex.load(on.folder / "no-such-folder")))
case("unreachable", r"127.0.0.1:9.*")(
    lambda on: raised(lambda: Client("http://127.0.0.1:9", max_retries=0).classify("x"))
)


case("not_found", r"'/v1/clasify'.*/v1/classify")(lambda on: on.ask("POST", "/v1/clasify", BODY))
case("method_not_allowed", r"GET.*'/v1/classify'; use POST")(lambda on: on.ask("GET", "/v1/classify"))


@case("unsupported_encoding", r"'br'.*uncompressed")
def _(on: Served) -> Seen:
    headers = {"X-API-Key": ADMIN, "Content-Encoding": "br", "Content-Type": "application/json"}
    return seen(on.http.post("/v1/classify", content=b"x", headers=headers).json()["error"])


def answer_to(on: Served, head: bytes) -> Seen:
    with serving.connect(on.server) as sock:
        sock.sendall(head)
        return seen(json.loads(serving.receive(sock).partition(b"\r\n\r\n")[2])["error"])


case("malformed_http", r"HTTP/1.1")(lambda on: answer_to(on, b"HELO\r\n\r\n"))
case("head_too_large", r"KiB|bytes")(lambda on: answer_to(on, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000))


@case("too_many_connections", r"2 connections.*--max-connections")
def _(on: Served) -> Seen:
    with (
        serving.serve(on.bundle, "--max-connections", 2, "--preload", "none") as server,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(2):
            stack.enter_context(serving.connect(server))
        with httpx.Client() as client:
            return seen(client.get(f"{server.url}/v1/models").json()["error"])


@case("request_timeout", r"1 seconds.*--body-timeout")
def _(on: Served) -> Seen:
    with serving.connect(on.server) as sock:
        send_half(sock, ADMIN)
        return seen(json.loads(serving.receive(sock).partition(b"\r\n\r\n")[2])["error"])


@case("adapter_in_use", r"'task1'.*'aliased'.*delete")
def _(on: Served) -> Seen:
    headers = {"X-API-Key": ADMIN}
    on.http.put("/v1/routes/aliased", json={"targets": {"task1": 1}}, headers=headers).raise_for_status()
    found = on.ask("DELETE", "/v1/adapters/task1")
    on.http.delete("/v1/routes/aliased", headers=headers).raise_for_status()
    return found


@case("no_revision", r"'new'.*PUT /v1/routes/new")
def _(on: Served) -> Seen:
    on.http.put("/v1/routes/new", json={"targets": {"task1": 1}}, headers={"X-API-Key": ADMIN}).raise_for_status()
    return on.ask("POST", "/v1/routes/new/rollback")


@case("queue_full", r"3 at most.*--max-queue")
def _(on: Served) -> Seen:
    def ask(key: str) -> httpx.Response:
        body = {"input": "Customer: hello there\n" * 300, "classifiers": ["task0", "task1"]}
        return on.http.post("/v1/classify", json=body, headers={"X-API-Key": key})

    with ThreadPoolExecutor(len(MORE_KEYS)) as pool:
        refused = [response for response in pool.map(ask, MORE_KEYS) if response.status_code == 429]
    assert refused and all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    return seen(refused[0].json()["error"])


@case("key_busy", r"'ask'.*--key-concurrency")
def _(on: Served) -> Seen:
    with serving.connect(on.server) as sock:  # a request of the same key, whose body is not there yet
        send_half(sock, INFER)
        return on.ask("POST", "/v1/classify", BODY, key=INFER)


@case("cancelled", r"client")
def _(on: Served) -> Seen:
    """Nobody is left to read the answer; the metrics count it."""

    def count() -> float:
        metrics = on.http.get("/metrics", headers={"X-API-Key": ADMIN}).text
        found = re.search(r"(?m)^loraplex_requests_cancelled_total (\S+)", metrics)
        return float(found[1]) if found else 0.0

    before = count()
    with serving.connect(on.server) as sock:
        send_half(sock, ADMIN)
    for _ in range(100):
        if count() > before:
            return Seen("cancelled", "the client left", "none is needed")
        time.sleep(0.05)
    raise AssertionError("not counted")


@case("contract_error", r"classifier.yaml.*labels")
def _(on: Served) -> Seen:
    tiny.save_adapter(on.bundle, folder := on.folder / "contract", contract={**tiny.CONTRACT, "labels": ["yes"]})
    return on.ask("PUT", "/v1/adapters/contract", {"source": str(folder)})


@case("adapter_error", r"adapter_config.json")
def _(on: Served) -> Seen:
    (on.folder / "empty").mkdir()
    return on.ask("PUT", "/v1/adapters/empty", {"source": str(on.folder / "empty")})


@case("unsupported_model", r"config.json.*'dynamic'")
def _(on: Served) -> Seen:
    base = shutil.copytree(on.bundle, on.folder / "dynamic")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (base / "config.json").write_text(json.dumps(config))
    return raised(lambda: Loraplex.load(base))


@case("not_ready", r"loading.*/ready")
def _(on: Served) -> Seen:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(ServerConfig(), (), Lifecycle()))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.post("/v1/classify", json=BODY)

    return seen(asyncio.run(ask()).json()["error"])


@case("engine_error", r"broken.*log")
def _(on: Served) -> Seen:
    with Loraplex.load(on.bundle, dtype="float32") as loraplex:
        run = ModelRunner.run

        def fails(self: ModelRunner, step: Any) -> Any:
            if any(placed.sequence.slot >= 0 for placed in step.placed):
                raise RuntimeError("broken")
            return run(self, step)

        with mock.patch.object(ModelRunner, "run", fails):
            return raised(lambda: loraplex.classify("Customer: hello", "task0"))


@case("state_error", r"'task2'.*--state-dir")
def _(on: Served) -> Seen:
    state = on.folder / "gone"
    with serving.serve(on.bundle, "--state-dir", state, "--preload", "none") as server, httpx.Client() as client:
        state.rename(on.folder / "moved")
        return seen(client.delete(f"{server.url}/v1/adapters/task2").json()["error"])


@case("not_loraplex", r"127.0.0.1:\d+")
def _(on: Served) -> Seen:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>It works!</html>")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as other, contextlib.ExitStack() as stack:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        stack.callback(thread.join)
        stack.callback(other.shutdown)
        return raised(lambda: Client(f"http://127.0.0.1:{other.server_port}", max_retries=0).classify("x"))


@pytest.mark.parametrize("code", CASES)
def test_a_code_is_provoked(code: str, served: Served) -> None:
    provoke, text = CASES[code]
    found = provoke(served)
    assert found.code == code, found
    assert re.search(text, f"{found.message} ({found.remedy})", re.S), found
    assert found.message and found.remedy and "pydantic" not in found.message


def test_there_is_no_other_code() -> None:
    assert set(CASES) == {*BY_CODE, "unreachable", "not_loraplex"}
