"""The threads that read and place adapters. Other threads tokenize requests, so that neither delays the other."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class AdapterThreads:
    """Reader threads, and one placer thread, which works in order."""

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
