"""A real nginx with our settings before a real server that runs as the systemd unit starts it: `make test-deploy`."""

import gzip
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import boto3
import httpx
import pytest
from botocore.config import Config

import deployment
import serving
from loraplex import Client
from loraplex.errors import LoraplexError
from loraplex.server.keys import new_key

TEXT = "Customer: hello, is my payment done?"
BODY = {"input": TEXT, "classifiers": "task0"}
MADE = {scope: new_key(scope, scope) for scope in ("infer", "admin")}
KEYS = {scope: secret for scope, (secret, _) in MADE.items()}
KEY = {"X-API-Key": KEYS["infer"]}
LIMIT = 2 * 2**20

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not deployment.TOOLS.is_dir(), reason="needs .deploy-tools: make test-deploy"),
]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for this machine, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    files = ("-keyout", f"{folder}/privkey.pem", "-out", f"{folder}/fullchain.pem")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, log: Path) -> Iterator[serving.Server]:
    keys = log.parent / "keys.txt"
    keys.write_text("".join(f"{line}\n" for _, line in MADE.values()))
    values = {"api_key_file": keys, "state_dir": log.parent / "state"}
    arguments = deployment.here(deployment.commands()["systemd"], path=tiny_bundle, **values)
    with serving.serve(*arguments, log=str(log), LORAPLEX_DTYPE="float32") as server:
        yield server


