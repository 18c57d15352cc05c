"""Many requests in one call."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TypeVar

from loraplex.errors import DeadlineExceededError, LoraplexError, QueueFullError
from loraplex.routing.router import Router
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult, ErrorInfo, Failure, Timings, Usage

Asked = TypeVar("Asked")
Result = TypeVar("Result")
MAX_CONCURRENT = 32  # requests of one call, so that a long call leaves room for others


async def classify_batch(router: Router, requests: Seq[ClassifyRequest]) -> BatchResult:
    """Classify each of `requests`, and return an answer or a failure for each, in order. A request's deadline counts
    from this call. If all requests fail, raises the first one's error."""
    started = time.monotonic()

    async def ask(request: ClassifyRequest) -> ClassifyResult:
        if request.deadline_ms is not None:
            left_ms = request.deadline_ms - (time.monotonic() - started) * 1000
            if left_ms <= 0:
                raise DeadlineExceededError(
                    "not computed before the deadline", remedy="allow more time or send less at once"
                )
            request = replace(request, deadline_ms=left_ms)
        return await router.classify(request)

    outcomes = await in_turns(ask, requests)
    answers = [outcome for outcome in outcomes if isinstance(outcome, ClassifyResult)]
    if not answers:
        raise next(outcome for outcome in outcomes if isinstance(outcome, LoraplexError))
    return BatchResult(
        results=tuple(
            outcome if isinstance(outcome, ClassifyResult) else Failure(error=ErrorInfo.of(outcome))
            for outcome in outcomes
        ),
        usage=Usage(
            prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
            computed_tokens=sum(answer.usage.computed_tokens for answer in answers),
            cached_tokens=sum(answer.usage.cached_tokens for answer in answers),
            skipped_tokens=sum(answer.usage.skipped_tokens or 0 for answer in answers) or None,
            question_tokens=sum(answer.usage.question_tokens or 0 for answer in answers) or None,
        ),
        timings=Timings(
            tokenize_ms=max(answer.timings.tokenize_ms for answer in answers),
            queue_ms=max(answer.timings.queue_ms for answer in answers),
            compute_ms=max(answer.timings.compute_ms for answer in answers),
            total_ms=(time.monotonic() - started) * 1000,
        ),
    )


async def in_turns(ask: Callable[[Asked], Awaitable[Result]], all_asked: Seq[Asked]) -> list[Result | LoraplexError]:
    """Return what `ask` makes of each of `all_asked`, or the error that it raises, in order. Only some run at once. One
    that is refused because the others fill the queue is asked again."""
    num_running, ended = 0, asyncio.Event()
    outcomes: dict[int, Result | LoraplexError] = {}

    async def ask_one(asked: Asked) -> Result | LoraplexError:
        nonlocal num_running
        while True:
            num_running += 1
            try:
                outcome: Result | LoraplexError = await ask(asked)
            except LoraplexError as exc:
                outcome = exc
            finally:
                num_running -= 1
            if not isinstance(outcome, QueueFullError) or not num_running:
                ended.set()
                return outcome
            ended.clear()
            await ended.wait()

    waiting = iter(enumerate(all_asked))

    async def take_turns() -> None:
        for index, asked in waiting:  # all tasks take from one iterator
            outcomes[index] = await ask_one(asked)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(MAX_CONCURRENT, len(all_asked))):
            group.create_task(take_turns())
    return [outcomes[index] for index in range(len(outcomes))]
