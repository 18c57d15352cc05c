"""Many calls at once: their order, how many are in flight, and a progress bar. Knows no HTTP."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar, cast

from loraplex.errors import InvalidRequestError
from loraplex.types import Input

Conversation = Input | tuple[str, Input]  # the input, or its conversation_id and it
Item = TypeVar("Item")
Result = TypeVar("Result")


def id_and_input(conversation: Conversation) -> tuple[str | None, Input]:
    if isinstance(conversation, tuple) and len(conversation) == 2 and isinstance(conversation[0], str):
        return conversation[0], conversation[1]
    return None, cast(Input, conversation)


def check(conversations: object, concurrency: int) -> None:
    if isinstance(conversations, str):
        raise InvalidRequestError("one text, not conversations", remedy="put it into a list, or call `classify`")
    if concurrency < 1:
        raise InvalidRequestError(f"a concurrency of {concurrency}", remedy="give at least 1")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], concurrency: int) -> list[Result]:
    """`work` of each, in order. `items` is read in this thread, and no further than threads are free. What it, `work`
    or the user's Ctrl-C raises ends this at once: the threads are daemons, because nothing can interrupt one that waits
    for a server."""
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
    """`work` of each, in order. `items` is read no further than tasks are free. What it or `work` raises, or that this
    is cancelled, cancels all that is in flight."""
    numbered = enumerate(items)
    results: dict[int, Result] = {}

    async def run() -> None:
        for index, item in numbered:  # the tasks share it
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
    """Gives what is to be called once an item. It is drawn on standard error."""
    if not is_shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("classify", total=len(items) if isinstance(items, Sized) else None)
        yield lambda: progress.advance(task)
