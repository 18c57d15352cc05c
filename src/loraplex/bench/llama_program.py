"""Runs llama.cpp's server as a process of ours."""

import asyncio
import socket
from asyncio.subprocess import Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from loraplex.bench.http import Http
from loraplex.errors import ConfigurationError

START_S = 600.0


class LlamaProgram:
    """The program and a folder of its own, for its log and its adapters. It ends, and the folder goes, with `close`."""

    def __init__(self, server: Path, model: Path) -> None:
        """model: a GGUF file. Raises ConfigurationError where one of them is no file."""
        for option, file in (("--llamacpp-server", server), ("--llamacpp-model", model)):
            if not file.is_file():
                raise ConfigurationError(f"{option} {file}", "is no file", remedy="correct the path")
        self._server, self._model = server, model
        self._folder = TemporaryDirectory(prefix="loraplex-llamacpp-")
        self._process: Process | None = None

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def ended(self) -> str | None:
        """How the program ended; None while it runs."""
        if self._process is None or self._process.returncode is None:
            return None
        return f"llama-server ended with {self._process.returncode}: {self._log()}"

    async def start(self, arguments: Sequence[str]) -> str:
        """Start the program, and return its URL when it answers. Raises ConfigurationError where it does not start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [str(self._server), "--model", str(self._model), "--host", "127.0.0.1", "--port", port, *arguments]
        with (self.folder / "log").open("wb") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
            except OSError as exc:
                raise self._does_not_start(str(exc.strerror)) from None
        url = f"http://127.0.0.1:{port}"
        http, loop = Http(url), asyncio.get_running_loop()
        give_up_s = loop.time() + START_S
        try:
            while loop.time() < give_up_s and self._process.returncode is None:
                with suppress(OSError, EOFError):
                    if (await http.request("GET", "/health"))[0] == 200:
                        return url
                await asyncio.sleep(0.1)
        finally:
            http.close()
        raise self._does_not_start(self._log())

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._folder.cleanup()

    def _does_not_start(self, why: str) -> ConfigurationError:
        return ConfigurationError(
            f"--llamacpp-server {self._server}",
            f"does not start: {why}",
            remedy="run it by hand with this model until it starts, see docs/bench.md",
        )

    def _log(self) -> str:
        """Return the end of what the program printed."""
        return " ".join((self.folder / "log").read_text(errors="replace").split()[-60:])
