"""Tasks on an event loop that continue after their caller leaves."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from loraplex.errors import LoraplexError, NotReadyError

logger = logging.getLogger(__name__)


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
