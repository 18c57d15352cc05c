"""A system's process: started with a log, watched, and ended with what it started."""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from loraplex.bench.system import SystemEnded
from loraplex.errors import shortened
from loraplex.executors.watcher import watch

Result = TypeVar("Result")

LONGEST_LINE = 2**28  # of a worker's answer
STOP_S = 30.0  # a process that has not stopped by then is killed
PROBE = """
import importlib.metadata, importlib.util, json
found = {}
for name in %r:
    if importlib.util.find_spec(name) is not None:
        for one in (name, name + "-cpu"):
            try:
                found[name] = importlib.metadata.version(one)
                break
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
print(json.dumps(found))
"""


def environment() -> dict[str, str]:
    """Return the environment of a system: ours, without settings of a Loraplex server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}


def probe(python: str, libraries: Sequence[str]) -> dict[str, str]:
    """Return the version of each of the libraries that an interpreter has. Imports none of them. Raises OSError where
    the interpreter cannot be run."""
    run = subprocess.run(
        [python, "-c", PROBE % (tuple(libraries),)], capture_output=True, text=True, check=False, env=environment()
    )
    if run.returncode:
        raise OSError(f"{python} ended with status {run.returncode}")
    found: dict[str, str] = json.loads(run.stdout)
    return found


class Process:
    """A child process whose lines are read, and whose errors go to a file. It has a session of its own, so that Ctrl-C
    does not reach it, and it is killed if this process is."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = command, log
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: subprocess.Popen[str] | None = None

    async def start(self) -> None:
        """Raises OSError where the program cannot be run."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                start_new_session=True,
                limit=LONGEST_LINE,
            )
        self._watcher = watch([self._process.pid])

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def line(self) -> str:
        """Return the next line of its standard output. Raises SystemEnded where there is none."""
        assert self._process is not None and self._process.stdout is not None, "the process was started"
        line = await self._process.stdout.readline()
        if not line:
            raise SystemEnded(await self._ending())
        return line.decode()

    async def send(self, line: str) -> None:
        """Write a line to its standard input. Raises SystemEnded where it reads no more."""
        assert self._process is not None and self._process.stdin is not None, "the process was started"
        try:
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            raise SystemEnded(await self._ending()) from None

    async def while_alive(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Return the coroutine's result. Raises SystemEnded, and cancels it, if the process ends before."""
        assert self._process is not None, "the process was started"
        task, ended = asyncio.ensure_future(coroutine), asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise SystemEnded(await self._ending())
            return task.result()
        finally:
            ended.cancel()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})

    async def _ending(self) -> str:
        """Return how the process ended: its own error if it told one, or else its status."""
        assert self._process is not None, "the process was started"
        status = await self._process.wait()
        return last_error(self._log) or f"it ended with status {status}; see {self._log}"

    async def close(self) -> None:
        """Stop the process: with SIGTERM, and after STOP_S with SIGKILL. Safe to call twice."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            if self._watcher.stdin is not None:
                with suppress(OSError):
                    self._watcher.stdin.close()
            self._watcher = None


def last_error(log: Path) -> str:
    """Return the error that a command of ours wrote last, with its remedy; empty where the log has none."""
    found = re.findall(r"^error (\S+: .*)\n(?:remedy: (.*))?", log.read_text(errors="replace"), re.MULTILINE)
    if not found:
        return ""
    error, remedy = found[-1]
    return shortened(error) + (f" ({shortened(remedy)})" if remedy else "")
