"""Starts `loraplex …` as a fork of one process that has imported what it needs: importing takes most of a start's time.

    python tests/forked.py FD

FD is a socket. Each message on it starts a process. The message holds its arguments, folder, environment and limits as
JSON, and four file descriptors: standard input, output and error, and a socket that gets the process's id and its exit
code.
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULES = ("loraplex.server.process", "loraplex.service.start", "loraplex.executors.native")
NUMBER = struct.Struct("i")
MESSAGE_BYTES = 1 << 17
LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)  # which tests set
# Other variables may be read while these modules are imported.
READ_LATER = ("LORAPLEX_", "AWS_", "PYTEST_")


class Process:
    """As much of subprocess.Popen as the tests ask for."""

    def __init__(self, args: list[str], told: socket.socket) -> None:
        self.args, self._told = args, told
        self.returncode: int | None = None
        self.pid = self._number()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = self._number()
            self._told.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        received = self._told.recv(NUMBER.size)
        assert received, "the process that starts others has ended"
        return int(NUMBER.unpack(received)[0])


class Starter:
    """The process that is forked: one for each process that runs tests."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with these variables would have imported the same."""
        changed = (name for name, _ in environment.items() ^ self.environment.items())
        return all(name.startswith(READ_LATER) for name in changed)

    def start(self, arguments: list[str], environment: Mapping[str, str], files: list[int]) -> Process:
        """files: standard input, output and error."""
        told, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        message = {
            "arguments": arguments,
            "folder": str(Path.cwd()),
            "environment": dict(environment),
            "limits": [(limit, resource.getrlimit(limit)) for limit in LIMITS],
        }
        with other:
            socket.send_fds(self._socket, [json.dumps(message).encode()], [*files, other.fileno()])
        return Process(arguments, told)

    def stop(self) -> None:
        self._socket.close()
        self._process.wait(30)


def main() -> None:
    from loraplex.cli.main import app

    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else each process would copy these objects when it collects garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that keep watch
    with socket.socket(fileno=int(sys.argv[1])) as messages:
        while True:
            message, files, _, _ = socket.recv_fds(messages, MESSAGE_BYTES, 4)
            if not message:
                return
            if os.fork():
                for one in files:
                    os.close(one)
                continue
            messages.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _start(json.loads(message), files)
            app(prog_name="loraplex")


def _start(wanted: dict[str, Any], files: list[int]) -> None:
    """Fork once more, and return in the new process. This one waits for it, says how it ended, and ends."""
    *standard, told = files
    if pid := os.fork():
        with socket.socket(fileno=told) as teller:
            for one in standard:
                os.close(one)
            teller.send(NUMBER.pack(pid))
            _, status = os.waitpid(pid, 0)
            teller.send(NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    for number, one in enumerate(standard):
        os.dup2(one, number)
    for one in files:
        os.close(one)
    for limit, values in wanted["limits"]:
        resource.setrlimit(limit, values)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv[1:] = wanted["arguments"]


if __name__ == "__main__":
    main()