@contextmanager
def nginx(folder: Path, certificate: Path, upstream: str, **replaced: str) -> Iterator[str]:
    """nginx before `upstream`; yields the URL of its prefix. Its error log is `folder`/error.log. replaced: other parts
    of the settings -> what stands there instead."""
    folder.mkdir(exist_ok=True)
    port = deployment.free_port()
    conf = deployment.read("nginx.conf")
    for ours, here in {
        "server 127.0.0.1:8000;": f"server {upstream.removeprefix('http://')};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",  # there may be no IPv6
        "/etc/ssl/loraplex": str(certificate),
        **replaced,
    }.items():
        assert ours in conf
        conf = conf.replace(ours, here)
    (folder / "loraplex.conf").write_text(conf)
    places = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
    )
    main = f"daemon off; user root; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
    main += f"http {{\naccess_log off;\n{places}include {folder}/loraplex.conf;\n}}\n"
    (folder / "nginx.conf").write_text(main)
    command = [deployment.program("nginx"), "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command) as process:
        try:
            wait_for_port(port)
            yield f"https://localhost:{port}/llm"
        finally:
            process.terminate()


def wait_for_port(port: int) -> None:
    ends = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < ends, "nginx does not start"
            time.sleep(0.05)


@pytest.fixture(scope="module", params=["the prefix is passed on", "the prefix is removed"])
def url(
    request: pytest.FixtureRequest,
    server: serving.Server,
    certificate: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    replaced = {"proxy_pass http://loraplex;": "proxy_pass http://loraplex/;"} if "removed" in request.param else {}
    folder = tmp_path_factory.mktemp("nginx")
    with nginx(folder, certificate, server.url, **replaced) as url:
        yield url
    errors = (folder / "error.log").read_text()
    assert "temporary file" not in errors, "conversations were written to the disk"


@contextmanager
def asking(url: str, certificate: Path, address: str = "127.0.0.1") -> Iterator[httpx.Client]:
    """A client at an address of its own that trusts the certificate and sends the key."""
    transport = httpx.HTTPTransport(
        verify=ssl.create_default_context(cafile=str(certificate / "fullchain.pem")), local_address=address
    )
    with httpx.Client(base_url=url, headers=KEY, transport=transport, timeout=30) as http:
        yield http


@pytest.fixture
def http(url: str, certificate: Path) -> Iterator[httpx.Client]:
    with asking(url, certificate) as http:
        yield http


def error(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["Content-Type"] == "application/json", answer.text
    told = answer.json()["error"]
    assert set(told) == {"code", "message", "remedy"}
    return answer.status_code, told["code"]


def test_what_is_asked_under_the_prefix_is_answered(http: httpx.Client) -> None:
    verdict = http.post("/v1/classify", json=BODY).raise_for_status().json()["verdicts"][0]
    assert verdict["classifier"] == "task0" and verdict["label"] in ("yes", "no")
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    assert "/llm/openapi.json" in http.get("/docs").raise_for_status().text
    schema = http.get("/openapi.json").raise_for_status().json()
    assert schema["servers"] == [{"url": "/llm"}] and "/v1/classify" in schema["paths"]
    outside = str(http.base_url).removesuffix("/llm/") + "/v1/models"
    assert error(http.get(outside)) == (404, "not_found")


def test_keys_pass(http: httpx.Client) -> None:
    assert error(http.get("/v1/models", headers={"X-API-Key": "wrong"})) == (401, "unauthorized")
    assert error(http.get("/v1/adapters")) == (403, "forbidden")
    bearer = {"X-API-Key": KEYS["admin"], "Authorization": f"Bearer {KEYS['infer']}"}
    assert http.get("/v1/adapters", headers=bearer).status_code == 200


def test_a_stream_comes_event_by_event(url: str, certificate: Path) -> None:
    asked = {"model": "verbatim", "prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": True}
    body = json.dumps(asked).encode()
    head = (
        f"POST /llm/v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEYS['infer']}\r\nConnection: close\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    context = ssl.create_default_context(cafile=str(certificate / "fullchain.pem"))
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 443), timeout=30) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as sock:
            sock.sendall(head.encode() + body)
            # One piece is what nginx sent at once: a record of TLS.
            pieces = list(iter(lambda: sock.recv(2**16), b""))
    num_events = [piece.count(b"data: ") for piece in pieces if b"data: " in piece]
    assert pieces[0].startswith(b"HTTP/1.1 200") and sum(num_events) > 50
    assert median(num_events) == 1, f"nginx gathers events: {num_events}"


def test_the_log_shows_the_clients_address(url: str, certificate: Path, log: Path) -> None:
    with asking(url, certificate, "127.0.0.3") as http:
        answer = http.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.9"})
    ends = time.monotonic() + 10
    while not (lines := [one for one in log.read_text().splitlines() if answer.headers["X-Request-ID"] in one]):
        assert time.monotonic() < ends, "the request is not in the log"
        time.sleep(0.05)
    assert json.loads(lines[0])["client"] == "127.0.0.3"


def test_a_body_may_be_as_large_as_without_nginx(http: httpx.Client) -> None:
    body = json.dumps(BODY).encode()
    headers = {"Content-Type": "application/json"}
    assert http.post("/v1/classify", content=body.ljust(LIMIT), headers=headers).status_code == 200

    def in_pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**16

    packed = gzip.compress(body.ljust(LIMIT + 1))
    for content, more in (
        (body.ljust(LIMIT + 1), {}),
        (b" " * 5 * LIMIT, {}),
        (in_pieces(), {}),
        (packed, {"Content-Encoding": "gzip"}),  # refused by the server
    ):
        assert error(http.post("/v1/classify", content=content, headers=headers | more)) == (413, "body_too_large")


def test_a_head_may_be_as_large_as_without_nginx(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"X-Any": "x" * 12_000}).status_code == 200
    assert error(http.get("/v1/models", headers={"X-Any": "x" * 9_000, "X-Other": "x" * 9_000})) == (
        431,
        "head_too_large",
    )
    assert error(http.get("/v1/models", headers={"X-Any": "x" * 20_000})) == (431, "head_too_large")


def test_boto3_asks_through_nginx(url: str, certificate: Path) -> None:
    runtime = boto3.client(
        "sagemaker-runtime",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        verify=str(certificate / "fullchain.pem"),
        config=Config(retries={"total_max_attempts": 1}),
    )
    runtime.meta.events.register("before-send.sagemaker-runtime", lambda request, **_: request.headers.update(KEY))
    body = json.dumps({"input_text": TEXT, "adapter_name": "task1"})
    answer = runtime.invoke_endpoint(EndpointName="any", ContentType="application/json", Body=body)
    assert set(json.loads(answer["Body"].read())[0]) == {"confidence_score", "predicted_text"}


def test_our_client_asks_through_nginx(url: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "fullchain.pem"))
    with Client(url, api_key=KEYS["infer"]) as client:
        assert client.classify(TEXT, "task0").verdicts[0].label in ("yes", "no")


def test_where_no_server_runs_nginx_answers_as_a_server_that_starts(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "fullchain.pem"))
    with nginx(tmp_path / "nginx", certificate, f"127.0.0.1:{deployment.free_port()}") as url:
        with asking(url, certificate) as http:
            answer = http.post("/v1/classify", json=BODY)
            assert error(answer) == (503, "not_ready") and answer.headers["Retry-After"] == "1"
        with Client(url, max_retries=0) as client, pytest.raises(LoraplexError) as caught:
            client.classify(TEXT, "task0")
        assert caught.value.code == "not_ready"


def test_a_server_that_never_answers(certificate: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"127.0.0.1:{silent.getsockname()[1]}"
        with nginx(
            tmp_path / "nginx", certificate, upstream, **{"proxy_read_timeout 1h;": "proxy_read_timeout 1s;"}
        ) as url:
            with asking(url, certificate) as http:
                assert error(http.post("/v1/classify", json=BODY)) == (504, "deadline_exceeded")
