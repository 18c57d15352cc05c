"""Who gets in, and as what: by real clients, by raw bytes, and over all routes that there are."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from prometheus_client.parser import text_string_to_metric_families

import serving
from loraplex.config import ServerConfig
from loraplex.routing.router import Router
from loraplex.server.app import create_app
from loraplex.server.keys import ApiKey, new_key, read_keys
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.security import INFER, OPEN, PUBLIC

INFER_KEY, OTHER_KEY, ADMIN_KEY = "infer-secret-0123456789", "other-secret-0123456789", "admin-secret-0123456789"
BODY = {"input": "Customer: hello", "classifiers": "task0"}


@pytest.fixture(scope="module")
def key_in_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(secret, file)"""
    made = serving.loraplex("keys", "new", "--name", "in-file", "--scope", "infer")
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(made.stdout)
    return made.stderr.split()[-1], file


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, key_in_file: tuple[str, Path]) -> Iterator[serving.Server]:
    arguments = ("--dtype", "float32", "--api-key-file", key_in_file[1], "--public", "metrics", "--key-concurrency", 1)
    environment = f"ci:infer:{INFER_KEY},other:infer:{OTHER_KEY} ops:admin:{ADMIN_KEY}"
    with serving.serve(tiny_bundle, *arguments, LORAPLEX_API_KEYS=environment) as server:
        yield server


@pytest.fixture
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def assert_refused(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"code", "message", "remedy"}
    assert response.json()["error"]["code"] == code
    assert response.headers["X-Request-ID"]
    assert (response.headers.get("WWW-Authenticate") == "Bearer") == (status == 401)


def test_a_key_of_the_file_or_the_environment_in_either_header(
    key_in_file: tuple[str, Path], http: httpx.Client
) -> None:
    for key in (INFER_KEY, ADMIN_KEY, key_in_file[0]):
        for headers in ({"Authorization": f"bearer  {key}"}, {"X-API-Key": key}):
            response = http.post("/v1/classify", json=BODY, headers=headers)
            assert response.status_code == 200, response.text
    proxied = {"Authorization": "Basic cHJveHk6cHJveHk=", "X-API-Key": INFER_KEY}
    assert http.get("/v1/models", headers=proxied).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {INFER_KEY}"},
        {"Authorization": INFER_KEY},
        {"X-API-Key": ""},
        {"X-API-Key": INFER_KEY[:-1]},
        {"X-API-Key": f"ci:infer:{INFER_KEY}"},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {ADMIN_KEY}"},
        {"Cookie": f"X-API-Key={INFER_KEY}"},
    ],
)
def test_no_key_or_a_wrong_one_is_401(http: httpx.Client, headers: dict[str, str]) -> None:
    assert_refused(http.post("/v1/classify", json=BODY, headers=headers), 401, "unauthorized")
    assert_refused(http.post(f"/v1/classify?api_key={INFER_KEY}", json=BODY, headers=headers), 401, "unauthorized")


def test_infer_infers_and_admin_does_everything(http: httpx.Client) -> None:
    for path in ("/v1/adapters", "/v1/adapters/task0", "/v1/routes", "/v1/routes/task0/stats"):
        assert_refused(http.get(path, headers=bearer(INFER_KEY)), 403, "forbidden")
        assert http.get(path, headers=bearer(ADMIN_KEY)).status_code == 200
    assert_refused(http.get("/v1/models/org/name", headers=bearer(INFER_KEY)), 404, "unknown_classifier")
    assert_refused(http.delete("/v1/adapters/task0", headers=bearer(INFER_KEY)), 403, "forbidden")
    for key in (INFER_KEY, ADMIN_KEY):  # a key of either scope learns of a mistake in the address
        assert_refused(http.post("/v1/v1/systemone", json={}, headers=bearer(key)), 404, "not_found")
        for wrong in (http.get("/v1/systemone", headers=bearer(key)), http.put("/v1/models", headers=bearer(key))):
            assert wrong.status_code == 405 and wrong.headers["Allow"] in ("POST", "GET"), wrong.text
    for path in ("/v1/models", "/v1/models/task0", "/docs", "/redoc", "/openapi.json"):
        assert http.get(path, headers=bearer(INFER_KEY)).status_code == 200


def test_probes_and_what_is_public_need_none(http: httpx.Client) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert http.get(path).status_code == http.head(path).status_code == 200
    assert http.get("/metrics").status_code == 200
    assert_refused(http.get("/docs"), 401, "unauthorized")


