"""The threads that render and tokenize prompts."""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

from loraplex.errors import DeadlineExceededError, NotReadyError

Result = TypeVar("Result")

LONG_CHARS = 1 << 16  # a text of this many characters counts as long


class TokenizerThreads:
    """Runs tokenization in threads. Long texts have a thread of their own, because a tokenizer takes seconds for a
    megabyte and short texts must not wait for it."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "loraplex-tokenizer")
        self._long = ThreadPoolExecutor(1, "loraplex-tokenizer-long")
        self._is_closed = False
        self.num_long_chars = 0  # of long texts that wait or run, including texts whose clients left

    async def run(self, work: Callable[[], Result], num_chars: int, deadline_s: float | None) -> Result:
        """Run `work` in a thread and return its result. deadline_s: on the clock of `time.monotonic`. Raises
        DeadlineExceededError at the deadline, and NotReadyError after `close`."""
        loop, context = asyncio.get_running_loop(), copy_context()  # log lines in the thread carry the request's id
        if self._is_closed:
            raise NotReadyError("the backend is not running", remedy="wait until /ready answers 200")
        if num_chars < LONG_CHARS:
            future = self._short.submit(context.run, work)
        else:

            def done(_: Future[Result]) -> None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._free, num_chars)

            future = self._long.submit(context.run, work)
            self.num_long_chars += num_chars  # after `submit`, which fails where no thread can start
            future.add_done_callback(done)
        try:
            async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise not_tokenized() from None

    def close(self) -> None:
        """Take no more work. Accepted work is finished, but this call does not wait for it."""
        self._is_closed = True
        for lane in (self._short, self._long):
            lane.shutdown(wait=False)

    def _free(self, num_chars: int) -> None:
        self.num_long_chars -= num_chars


def not_tokenized() -> DeadlineExceededError:
    return DeadlineExceededError("not tokenized before the deadline", remedy="allow more time or send less at once")
