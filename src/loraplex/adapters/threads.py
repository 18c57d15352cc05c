"""The threads that read adapters and place them. They are their own: requests are tokenized in others."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class AdapterThreads:
    """A few readers and one placer, which works in order."""

    def __init__(self, start_thread: Callable[[], object] = lambda: None) -> None:
        """start_thread: called first on each of the threads."""
        self._readers = ThreadPoolExecutor(4, "loraplex-reader", start_thread)
        self._placer = ThreadPoolExecutor(1, "loraplex-placer", start_thread)

    async def read(self, work: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *args)

    async def place(self, work: Callable[..., None], *args: int) -> None:
        """Once begun the work is done, also where the caller is cancelled."""
        done = asyncio.get_running_loop().run_in_executor(self._placer, work, *args)
        done.add_done_callback(lambda _: done.cancelled() or done.exception())  # nobody may be left to retrieve it
        await asyncio.shield(done)

    async def close(self) -> None:
        """Returns when the placer has ended. A reader that hangs is left behind."""
        await asyncio.to_thread(self._placer.shutdown)
        self._readers.shutdown(wait=False)
