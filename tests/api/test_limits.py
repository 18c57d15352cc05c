"""Slow, large and lying requests, as raw bytes against a real server with short limits."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serving
from loraplex.server.connection import LINGER_S
from loraplex.server.encodings import ACCEPTED

BODY_TIMEOUT, IDLE_TIMEOUT = 1.0, 2.0
CONTENT = b'{"input": "Customer: hello", "classifiers": "task0"}'
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: any\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[serving.Server]:
    limits = ("--body-timeout", BODY_TIMEOUT, "--idle-timeout", IDLE_TIMEOUT, "--max-body-bytes", 4096)
    with serving.serve(tiny_bundle, "--dtype", "float32", *limits) as server:
        yield server


@pytest.fixture
def sock(server: serving.Server) -> Iterator[socket.socket]:
    with serving.connect(server) as sock:
        yield sock


def length(number: int) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % number


def answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the next answer on the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = sock.recv(65536)
        assert piece, f"closed after {received!r}"
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += sock.recv(65536)
    return int(first.split()[1]), headers, body


def code(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


def assert_closed_after(sock: socket.socket, seconds: float, started: float) -> None:
    sock.settimeout(seconds + 5)
    assert sock.recv(65536) == b""
    assert seconds - 0.2 < time.monotonic() - started < seconds + 2


def drip(sock: socket.socket, data: bytes, every: float, stopped: threading.Event) -> threading.Thread:
    def send() -> None:
        for at in range(len(data)):
            if stopped.wait(every):
                return
            try:
                sock.sendall(data[at : at + 1])
            except OSError:
                return

    thread = threading.Thread(target=send)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------------- bodies


def test_a_body_that_does_not_come_whole_is_408_and_the_connection_is_closed(sock: socket.socket) -> None:
    started = time.monotonic()
    sock.sendall(HEAD + length(len(CONTENT)) + CONTENT[:-1])
    status, headers, body = answer(sock)
    assert BODY_TIMEOUT - 0.1 < time.monotonic() - started < BODY_TIMEOUT + 1
    assert (status, code(body), headers["connection"]) == (408, "request_timeout", "close")
    assert headers["x-request-id"] and sock.recv(1) == b""


@pytest.mark.parametrize("framing", [length(len(CONTENT)), b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_drop_by_drop_is_408(sock: socket.socket, framing: bytes) -> None:
    """The time is the request's, and does not start again with each byte."""
    started, stopped = time.monotonic(), threading.Event()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in CONTENT) if b"chunked" in framing else CONTENT
    sock.sendall(HEAD + framing)
    thread = drip(sock, chunks, 0.1, stopped)
    try:
        assert answer(sock)[0] == 408
        assert time.monotonic() - started < BODY_TIMEOUT + 1
    finally:
        stopped.set()
        thread.join()


def test_a_body_in_pieces_that_comes_in_time_is_answered(sock: socket.socket) -> None:
    sock.sendall(HEAD + length(len(CONTENT)))
    for at in range(0, len(CONTENT), 10):
        time.sleep(0.02)
        sock.sendall(CONTENT[at : at + 10])
    assert answer(sock)[0] == 200


def test_a_chunked_body_is_answered_and_counted(sock: socket.socket) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    sock.sendall(chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENT), CONTENT))
    assert answer(sock)[0] == 200
    sock.sendall(chunked + b"fff\r\n%s\r\n" % (b" " * 0xFFF))
    time.sleep(0.1)
    sock.sendall(b"2\r\n  \r\n")
    status, _, body = answer(sock)
    assert (status, code(body)) == (413, "body_too_large")

    assert serving.receive(sock) == b"", "the rest of the body would be read as a request"


def test_a_declared_length_that_is_too_large_is_refused_before_the_body_comes(sock: socket.socket) -> None:
    sock.sendall(HEAD + b"Expect: 100-continue\r\n" + length(4097))
    status, _, body = answer(sock)
    assert (status, code(body)) == (413, "body_too_large")


def test_a_body_of_just_the_limit_is_read(sock: socket.socket) -> None:
    sock.sendall(HEAD + length(4096) + CONTENT + b" " * (4096 - len(CONTENT)))
    assert answer(sock)[0] == 200


@pytest.mark.parametrize("size", [100_000, 20_000_000])
def test_a_client_that_sends_the_refused_body_all_the_same_gets_the_answer_and_the_end(
    sock: socket.socket, size: int
) -> None:
    sock.sendall(HEAD + length(size))
    thread = threading.Thread(target=send_all, args=(sock, b"x" * size))
    thread.start()
    status, headers, body = answer(sock)
    assert (status, headers["connection"], code(body)) == (413, "close", "body_too_large")
    assert serving.receive(sock) == b""
    thread.join()


