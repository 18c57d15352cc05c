"""More connections than the server may have open files."""

import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

import serving

pytestmark = pytest.mark.chaos

NUM_FILES, NUM_CONNECTIONS = 64, 100
CONTENT = b'{"input": "Customer: hello", "classifiers": "task0"}'
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: any\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, log: Path) -> Iterator[serving.Server]:
    arguments = ("--dtype", "float32", "--state-dir", log.parent / "state")
    with serving.serve(tiny_bundle, *arguments, log=str(log), max_files=str(NUM_FILES)) as server:
        yield server


@pytest.fixture
def idle(server: serving.Server) -> Iterator[list[socket.socket]]:
    """Connections that send nothing, once the server has decided about each."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(serving.connect(server)) for _ in range(NUM_CONNECTIONS)]
        time.sleep(2)  # connections beyond the limit wait a second for a request
        yield sockets


def is_kept(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(30)


def cpu_seconds(server: serving.Server) -> float:
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def set_limit(server: serving.Server, num_files: int) -> None:
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (num_files, NUM_FILES))


def classify(sock: socket.socket) -> float:
    """Seconds until the answer was there."""
    started, received = time.monotonic(), b""
    sock.sendall(REQUEST)
    while b'"timings"' not in received:
        piece = sock.recv(65536)
        assert piece, f"closed after {received!r}"
        received += piece
    assert received.startswith(b"HTTP/1.1 200")
    return time.monotonic() - started


def assert_answers(server: serving.Server) -> None:
    """Once the server knows that the connections of before are closed."""
    end = time.monotonic() + 5
    with serving.client(server) as http:
        while not (response := http.post("/invocations", content=CONTENT)).is_success:
            assert time.monotonic() < end, response.text
            time.sleep(0.05)


def test_connections_beyond_the_limit_get_503_and_the_others_are_answered_at_once(
    server: serving.Server, idle: list[socket.socket], log: Path
) -> None:
    kept = [sock for sock in idle if is_kept(sock)]
    refused = [sock for sock in idle if sock not in kept]
    assert NUM_FILES / 4 < len(kept) < NUM_FILES - 16, "files need descriptors, too"
    for sock in refused:
        head, _, body = serving.receive(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in head and b"Connection: close" in head
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        assert "--max-connections" in json.loads(body)["error"]["remedy"]
    assert max(classify(sock) for sock in kept) < 1


def test_a_client_of_a_full_server_hears_why_and_probes_are_answered(
    server: serving.Server, idle: list[socket.socket]
) -> None:
    with serving.client(server) as http:
        refused = http.post("/v1/classify", content=CONTENT, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("1", "close")
        for path in ("/health", "/ready", "/ping"):
            assert http.get(path).status_code == 200
    for sock in idle:
        sock.close()
    assert_answers(server)


def test_a_full_server_writes_little_and_works_little(
    server: serving.Server, idle: list[socket.socket], log: Path
) -> None:
    started, before, written = time.monotonic(), cpu_seconds(server), len(log.read_text())
    for _ in range(20):
        for sock in [serving.connect(server) for _ in range(10)]:
            sock.close()
        time.sleep(0.1)
    seconds = time.monotonic() - started
    assert cpu_seconds(server) - before < 0.5 * seconds
    text = log.read_text()[written:]
    lines = [line for line in text.splitlines() if "connections are open" in line]
    assert 1 <= len(lines) <= seconds + 2 and "Traceback" not in text


def test_all_descriptors_gone_is_one_line_a_second(server: serving.Server, log: Path) -> None:
    """By whatever else has them open: here the limit falls below what is open already."""
    with httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/health").status_code == 200
        set_limit(server, 8)
        with ExitStack() as stack:
            for _ in range(NUM_CONNECTIONS):
                stack.enter_context(serving.connect(server))
            before = cpu_seconds(server)
            time.sleep(3)
            assert cpu_seconds(server) - before < 1
            started = time.monotonic()
            response = http.post("/invocations", content=CONTENT)
            assert response.status_code == 200 and time.monotonic() - started < 1
            text = log.read_text()
            lines = [line for line in text.splitlines() if "cannot be accepted: Too many open files" in line]
            assert 1 <= len(lines) <= 5 and "Traceback" not in text
    set_limit(server, NUM_FILES)
    assert_answers(server)
