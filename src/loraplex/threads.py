"""Threads that compute beside the engine, for the time that it takes."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


class BriefThreads:
    """A pool of threads that end when nothing is left to do. Each thread that computes by PyTorch on a CPU has OpenMP
    threads of its own, for as long as it lives. When these are more than the cores are, OpenMP's waiting threads go to
    sleep at once, and every parallel operation of the engine has to wake them: small ones took four times as long.
    All methods are called on one event loop's thread."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads, self._name = num_threads, name
        self._pool: ThreadPoolExecutor | None = None
        self._num_left = 0  # to do

    def run(self, work: Callable[..., Result], *args: object) -> "asyncio.Future[Result]":
        """What `work` returns. Once begun it is done, also where nobody waits for it any more."""
        loop = asyncio.get_running_loop()

        def done(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._done)

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, self._name)
        future = self._pool.submit(work, *args)
        self._num_left += 1
        future.add_done_callback(done)
        return asyncio.wrap_future(future)

    async def close(self) -> None:
        """Returns when all is done."""
        if self._pool is not None:
            await asyncio.to_thread(self._pool.shutdown)

    def _done(self) -> None:
        self._num_left -= 1
        if not self._num_left and self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None