def send_all(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except ConnectionError:
        pass


@pytest.mark.parametrize("path", [b"/v1/classify", b"/nowhere", b"/health"])
def test_a_length_and_chunks_at_once_end_the_connection(sock: socket.socket, path: bytes) -> None:
    """A proxy that believes one, and a server that believes the other, see different requests."""
    both = HEAD.replace(b"/v1/classify", path) + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    sock.sendall(both + b"%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENT), CONTENT) + HEAD + length(len(CONTENT)) + CONTENT)
    status, headers, body = answer(sock)
    if path != b"/health":
        assert (status, code(body)) == (400, "bad_input")
    assert headers["connection"] == "close" and serving.receive(sock) == b""


@pytest.mark.parametrize("value", [b"br", b"gzip, deflate"])
def test_a_body_in_another_coding_is_415_by_name(sock: socket.socket, value: bytes) -> None:
    sock.sendall(HEAD + b"Content-Encoding: " + value + b"\r\n" + length(len(CONTENT)) + CONTENT)
    status, headers, body = answer(sock)
    assert (status, code(body), headers["accept-encoding"]) == (415, "unsupported_encoding", ACCEPTED)
    error = json.loads(body)["error"]
    assert repr(value.decode()) in error["message"] and "uncompressed" in error["remedy"]


def test_identity_is_no_compression(sock: socket.socket) -> None:
    sock.sendall(HEAD + b"Content-Encoding: identity\r\n" + length(len(CONTENT)) + CONTENT)
    assert answer(sock)[0] == 200


@pytest.mark.parametrize(
    ("sent", "status", "error", "says"),
    [
        (b"GARBAGE\r\n\r\n", 400, "malformed_http", "illegal request line"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, "malformed_http", "illegal request line"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "malformed_http", "Host"),
        (b"GET /health HTTP/1.1\r\nHost: any\r\nbad header\r\n\r\n", 400, "malformed_http", "bad header"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501, "malformed_http", "Transfer-Encoding"),
        (HEAD + b"X-Long: " + b"x" * 20_000, 431, "head_too_large", "16384 bytes"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n", 400, "malformed_http", "chunk"),
    ],
)
def test_malformed_http_gets_the_json_error_and_the_end(
    sock: socket.socket, sent: bytes, status: int, error: str, says: str
) -> None:
    sock.sendall(sent)
    found, headers, body = answer(sock)
    assert (found, code(body), headers["connection"]) == (status, error, "close")
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    assert set(json.loads(body)["error"]) == {"code", "message", "remedy"}
    assert says in json.loads(body)["error"]["message"]
    assert serving.receive(sock) == b""


@pytest.mark.parametrize("value", [b"-1", b"1e3", b"5, 6", b"0x10", b""])
def test_a_length_that_is_none_is_400(sock: socket.socket, value: bytes) -> None:
    sock.sendall(HEAD + b"Content-Length: " + value + b"\r\n\r\n")
    assert serving.receive(sock).startswith(b"HTTP/1.1 400")


def test_a_length_that_is_too_small_makes_two_requests_and_the_second_is_refused(sock: socket.socket) -> None:
    sock.sendall(HEAD + length(len(CONTENT)) + CONTENT + b"GARBAGE\r\n\r\n")
    first, _, second = serving.receive(sock).partition(b"HTTP/1.1 400")
    assert first.startswith(b"HTTP/1.1 200") and second


def test_what_is_computed_longer_than_a_body_may_take_is_answered(tiny_bundle: Path) -> None:
    text = "Customer: hello\n" * 10
    with (
        serving.serve(tiny_bundle, "--dtype", "float32", "--body-timeout", 0.05, "--idle-timeout", 1) as server,
        serving.client(server) as http,
    ):
        body = {"inputs": [f"{text}{index}" for index in range(900)]}
        started = time.monotonic()
        assert http.post("/v1/classify", json=body).status_code == 200
        assert time.monotonic() - started > 1.1, "too fast to show anything: ask for more"


def test_a_client_that_leaves_in_the_midst_of_its_body_harms_nobody(server: serving.Server) -> None:
    with serving.client(server) as http:
        before = num_cancelled(http)
        for _ in range(20):
            with serving.connect(server) as sock:
                sock.sendall(HEAD + length(len(CONTENT)) + CONTENT[:7])
        assert http.post("/v1/classify", content=CONTENT, headers={"Content-Type": "application/json"}).is_success
        deadline = time.monotonic() + 5
        while num_cancelled(http) != before + 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_client_that_sends_more_and_leaves_is_noticed(server: serving.Server) -> None:
    """Bytes behind a request, which may be the next one's, wait until it is answered; the client's end does not."""
    body = json.dumps({"inputs": ["hello"] * 400, "classifiers": "*"}).encode()
    with serving.client(server) as http:
        before = num_cancelled(http)
        with serving.connect(server) as sock:
            sock.sendall(HEAD + length(len(body)) + body)
            time.sleep(0.2)
            sock.sendall(b"\r\n")
            time.sleep(0.05)
        deadline = time.monotonic() + 10
        while num_cancelled(http) != before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def num_cancelled(http: httpx.Client) -> float:
    [line] = [
        line for line in http.get("/metrics").text.splitlines() if line.startswith("loraplex_requests_cancelled_total ")
    ]
    return float(line.split()[1])


def test_a_broken_chunk_behind_an_answer_closes_the_connection(tiny_bundle: Path, tmp_path: Path) -> None:
    log, key = tmp_path / "log", f"key:infer:{'k' * 32}"
    with serving.serve(tiny_bundle, "--dtype", "float32", log=str(log), LORAPLEX_API_KEYS=key) as server:
        with serving.connect(server) as sock:
            sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            assert answer(sock)[0] == 401
            sock.sendall(b"zzz\r\n")
            assert serving.receive(sock) == b""
    assert "Traceback" not in log.read_text()


# ------------------------------------------------------------------------------------------- connections


def test_a_connection_that_sends_nothing_is_closed(sock: socket.socket) -> None:
    assert_closed_after(sock, IDLE_TIMEOUT, time.monotonic())


@pytest.mark.parametrize("head", [b"G", b"GET /health HTTP/1.1\r\n", HEAD + b"X-Slow: " + b"z" * 1000])
def test_a_head_drop_by_drop_is_cut_off(sock: socket.socket, head: bytes) -> None:
    started, stopped = time.monotonic(), threading.Event()
    sock.sendall(head)
    thread = drip(sock, b"GET /health HTTP/1.1\r\n" + b"x" * 100, 0.2, stopped)
    try:
        assert_closed_after(sock, IDLE_TIMEOUT, started)
    finally:
        stopped.set()
        thread.join()


def test_a_kept_connection_is_closed_when_idle_and_not_before(sock: socket.socket) -> None:
    for _ in range(4):
        time.sleep(IDLE_TIMEOUT * 0.6)
        sock.sendall(HEAD + length(len(CONTENT)) + CONTENT)
        assert answer(sock)[0] == 200
    started = time.monotonic()
    stopped = threading.Event()
    thread = drip(sock, b"GET /health HTTP/1.1\r\n" + b"x" * 100, 0.2, stopped)
    try:
        assert_closed_after(sock, IDLE_TIMEOUT, started)
    finally:
        stopped.set()
        thread.join()


def test_a_refused_body_without_an_end_is_cut_off(sock: socket.socket) -> None:
    started, stopped = time.monotonic(), threading.Event()
    sock.sendall(HEAD + length(1 << 40))
    assert answer(sock)[0] == 413
    thread = drip(sock, b"x" * 1000, 0.1, stopped)
    try:
        assert serving.receive(sock) == b""
        while thread.is_alive():  # until the server has thrown enough away
            assert time.monotonic() - started < LINGER_S + 2
            time.sleep(0.05)
    finally:
        stopped.set()
        thread.join()


def test_requests_in_a_row_without_waiting_are_all_answered(sock: socket.socket) -> None:
    sock.sendall((HEAD + length(len(CONTENT)) + CONTENT) * 3)
    received = b""
    while received.count(b'"verdicts"') < 3:
        piece = sock.recv(65536)
        assert piece
        received += piece
    assert received.count(b"HTTP/1.1 200") == 3


def test_answers_are_not_held_back(server: serving.Server) -> None:
    """Without TCP_NODELAY the second half of an answer waits 40 ms for the client's acknowledgement of the first."""
    with httpx.Client(base_url=server.url) as http:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            http.get("/health")
            times.append(time.perf_counter() - started)
    assert sorted(times)[10] < 0.02


def test_who_does_not_read_the_answers_is_cut_off(server: serving.Server) -> None:
    with serving.connect(server) as sock:
        sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: any\r\n\r\n" * 400)  # some 30 MB of answers
        time.sleep(IDLE_TIMEOUT + 2)
        received = serving.receive(sock)
    assert 0 < received.count(b"HTTP/1.1 200 OK") < 400
