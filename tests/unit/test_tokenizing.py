"""Texts of seconds do not keep those of milliseconds waiting."""

import asyncio
import threading
import time

import pytest

from loraplex.backends.tokenizing import LONG_CHARS, MAX_LONG_CHARS, TokenizerThreads
from loraplex.errors import DeadlineExceededError, NotReadyError, QueueFullError


def test_short_texts_pass_long_ones_of_which_few_may_wait() -> None:
    async def run() -> None:
        threads, gate = TokenizerThreads(), threading.Event()
        long = [asyncio.create_task(threads.run(gate.wait, MAX_LONG_CHARS // 4, None)) for _ in range(4)]
        await asyncio.sleep(0)
        assert await threads.run(lambda: "short", LONG_CHARS - 1, None) == "short"
        with pytest.raises(QueueFullError):
            await threads.run(gate.wait, LONG_CHARS, None)
        with pytest.raises(DeadlineExceededError):
            long[0].cancel()  # its client leaves, but its thread is still busy
            await threads.run(lambda: time.sleep(0.05), 1, time.monotonic() + 0.001)
        with pytest.raises(QueueFullError):
            await threads.run(gate.wait, MAX_LONG_CHARS // 2, None)
        gate.set()
        assert await asyncio.gather(*long[1:]) == [True] * 3
        await asyncio.sleep(0.01)
        assert await threads.run(lambda: "long", 2 * MAX_LONG_CHARS, None) == "long", "alone it may be any length"
        threads.close()
        with pytest.raises(NotReadyError):
            await threads.run(lambda: "late", 1, None)

    asyncio.run(run())
