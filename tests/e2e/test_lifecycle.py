"""A server's life in a real process: loading, draining, stopping, and an engine that dies. The processes run the real
command line, after a few lines that make its model slow or mortal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

BODY = {"input": "Customer: hello", "classifiers": "task0"}
# Files in the working directory say what happens next.
SLOW_LOAD = """
from loraplex.executors.native import NativeExecutor
load = NativeExecutor.load
def wait_and_load(self, *args):
    while not os.path.exists("load"):
        time.sleep(0.02)
    return load(self, *args)
NativeExecutor.load = wait_and_load
"""
SLOW_STEP = """
from loraplex.engine.runner import ModelRunner
run = ModelRunner.run
def wait_and_run(self, step):
    if os.path.exists("slow"):
        open("running", "w").close()
        while not os.path.exists("run"):
            time.sleep(0.02)
    return run(self, step)
ModelRunner.run = wait_and_run
"""
MORTAL_STEP = """
import threading
from loraplex.engine.runner import ModelRunner
run = ModelRunner.run
class Death(BaseException):
    pass
def run_or_die(self, step):
    if threading.current_thread().name == "loraplex-engine" and os.path.exists("die"):
        raise Death("of the engine")
    return run(self, step)
ModelRunner.run = run_or_die
"""
SHORT_CLOSE = """
from loraplex.server import process
process.CLOSE_S = 0.5
"""
HUNG_AND_FAILED = """
import threading
from loraplex.service import start
async def fail(*args):
    import asyncio
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)
    raise RuntimeError("as nobody expected")
start.start = fail
"""


@dataclass
class Process:
    popen: subprocess.Popen[str]
    url: str
    folder: Path

    def tell(self, name: str) -> None:
        (self.folder / name).touch()

    def wait_for(self, name: str) -> None:
        wait_until(lambda: (self.folder / name).exists())

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10, verify=False)  # verify: reading certificates takes its time

    def classify(self, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/classify", json=BODY, headers=headers, timeout=30)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=30)

    def upload(self) -> socket.socket:
        """A request in flight whose body does not end."""
        sock = self.connect()
        sock.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: any\r\nContent-Length: 100\r\n\r\n{")
        return sock

    def end(self, number: int | None = None, within: float = 10) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        if number is not None:
            self.popen.send_signal(number)
        stdout, stderr = self.popen.communicate(timeout=within)
        return self.popen.returncode, stdout, stderr


def wait_until(is_so: object, within: float = 30) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(process: Process, path: str, status: int) -> bool:
    try:
        return process.get(path).status_code == status
    except httpx.TransportError:
        assert process.popen.poll() is None, process.popen.communicate()
        return False


@contextmanager
def serve(bundle: Path, folder: Path, change: str, *arguments: object, **environment: str) -> Iterator[Process]:
    """A process whose port answers: it may still load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", bundle, "--dtype", "float32", "--port", port, *arguments]
    script = f"import os, time\n{change}\nfrom loraplex.cli.main import app\napp()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        served = Process(process, f"http://127.0.0.1:{port}", folder)
        if change is not HUNG_AND_FAILED:
            wait_until(lambda: answers(served, "/health", 200))
        yield served
    finally:
        process.kill()
        process.communicate()


@contextmanager
def serve_ready(bundle: Path, folder: Path, change: str, *arguments: object) -> Iterator[Process]:
    with serve(bundle, folder, change, *arguments) as process:
        wait_until(lambda: answers(process, "/ready", 200))
        yield process


def assert_not_ready(response: httpx.Response) -> None:
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
    assert response.json()["error"]["code"] == "not_ready"


# ------------------------------------------------------------------------------------------- loading


def test_while_it_loads_it_lives_and_is_not_ready(tiny_bundle: Path, tmp_path: Path) -> None:
    key = "admin-secret-0123456789"
    with serve(tiny_bundle, tmp_path, SLOW_LOAD, LORAPLEX_API_KEYS=f"ops:admin:{key}") as process:
        assert process.get("/health").json() == {"status": "ok"}
        for path in ("/ready", "/ping"):
            assert_not_ready(process.get(path))
        assert process.classify().status_code == 401
        assert_not_ready(process.classify(**{"X-API-Key": key}))
        for path in ("/metrics", "/docs", "/v1/adapters", "/nowhere"):
            assert_not_ready(httpx.get(process.url + path, headers={"X-API-Key": key}))
        process.tell("load")
        assert process.popen.stdout is not None
        assert process.popen.stdout.readline().startswith("curl -s http://127.0.0.1")
        assert process.get("/ready").status_code == process.get("/ping").status_code == 200
        assert process.classify(**{"X-API-Key": key}).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_though_a_thread_still_loads(tiny_bundle: Path, tmp_path: Path, number: int) -> None:
    with serve(tiny_bundle, tmp_path, SLOW_LOAD) as process:
        code, stdout, stderr = process.end(number, within=3)
    assert (code, stdout) == (0, "")
    assert "stopped" in stderr and "Traceback" not in stderr


