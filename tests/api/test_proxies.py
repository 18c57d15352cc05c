"""A server behind proxies and for browsers: real bytes, and what nginx and a browser would send."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serving
from loraplex import Client
from loraplex.config import ServerConfig
from loraplex.errors import ConfigurationError, HeadTooLargeError
from loraplex.server.app import create_app
from loraplex.server.head import MAX_HEAD_BYTES
from loraplex.server.lifecycle import Lifecycle

KEY = {"X-API-Key": "infer-secret-0123456789"}
PAGE = "https://app.example.com"
BODY = {"input": "Customer: hello", "classifiers": "task0"}
STREAM = {"model": "verbatim", "prompt": "hello", "max_tokens": 2, "stream": True}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, log: Path) -> Iterator[serving.Server]:
    options = (
        *("--dtype", "float32", "--log-format", "json", "--root-path", "/llm/one", "--cors-origin", PAGE),
        *("--cors-origin", "http://localhost:3000", "--max-body-bytes", 4096),
        *("--trusted-proxy", "127.0.0.1", "--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "fd00::/8"),
    )
    keys = f"ci:infer:{KEY['X-API-Key']}"
    with serving.serve(tiny_bundle, *options, log=str(log), LORAPLEX_API_KEYS=keys) as server:
        yield server


@pytest.fixture
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


# ------------------------------------------------------------------------------------------- browsers


def preflight(http: httpx.Client, path: str = "/v1/classify", **headers: str) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    return http.options(path, headers={"Origin": PAGE, **asked, **headers})


def test_a_browser_may_ask_before_it_has_shown_its_key(http: httpx.Client) -> None:
    answer = preflight(http)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
    assert "Access-Control-Allow-Credentials" not in answer.headers and "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize("origin", ["https://evil.example.com", "https://app.example.com.evil.net", "null"])
def test_other_origins_may_not(http: httpx.Client, origin: str) -> None:
    answer = preflight(http, Origin=origin)
    assert answer.status_code == 400 and "Access-Control-Allow-Origin" not in answer.headers
    answer = http.post("/v1/classify", json=BODY, headers={"Origin": origin, **KEY})
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_page_reads_answers_errors_and_streams(http: httpx.Client) -> None:
    page = {"Origin": PAGE}
    answers = [
        http.post("/v1/classify", json=BODY, headers=page | KEY),
        http.post("/v1/completions", json=STREAM, headers=page | KEY),
        http.post("/v1/classify", json=BODY, headers=page),
        http.get("/v1/adapters", headers=page | KEY),
        http.post("/v1/classify", content=b"{", headers=page | KEY | {"Content-Type": "application/json"}),
        http.post("/v1/classify", content=b" " * 5000, headers=page | KEY | {"Content-Type": "application/json"}),
        http.post("/endpoints/any/invocations", json={"input_text": "x", "adapter_name": "nope"}, headers=page | KEY),
    ]
    assert [one.status_code for one in answers] == [200, 200, 401, 403, 400, 413, 424]
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert "X-Request-ID" in answer.headers["Access-Control-Expose-Headers"]


def test_without_the_option_no_page_may_ask(tiny_server: serving.Server) -> None:
    with serving.client(tiny_server) as http:
        assert preflight(http).status_code == 405
        answer = http.post("/v1/classify", json=BODY, headers={"Origin": PAGE})
        assert answer.status_code == 200 and not [one for one in answer.headers if one.startswith("access-control")]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("*", "*"),
        ("null", "null"),
        ("HTTPS://App.Example.com", PAGE),
        ("https://app.example.com:443", PAGE),
        ("http://localhost:80", "http://localhost"),
        ("http://localhost:8443", "http://localhost:8443"),
        ("https://localhost:80", "https://localhost:80"),
        ("app://electron", "app://electron"),
    ],
)
def test_an_origin_is_kept_as_browsers_send_it(given: str, kept: str) -> None:
    assert ServerConfig(cors_origin=(given,)).cors_origin == (kept,)


# ------------------------------------------------------------------------------------------- the client's address


def client_of(http: httpx.Client, log: Path, headers: list[tuple[str, str]]) -> str:
    """The address that the access line of a request shows."""
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == 401  # without a key, so that refused requests are seen to have an address, too
    return str(line_of(log, answer)["client"])


def line_of(log: Path, answer: httpx.Response) -> dict[str, object]:
    """The access line of a request, which is written after the answer."""
    for _ in range(100):
        for line in map(json.loads, log.read_text().splitlines()):
            if line.get("request_id") == answer.headers["X-Request-ID"] and line["logger"] == "loraplex.access":
                return dict(line)
        time.sleep(0.02)
    raise AssertionError("no line")


XFF, FORWARDED = "X-Forwarded-For", "Forwarded"


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ([], "127.0.0.1"),
        ([(XFF, "203.0.113.7")], "203.0.113.7"),
        ([(XFF, "203.0.113.7:4711")], "203.0.113.7"),
        ([(XFF, "6.6.6.6, 203.0.113.7")], "203.0.113.7"),
        ([(XFF, "6.6.6.6, 203.0.113.7, 10.1.2.3")], "203.0.113.7"),
        ([(XFF, "6.6.6.6"), (XFF, "203.0.113.7")], "203.0.113.7"),
        ([(XFF, "10.1.2.3, 10.1.2.4")], "10.1.2.3"),
        ([(XFF, "evil error=none, 10.1.2.4")], "10.1.2.4"),
        ([(XFF, "unknown")], "127.0.0.1"),
        ([(XFF, "")], "127.0.0.1"),
        ([(XFF, "2001:db8::1")], "2001:db8::1"),
        ([(XFF, "[2001:db8::1]:443, fd00::2")], "2001:db8::1"),
        ([(XFF, "203.0.113.7, ::ffff:10.0.0.9")], "203.0.113.7"),
        ([(FORWARDED, "for=203.0.113.7;proto=https;by=10.0.0.1")], "203.0.113.7"),
        ([(FORWARDED, 'For="[2001:db8::1]:4711"; proto=http, for=10.0.0.2')], "2001:db8::1"),
        ([(FORWARDED, "for=6.6.6.6"), (FORWARDED, 'for="203.0.113.7:80"')], "203.0.113.7"),
        ([(FORWARDED, 'by="a;for=6.6.6.6", for=_hidden')], "127.0.0.1"),
        ([(FORWARDED, 'for="unclosed, for=203.0.113.7')], "203.0.113.7"),
        ([(FORWARDED, "for=6.6.6.6"), (XFF, "203.0.113.7")], "203.0.113.7"),
    ],
)
def test_trusted_proxies_tell_the_clients_address(
    http: httpx.Client, log: Path, headers: list[tuple[str, str]], client: str
) -> None:
    assert client_of(http, log, headers) == client


def test_nobody_else_does(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--preload", "none", "--log-format", "json", "--trusted-proxy", "10.0.0.0/8")
    with (
        serving.serve(tiny_bundle, *options, log=str(log), LORAPLEX_API_KEYS=f"ci:infer:{KEY['X-API-Key']}") as server,
        serving.client(server) as http,
    ):
        assert client_of(http, log, [(XFF, "10.0.0.1"), (FORWARDED, "for=10.0.0.1")]) == "127.0.0.1"


@pytest.mark.parametrize("given", ["10.0.0.0/8", "10.0.0.5", "::1", "10.1.2.3/8", "fd00::/8"])
def test_proxies_are_addresses_or_networks(given: str) -> None:
    assert len(ServerConfig(trusted_proxy=(given,)).trusted_proxy) == 1


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("trusted-proxy", "nginx", "10.0.0.0/8"),
        ("trusted-proxy", "*", "10.0.0.0/8"),
        ("trusted-proxy", "10.0.0.0/33", "10.0.0.0/8"),
        ("cors-origin", "https://app.example.com/", "without a path"),
        ("cors-origin", "app.example.com", "the scheme"),
        ("cors-origin", "https://app.example.com, https://b.example.com", "the scheme"),
        ("root-path", "llm", "/llm"),
        ("root-path", "/a//b", "/llm"),
        ("root-path", "https://host/llm", "/llm"),
    ],
)
def test_a_wrong_value_is_named_with_a_remedy(tiny_bundle: Path, option: str, value: str, remedy: str) -> None:
    run = serving.loraplex("serve", tiny_bundle, f"--{option}", value, "--port", 0)
    assert run.returncode == 1 and f"--{option} {value}" in run.stderr and remedy in run.stderr


# ------------------------------------------------------------------------------------------- a path prefix


@pytest.mark.parametrize("prefix", ["", "/llm/one"])
def test_a_prefix_is_removed_by_the_proxy_or_not(http: httpx.Client, log: Path, prefix: str) -> None:
    assert http.get(f"{prefix}/health").status_code == 200
    answer = http.post(f"{prefix}/v1/classify", json=BODY, headers=KEY)
    assert answer.status_code == 200, answer.text
    assert http.post(f"{prefix}/v1/classify", json=BODY).status_code == 401
    assert http.get(f"{prefix}/v1/adapters/task0", headers=KEY).status_code == 403
    invoked = http.post(f"{prefix}/endpoints/any/invocations", json={"input_text": "x"}, headers=KEY)
    assert invoked.status_code == 200, invoked.text
    assert line_of(log, answer)["path"] == "/v1/classify"
    allowed = http.post(f"{prefix}/v1/models", headers=KEY)
    assert allowed.status_code == 405


def test_our_client_takes_a_url_with_a_prefix(server: serving.Server) -> None:
    with Client(f"{server.url}/llm/one/", api_key=KEY["X-API-Key"]) as client:
        assert client.classify("Customer: hello", "task0")["task0"].label


@pytest.mark.parametrize("prefix", ["/v1", "/v1/adapters", "/health", "/docs"])
def test_a_prefix_that_means_two_things_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--root-path {prefix}"):
        create_app(ServerConfig(root_path=prefix), (), Lifecycle())


@pytest.mark.parametrize("path", ["/llm", "/llm/onev1/models", "/llm/one/llm/one/v1/models", "/llm/one", "//v1/models"])
def test_what_is_no_path_stays_none(http: httpx.Client, path: str) -> None:
    assert http.get(path, headers=KEY).status_code == 404


def test_links_and_the_announced_command_have_the_prefix(server: serving.Server, http: httpx.Client) -> None:
    assert f"{server.url}/llm/one/v1/classify" in server.curl
    for page in ("/docs", "/redoc"):
        assert "/llm/one/openapi.json" in http.get(page, headers=KEY).text
    assert http.get("/openapi.json", headers=KEY).json()["servers"] == [{"url": "/llm/one"}]
    assert json.loads(http.get("/llm/one/openapi.json", headers=KEY).text)["paths"]["/v1/classify"]


# ------------------------------------------------------------------------------------------- bytes on the wire


def ask(server: serving.Server, *pieces: bytes) -> list[tuple[int, bytes]]:
    """(status, body) of each answer to the bytes, until the server closes the connection."""
    with serving.connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        received = serving.receive(sock)
    answers = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        answers.append((int(head.split()[1]), rest[:length]))
        received = rest[length:]
    return answers


END = b"Host: other\r\nX-API-Key: infer-secret-0123456789\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "target", [b"http://host:8000/v1/models?x=1", b"HTTPS://[::1]/llm/one/v1/models", b"/v1/models"]
)
def test_an_absolute_target_is_its_path(server: serving.Server, target: bytes) -> None:
    [(status, body)] = ask(server, b"GET " + target + b" HTTP/1.1\r\n" + END)
    assert status == 200 and b'"task0"' in body


def test_an_absolute_target_without_a_path_is_the_root(server: serving.Server) -> None:
    """The console is there."""
    for target in (b"http://host", b"http://host?x=/v1/models", b"http://host/"):
        [(status, body)] = ask(server, b"GET " + target + b" HTTP/1.1\r\n" + END)
        assert status == 200 and b"Loraplex console" in body


def test_an_absolute_target_opens_nothing(server: serving.Server) -> None:
    """The key is asked for the path that is answered."""
    for target in (b"http://host/v1/models", b"http://health/v1/models", b"http:///health", b"http://u@h/health"):
        [(status, _)] = ask(server, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status == 401


def head(size: int, first: bytes = b"GET /health HTTP/1.1\r\n") -> bytes:
    start, end = first + b"Host: x\r\nConnection: close\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("size", "status"),
    [(MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, 431), (3 * MAX_HEAD_BYTES, 431), (16 * MAX_HEAD_BYTES, 431)],
)
def test_a_head_has_one_limit_however_it_arrives(
    server: serving.Server, log: Path, size: int, status: int, is_whole: bool
) -> None:
    data = head(size)
    pieces = (data,) if is_whole else (data[:100], data[100:MAX_HEAD_BYTES], data[MAX_HEAD_BYTES:])
    [(got, body)] = ask(server, *pieces)
    assert got == status
    if status == 431:
        assert json.loads(body)["error"]["code"] == HeadTooLargeError.code


def test_a_second_head_has_it_too(server: serving.Server) -> None:
    first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = ask(server, first + head(MAX_HEAD_BYTES + 1, first=b"HEAD /health HTTP/1.1\r\n"))
    assert [status for status, _ in answers] == [200, 431]


def test_a_long_body_behind_a_head_counts_for_no_head(server: serving.Server) -> None:
    body = b" " * 2 * MAX_HEAD_BYTES
    start = b"POST /v1/classify HTTP/1.1\r\nX-API-Key: infer-secret-0123456789\r\nContent-Length: %d\r\n" % len(body)
    [(status, answer)] = ask(server, start + b"Host: x\r\n\r\n" + body)
    assert status == 413 and b"body_too_large" in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "verbatim", "prompt": "hello"}),
        ("/v1/chat/completions", {"model": "task0", "messages": [{"role": "user", "content": "hello"}]}),
    ],
)
def test_streams_are_not_buffered_by_proxies(http: httpx.Client, path: str, body: dict[str, object]) -> None:
    answer = http.post(path, json={**body, "max_tokens": 2, "stream": True}, headers=KEY)
    assert answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]"), answer.text
    assert answer.headers["Cache-Control"] == "no-cache" and answer.headers["X-Accel-Buffering"] == "no"
