"""Tasks on an event loop that continue after their caller leaves, and the threads that read and place adapters."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from loraplex.errors import LoraplexError, NotReadyError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Tasks:
    """Tasks of one event loop; `close` ends all of them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_closed = False

    def check_open(self) -> None:
        """Raise NotReadyError once closed."""
        if self.is_closed:
            raise closed()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, task: "asyncio.Task[None]") -> None:
        """Wait for a task, and raise what it raised. The task continues where the caller is cancelled.

        Raises NotReadyError where `close` ended the task."""
        await asyncio.wait([task])
        if task.cancelled():
            raise closed()
        task.result()

    async def close(self) -> None:
        """Cancel all tasks and wait for their end. Safe to call twice."""
        self.is_closed = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), LoraplexError):
            logger.error("an adapter's task failed", exc_info=task.exception())


def closed() -> NotReadyError:
    return NotReadyError("the server is stopping", remedy="send it to another server, or later")


class AdapterThreads:
    """Reader threads, and one placer thread, which works in order. Other threads tokenize requests, so that neither
    delays the other."""

    def __init__(self, start_thread: Callable[[], object] = lambda: None) -> None:
        """start_thread: called first on each thread."""
        self._readers = ThreadPoolExecutor(4, "loraplex-reader", start_thread)
        self._placer = ThreadPoolExecutor(1, "loraplex-placer", start_thread)

    async def read(self, work: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *args)

    async def place(self, work: Callable[..., None], *args: int) -> None:
        """Run `work` on the placer. The work is done even where the caller is cancelled."""
        done = asyncio.get_running_loop().run_in_executor(self._placer, work, *args)
        done.add_done_callback(lambda _: done.cancelled() or done.exception())  # the caller may have left
        await asyncio.shield(done)

    async def close(self) -> None:
        """Wait until the placer has ended. Readers are not waited for, because one may hang."""
        await asyncio.to_thread(self._placer.shutdown)
        self._readers.shutdown(wait=False)
