"""What computes beside the engine leaves no threads behind, which would slow the engine's own."""

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import tiny
from loraplex import Loraplex
from loraplex.threads import BriefThreads


def in_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    return run


def alive(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


async def until_none(name: str) -> None:
    async with asyncio.timeout(5):
        while alive(name):
            await asyncio.sleep(0.001)


@in_loop
async def test_threads_end_when_nothing_is_left_to_do_and_come_again() -> None:
    threads = BriefThreads(2, "brief")
    for _ in range(3):
        assert await asyncio.gather(*(threads.run(pow, 2, n) for n in range(5))) == [1, 2, 4, 8, 16]
        await until_none("brief")


@in_loop
async def test_one_thread_does_one_thing_after_the_other_also_where_nobody_waits() -> None:
    threads, done = BriefThreads(1, "one"), list[str]()

    def work(name: str, seconds: float) -> None:
        done.append(f"{name} begins")
        time.sleep(seconds)
        done.append(f"{name} ends")

    first = threads.run(work, "first", 0.05)
    while not done:
        await asyncio.sleep(0.001)
    first.cancel()
    await threads.run(work, "second", 0.0)
    assert done == ["first begins", "first ends", "second begins", "second ends"]


@in_loop
async def test_what_was_cancelled_before_it_began_is_not_done() -> None:
    threads, go, done = BriefThreads(1, "cancelled"), threading.Event(), list[int]()
    first, second = threads.run(go.wait), threads.run(done.append, 2)
    second.cancel()
    go.set()
    await first
    await until_none("cancelled")
    assert not done


@in_loop
async def test_an_error_reaches_its_caller_and_no_other() -> None:
    threads = BriefThreads(1, "failing")
    results = await asyncio.gather(threads.run(int, "1"), threads.run(int, "x"), return_exceptions=True)
    assert results[0] == 1
    assert isinstance(results[1], ValueError)
    await until_none("failing")


@in_loop
async def test_close_waits_for_what_was_begun() -> None:
    threads, done = BriefThreads(1, "closed"), list[int]()
    threads.run(time.sleep, 0.02)
    last = threads.run(done.append, 1)
    await threads.close()
    assert done == [1]
    await last
    await threads.close()


def test_a_server_that_has_loaded_keeps_the_engines_threads_only(tmp_path: Path) -> None:
    with Loraplex.load(tiny.save_shared_bundle(tmp_path / "bundle"), dtype="float32") as loraplex:
        loraplex.load_adapter("again", tmp_path / "bundle" / "plain")
        loraplex.classify("Customer: hi", "again")
        names = ("loraplex-load", "loraplex-placer", "loraplex-reader")
        ends = time.monotonic() + 5
        while any(map(alive, names)) and time.monotonic() < ends:
            time.sleep(0.001)
        assert not any(map(alive, names))
        assert alive("loraplex-engine")