def test_sagemaker_clients_hear_it_as_aws_says_it(http: httpx.Client) -> None:
    body = {"input_text": "hello", "adapter_name": "task0"}
    refused = http.post("/endpoints/any/invocations", json=body)
    assert refused.status_code == 403 and refused.headers["X-Amzn-ErrorType"] == "AccessDeniedException"
    assert http.post("/endpoints/any/invocations", json=body, headers=bearer(INFER_KEY)).status_code == 200
    assert_refused(http.get("/endpoints/any/invocations", headers=bearer(INFER_KEY)), 404, "not_found")


@pytest.mark.parametrize(
    "line",
    [
        "GET //v1/adapters",
        "GET /v1/models/../adapters",
        "GET /v1/models/x/",
        "DELETE /v1/models/x",
        "GET /v1/adapters/",
        "GET /V1/ADAPTERS",
        "GET /v1/%61dapters",
        "GET /v1//adapters",
        "GET /health/../v1/adapters",
        "GET /health%2f..%2fv1%2fadapters",
        "GET /health/..%2fv1/adapters",
        "GET /health;/v1/adapters",
        "GET /v1/adapters?/health",
        "GET /v1/adapters%3f/health",
        "GET /v1/adapters%00",
        "GET /metrics/",
        "GET /health%0a",
        "GET /healthy",
        "GET http://any/v1/adapters",
        "GET http://any/v1/adapters",
        "OPTIONS /health",
        "OPTIONS *",
        "POST /health",
        "POST /metrics",
        "HEAD /v1/adapters",
        "get /v1/adapters",
        "TRACE /v1/adapters",
        "BREW /v1/adapters",
        "DELETE /v1/adapters/task0",
        "POST /endpoints/x/invocations/../../../v1/load_lora_adapter",
    ],
)
def test_no_spelling_of_a_request_leads_around(server: serving.Server, line: str) -> None:
    """By no header that proxies set, either."""
    headers = (
        "X-Forwarded-Prefix: /v1\r\nX-Original-URL: /health\r\nX-HTTP-Method-Override: GET\r\nUpgrade: websocket\r\n"
    )
    for more in (headers, f"X-API-Key: {INFER_KEY}\r\n"):
        with serving.connect(server) as sock:
            sock.sendall(f"{line} HTTP/1.1\r\nHost: any\r\nConnection: close\r\n{more}\r\n".encode())
            status = serving.receive(sock).split(b" ", 2)[1]
        assert status in ((b"401",) if more is headers else (b"403", b"404", b"405"))


def test_the_same_path_spelled_otherwise_is_the_same_operation(server: serving.Server) -> None:
    with serving.connect(server) as sock:
        request = f"GET /v1/%6dodels HTTP/1.1\r\nHost: any\r\nConnection: close\r\nX-API-Key: {INFER_KEY}\r\n\r\n"
        sock.sendall(request.encode())
        assert serving.receive(sock).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("key", "status"), [("", b"401"), (INFER_KEY, b"403")])
def test_the_body_is_not_waited_for(server: serving.Server, key: str, status: bytes) -> None:
    with serving.connect(server) as sock:
        sock.sendall(
            b"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: any\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n"
            + f"X-API-Key: {key}\r\n\r\n".encode()
        )
        sock.settimeout(5)
        assert sock.recv(65536).startswith(b"HTTP/1.1 " + status)


def test_more_than_its_requests_in_flight_are_429_at_once(server: serving.Server, http: httpx.Client) -> None:
    """A request is in flight from its head on."""
    content = b'{"input": "hello", "classifiers": "task0"}'
    with serving.connect(server) as sock:
        sock.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: any\r\nContent-Type: application/json\r\nConnection: close\r\n"
            + f"X-API-Key: {INFER_KEY}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content[:5]
        )
        for _ in range(200):  # until it is there
            busy = http.get("/v1/models", headers=bearer(INFER_KEY))
            if busy.status_code != 200:
                break
        assert_refused(busy, 429, "key_busy")
        assert busy.headers["Retry-After"] == "1"
        assert http.get("/v1/models", headers=bearer(OTHER_KEY)).status_code == 200
        assert http.get("/health", headers=bearer(INFER_KEY)).status_code == 200
        sock.sendall(content[5:])
        assert serving.receive(sock).startswith(b"HTTP/1.1 200")
    for _ in range(3):
        assert http.get("/v1/models", headers=bearer(INFER_KEY)).status_code == 200
        assert http.get("/v1/adapters", headers=bearer(INFER_KEY)).status_code == 403


def test_refusals_are_counted(http: httpx.Client) -> None:
    def count(code: str) -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == "loraplex_request_failures_total" and sample.labels["code"] == code
        )

    before = count("unauthorized"), count("forbidden")
    http.get("/v1/adapters")
    http.get("/v1/adapters", headers=bearer(INFER_KEY))
    assert (count("unauthorized"), count("forbidden")) == (before[0] + 1, before[1] + 1)


