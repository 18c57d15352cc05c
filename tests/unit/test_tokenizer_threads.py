"""Texts of seconds do not keep those of milliseconds waiting."""

import asyncio
import threading
import time

import pytest

from loraplex.errors import DeadlineExceededError, NotReadyError
from loraplex.text.threads import LONG_CHARS, TokenizerThreads


def test_short_texts_pass_long_ones_which_are_counted_until_they_are_done() -> None:
    async def run() -> None:
        threads, gate = TokenizerThreads(), threading.Event()
        long = [asyncio.create_task(threads.run(gate.wait, LONG_CHARS, None)) for _ in range(4)]
        await asyncio.sleep(0)
        assert await threads.run(lambda: "short", LONG_CHARS - 1, None) == "short"
        assert threads.num_long_chars == 4 * LONG_CHARS
        with pytest.raises(DeadlineExceededError):
            long[0].cancel()  # its client leaves, but its thread is still busy
            await threads.run(lambda: time.sleep(0.05), 1, time.monotonic() + 0.001)
        assert threads.num_long_chars == 4 * LONG_CHARS
        gate.set()
        assert await asyncio.gather(*long[1:]) == [True] * 3
        await asyncio.sleep(0.01)
        assert threads.num_long_chars == 0
        threads.close()
        with pytest.raises(NotReadyError):
            await threads.run(lambda: "late", 1, None)

    asyncio.run(run())
