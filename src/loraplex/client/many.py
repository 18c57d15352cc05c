"""Many calls at once: order of results, limit of calls in flight, and progress bar. Knows no HTTP."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar, cast

from loraplex.errors import InvalidRequestError
from loraplex.types import Input

Conversation = Input | tuple[str, Input]  # an input, or a pair (conversation_id, input)
Item = TypeVar("Item")
Result = TypeVar("Result")


def id_and_input(conversation: Conversation) -> tuple[str | None, Input]:
    if isinstance(conversation, tuple) and len(conversation) == 2 and isinstance(conversation[0], str):
        return conversation[0], conversation[1]
    return None, cast(Input, conversation)


def check(conversations: object, concurrency: int) -> None:
    if isinstance(conversations, str):
        raise InvalidRequestError(
            "one text instead of several conversations", remedy="put the text into a list, or call `classify`"
        )
    if concurrency < 1:
        raise InvalidRequestError(f"concurrency is {concurrency}", remedy="give at least 1")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], concurrency: int) -> list[Result]:
    """Return `work` of each item, in order. `items` is read in this thread, and only as far as threads are free. An
    error of `items` or `work`, or Ctrl-C, ends this at once. The threads are daemons, because a thread that waits for a
    server cannot be interrupted."""
    given: SimpleQueue[tuple[int, Item] | None] = SimpleQueue()
    done: SimpleQueue[tuple[int, Result] | BaseException] = SimpleQueue()
    results: dict[int, Result] = {}
    num_given = num_threads = 0

    def run() -> None:
        while (one := given.get()) is not None:
            try:
                done.put((one[0], work(one[1])))
            except BaseException as exc:
                done.put(exc)

    def take() -> None:
        outcome = done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        results[outcome[0]] = outcome[1]

    try:
        for item in items:
            while num_given - len(results) == concurrency or not done.empty():
                take()
            if num_threads < concurrency:
                threading.Thread(target=run, name=f"loraplex-client-{num_threads}", daemon=True).start()
                num_threads += 1
            given.put((num_given, item))
            num_given += 1
        while len(results) < num_given:
            take()
    finally:
        for _ in range(num_threads):
            given.put(None)
    return [results[index] for index in range(num_given)]


async def in_tasks(work: Callable[[Item], Awaitable[Result]], items: Iterable[Item], concurrency: int) -> list[Result]:
    """Return `work` of each item, in order. `items` is read only as far as tasks are free. An error of `items` or
    `work`, or a cancellation, cancels all calls in flight."""
    numbered = enumerate(items)
    results: dict[int, Result] = {}

    async def run() -> None:
        for index, item in numbered:  # all tasks share one iterator
            results[index] = await work(item)

    tasks = [asyncio.create_task(run()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [results[index] for index in range(len(results))]


@contextmanager
def progress_bar(items: Iterable[object], is_shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each item. The bar is drawn on standard error if `is_shown`."""
    if not is_shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("classify", total=len(items) if isinstance(items, Sized) else None)
        yield lambda: progress.advance(task)