def test_without_keys_a_server_on_all_addresses_does_not_start(tiny_bundle: Path) -> None:
    run = serving.loraplex("serve", tiny_bundle, "--host", "0.0.0.0", "--port", 0)
    assert run.returncode == 1
    assert "configuration_error" in run.stderr and "--insecure" in run.stderr and "loading" not in run.stderr


def test_a_wrong_key_file_is_said_before_anything_is_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ci infer the-secret-itself-in-place-of-its-hash\n")
    run = serving.loraplex("serve", tiny_bundle, "--port", 0, "--api-key-file", tmp_path / "keys")
    assert run.returncode == 1 and "line 1" in run.stderr
    assert "loading" not in run.stderr and "the-secret" not in run.stderr


def test_keys_new_says_the_key_once_and_refuses_names_that_no_file_can_hold() -> None:
    run = serving.loraplex("keys", "new", "--name", "ci")
    name, scope, digest = run.stdout.split()
    secret = run.stderr.split()[-1]
    assert (name, scope) == ("ci", "infer") and re.fullmatch("[0-9a-f]{64}", digest) and secret not in run.stdout
    for arguments in (["--name", "c i"], ["--name", "ci", "--scope", "root"], ["--name", ""]):
        run = serving.loraplex("keys", "new", *arguments)
        assert run.returncode == 1 and run.stdout == "" and "configuration_error" in run.stderr


# ------------------------------------------------------------------------------------------- all routes that there are


def app_with_keys(**config: object) -> FastAPI:
    return create_app(ServerConfig.model_validate(config), keys(), Lifecycle(cast(Router, object())))


def keys() -> tuple[ApiKey, ...]:
    return read_keys(None, f"ci:infer:{INFER_KEY} ops:admin:{ADMIN_KEY}")


def operations(app: FastAPI) -> set[str]:
    """`METHOD path` of every route; HEAD stands beside GET."""
    found = set()
    for context in iter_route_contexts(app.routes):
        assert context.path is not None
        methods = getattr(context, "methods", None) or {"GET"}
        found |= {f"{method} {context.path}" for method in methods - {"HEAD"}}
    return found


def ask_all(app: FastAPI, found: set[str], headers: dict[str, str]) -> dict[str, int]:
    async def ask() -> dict[str, int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://any", headers=headers) as client:
            statuses = {}
            for one in sorted(found):
                method, path = one.split(" ")
                path = re.sub(r"\{[^}]+\}", "x", path)
                statuses[one] = (await client.request(method, path)).status_code
                if method == "GET":
                    assert (await client.head(path)).status_code in (statuses[one], 405)
            return statuses

    return asyncio.run(ask())


def test_every_route_needs_a_key_but_those_that_are_listed(tiny_bundle: Path) -> None:
    app = app_with_keys()
    found = operations(app)
    assert {"PUT /v1/adapters/{name}", "POST /v1/load_lora_adapter", "GET /docs", "DELETE /adapters/{name}"} <= found
    assert found >= OPEN and found >= INFER, "a list names what is not there"
    statuses = ask_all(app, found, {})
    assert {one for one, status in statuses.items() if status != 401} == OPEN | PUBLIC["console"]
    statuses = ask_all(app, found, bearer(INFER_KEY))
    assert {one for one, status in statuses.items() if status == 403} == (
        found - OPEN - INFER - PUBLIC["console"] - {"GET /v1/models/{name:path}"}
    )
    assert 401 not in statuses.values()
    assert not {401, 403} & set(ask_all(app, found, bearer(ADMIN_KEY)).values())


def test_public_opens_what_it_names_and_nothing_else(tiny_bundle: Path) -> None:
    for public in (["docs"], ["metrics", "docs"]):
        app = app_with_keys(public=public)
        statuses = ask_all(app, operations(app), {})
        expected = OPEN.union(*(PUBLIC[what] for what in [*public, "console"]))
        assert {one for one, status in statuses.items() if status != 401} == expected


def test_below_a_root_path_the_same_holds(tiny_bundle: Path) -> None:
    app = app_with_keys()
    app.root_path = "/loraplex"

    async def ask(path: str, key: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://any") as client:
            return (await client.get(path, headers={"X-API-Key": key})).status_code

    assert asyncio.run(ask("/loraplex/openapi.json", INFER_KEY)) == 200
    assert asyncio.run(ask("/loraplex/openapi.json", "")) == 401
    assert asyncio.run(ask("/loraplex/v1/adapters", INFER_KEY)) == 403
    assert asyncio.run(ask("/loraplex/loraplex/health", "")) == 401


def test_a_new_secret_is_not_one_of_before() -> None:
    assert len({new_key("ci", "infer")[0] for _ in range(100)}) == 100
