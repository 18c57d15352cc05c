"""Servers to be measured, each a process of its own on a free port."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from loraplex.bench.process import Process

START_S, POLL_S = 600.0, 0.2
TO_LOG = ("sh", "-c", 'exec "$@" >&2', "sh")  # nobody reads a server's standard output, which would fill up


@contextmanager
def serving(command: Callable[[str], Sequence[str]], log: Path, ready: str = "/health") -> Iterator[str]:
    """The URL of a server, once it answers GET `ready` with 200.

    command:  its command line, given a port.
    log:      where its output goes.
    Raises SystemEnded if it ends before, and TimeoutError if it does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url, process = f"http://127.0.0.1:{port}", Process([*TO_LOG, *command(port)], log)

    async def wait() -> None:
        give_up = time.monotonic() + START_S
        async with httpx.AsyncClient(base_url=url) as http:
            while time.monotonic() < give_up:
                try:
                    if (await http.get(ready)).status_code == httpx.codes.OK:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(POLL_S)
        raise TimeoutError(f"{command(port)[0]} does not answer; see {log}")

    async def start() -> None:
        await process.start()
        await process.while_alive(wait())

    with asyncio.Runner() as loop:
        try:
            loop.run(start())
            yield url
        finally:
            loop.run(process.close())