def test_sigterm_ends_it_before_it_listens_too(tiny_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import loraplex.bundle as b, time\n"
        "b.open_bundle = lambda *_, **__: (print('here', flush=True), time.sleep(1000))\n"
        "from loraplex.cli.main import app\napp()"
    )
    command = [sys.executable, "-c", script, "serve", str(tiny_bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.terminate()
        assert process.wait(5) == 0


def test_a_start_that_fails_unexpectedly_says_so_though_a_thread_hangs(tiny_bundle: Path, tmp_path: Path) -> None:
    with serve(tiny_bundle, tmp_path, HUNG_AND_FAILED) as process:
        code, stdout, stderr = process.end(within=30)
    assert code == 1 and stdout == ""
    assert "RuntimeError: as nobody expected" in stderr


def test_in_json_every_line_on_standard_error_is_an_object(tiny_bundle: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("die").touch()
    with serve(tiny_bundle, tmp_path, MORTAL_STEP, "--log-format", "json") as process:
        code, _, stderr = process.end(within=30)
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert code == 1 and lines[-1]["level"] == "critical" and lines[-1]["error"] == "engine_error"
    assert any("Death: of the engine" in line.get("exception", "") for line in lines)


# ------------------------------------------------------------------------------------------- stopping


def test_sigterm_lets_requests_finish_and_takes_no_more(tiny_bundle: Path, tmp_path: Path) -> None:
    with (
        serve_ready(tiny_bundle, tmp_path, SLOW_STEP) as process,
        process.connect() as idle,
        ThreadPoolExecutor() as pool,
    ):
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: any\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += idle.recv(65536)
        process.tell("slow")
        in_flight = [pool.submit(process.classify) for _ in range(3)]
        process.wait_for("running")
        time.sleep(1)  # the others come meanwhile
        process.popen.terminate()
        wait_until(lambda: answers(process, "/ready", 503), within=10)
        idle.settimeout(10)
        assert idle.recv(65536) == b""
        assert process.get("/health").status_code == 200
        assert_not_ready(process.classify())
        assert_not_ready(process.get("/ping"))
        assert process.get("/health").headers["Connection"] == "close"
        time.sleep(0.5)
        assert process.popen.poll() is None and not any(one.done() for one in in_flight)
        process.tell("run")
        for one in in_flight:
            assert one.result(10).status_code == 200 and one.result().headers["Connection"] == "close"
        code, _, stderr = process.end()
    assert code == 0 and "stopped" in stderr and "Traceback" not in stderr


def test_who_has_connected_and_not_asked_yet_is_answered_and_not_cut_off(tiny_bundle: Path, tmp_path: Path) -> None:
    with (
        serve_ready(tiny_bundle, tmp_path, "") as process,
        process.upload(),  # holds the process up
        process.connect() as late,
    ):
        assert process.get("/health").status_code == 200  # so `late`, which came before, is accepted
        process.popen.terminate()
        wait_until(lambda: answers(process, "/ready", 503))
        late.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: any\r\nContent-Length: 0\r\n\r\n")
        answer = b"".join(iter(lambda: late.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503") and b"connection: close" in answer.lower() and b'"not_ready"' in answer


def test_when_the_time_to_drain_is_over_what_waits_is_told_so(tiny_bundle: Path, tmp_path: Path) -> None:
    with (
        serve_ready(tiny_bundle, tmp_path, SLOW_STEP + SHORT_CLOSE, "--drain-timeout", 1) as process,
        process.upload() as upload,
        ThreadPoolExecutor() as pool,
    ):
        process.tell("slow")
        in_flight = pool.submit(process.classify)
        process.wait_for("running")
        started = time.monotonic()
        process.popen.terminate()
        assert_not_ready(in_flight.result(5))
        assert 0.8 < time.monotonic() - started < 3
        assert upload.recv(65536).startswith(b"HTTP/1.1 503")
        code, _, stderr = process.end(within=10)  # its step hangs: not waited for either
    assert code == 0 and "Traceback" not in stderr


def test_with_nothing_in_flight_it_stops_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    with serve_ready(tiny_bundle, tmp_path, "") as process, httpx.Client(base_url=process.url) as http:
        assert http.post("/v1/classify", json=BODY).status_code == 200
        started = time.monotonic()
        code, _, _ = process.end(signal.SIGTERM)
    assert code == 0 and time.monotonic() - started < 2


# ------------------------------------------------------------------------------------------- an engine that dies


def test_a_dead_engine_answers_what_waits_fails_health_and_ends_the_process(tiny_bundle: Path, tmp_path: Path) -> None:
    with serve_ready(tiny_bundle, tmp_path, MORTAL_STEP) as process, ThreadPoolExecutor(8) as pool:
        assert process.classify().status_code == 200
        with process.upload():  # holds the process up, so that there is time to look at it
            process.tell("die")
            waiting = [pool.submit(process.classify) for _ in range(8)]
            outcomes = [one.result(10) for one in waiting]
            assert {one.status_code for one in outcomes} <= {500, 503} and outcomes[0].json()["error"]["code"]
            assert any(one.json()["error"]["code"] == "engine_error" for one in outcomes)
            wait_until(lambda: answers(process, "/health", 503), within=1)
            assert process.get("/ready").status_code == 503
        code, _, stderr = process.end()
    assert code == 1
    assert "Death: of the engine" in stderr and "engine_error: the engine died" in stderr


def test_an_engine_that_dies_of_the_first_adapter_is_never_ready(tiny_bundle: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("die").touch()
    with serve(tiny_bundle, tmp_path, MORTAL_STEP) as process:
        code, stdout, stderr = process.end(within=30)
    assert (code, stdout) == (1, "") and "the engine died" in stderr
