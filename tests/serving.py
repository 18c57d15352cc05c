"""A real server in a process of its own, as users start it."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    curl: str

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


def loraplex(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    run = subprocess.run(_command(*arguments), input=stdin, capture_output=True, timeout=120)
    return subprocess.CompletedProcess(run.args, run.returncode, run.stdout.decode(), run.stderr.decode())


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraplex.cli.main", *map(str, arguments)]


@contextmanager
def serve(*arguments: object, log: str = "", max_files: str = "", **environment: str) -> Iterator[Server]:
    """`loraplex serve …` on a free port, from the line that it prints when ready. log: where standard error goes.
    max_files: as after `ulimit -n`."""
    command = _command("serve", *arguments, "--port", 0)
    if max_files:
        command = ["sh", "-c", f'ulimit -n {max_files} && exec "$@"', "sh", *command]
    with open(log, "w") if log else nullcontext() as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | environment,
        )
    try:
        assert process.stdout is not None
        curl = process.stdout.readline().strip()
        url = re.search(r"http://[^/ ]+", curl)
        assert url, f"the server did not start: {curl!r}, exit code {process.poll()}"
        yield Server(process, url[0], curl)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


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
