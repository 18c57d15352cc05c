"""A real server in a process of its own, as users start it."""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import httpx

import forked

ROOT = Path(__file__).parent.parent


# Started when the first process is, so that a worker without servers pays nothing.
_starter: forked.Starter | None = None
_is_forked = find_spec("vllm") is None  # vLLM's processes import the main module again


@dataclass
class Server:
    process: subprocess.Popen[str] | forked.Process
    url: str
    curl: str
    stdout: IO[str]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


def loraplex(*arguments: object, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    with TemporaryFile() as given, TemporaryFile() as output, TemporaryFile() as error:
        given.write(stdin or b"")
        given.seek(0)
        process = _start(
            [*map(str, arguments)], os.environ | environment, [one.fileno() for one in (given, output, error)]
        )
        try:
            code = process.wait(120)
        finally:
            process.kill()
        output.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess([*map(str, arguments)], code, output.read().decode(), error.read().decode())


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str] | forked.Process]:
    """Run the command line, and end it if it still runs. What it prints is dropped."""
    with open(os.devnull, "r+") as nothing:
        process = _start([*map(str, arguments)], os.environ, [nothing.fileno()] * 3)
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def imported_anew() -> Iterator[None]:
    """Start processes as users do, from nothing."""
    global _is_forked
    before, _is_forked = _is_forked, False
    try:
        yield
    finally:
        _is_forked = before


def _start(
    arguments: list[str], environment: Mapping[str, str], files: list[int], max_files: str = ""
) -> subprocess.Popen[str] | forked.Process:
    global _starter
    if _is_forked and not max_files:
        if _starter is None:
            _starter = forked.Starter()
            atexit.register(_starter.stop)
        if _starter.can_start(environment):
            return _starter.start(arguments, environment, files)
    command = [sys.executable, "-m", "loraplex.cli.main", *arguments]
    if max_files:
        command = ["sh", "-c", f'ulimit -n {max_files} && exec "$@"', "sh", *command]
    stdin, stdout, stderr = files
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, text=True, env=dict(environment))


@contextmanager
def serve(*arguments: object, log: str = "", max_files: str = "", **environment: str) -> Iterator[Server]:
    """`loraplex serve …` on a free port, from the line that it prints when ready. log: where standard error goes.
    max_files: as after `ulimit -n`."""
    command = ["serve", *map(str, arguments), "--port", "0"]
    reader, writer = os.pipe()
    with open(reader) as output, open(log or os.devnull, "w") as stderr:
        try:
            process = _start(
                command, os.environ | environment, [0, writer, stderr.fileno() if log else 2], max_files=max_files
            )
        finally:
            os.close(writer)
        try:
            curl = output.readline().strip()
            url = re.search(r"http://[^/ ]+", curl)
            assert url, f"the server did not start: {curl!r}, exit code {process.poll()}"
            yield Server(process, url[0], curl, output)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=30)


def connect(server: Server) -> socket.socket:
    """For what no client would send."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def receive(sock: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    while piece := sock.recv(65536):
        received += piece
    return received
