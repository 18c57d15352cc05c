"""Classifies many conversations in one call."""

import asyncio
import time
from collections.abc import Sequence as Seq
from dataclasses import replace

from loraplex.errors import DeadlineExceededError, LoraplexError, QueueFullError
from loraplex.routing.router import Router
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult, ErrorInfo, Failure, Timings, Usage

MAX_CONCURRENT = 32  # requests of one call, so that a long call leaves room for others


async def classify_batch(router: Router, requests: Seq[ClassifyRequest]) -> BatchResult:
    """Classify each of `requests`, and return an answer or a failure for each, in order. A request's deadline counts
    from this call. If all requests fail, raises the first one's error."""
    started = time.monotonic()
    turns = asyncio.Semaphore(MAX_CONCURRENT)
    num_running, ended = 0, asyncio.Event()

    def in_time(request: ClassifyRequest) -> ClassifyRequest:
        if request.deadline_ms is None:
            return request
        left_ms = request.deadline_ms - (time.monotonic() - started) * 1000
        if left_ms <= 0:
            raise DeadlineExceededError(
                "not computed before the deadline", remedy="allow more time or send less at once"
            )
        return replace(request, deadline_ms=left_ms)

    async def ask(request: ClassifyRequest) -> ClassifyResult | LoraplexError:
        nonlocal num_running
        async with turns:
            while True:
                num_running += 1
                try:
                    outcome: ClassifyResult | LoraplexError = await router.classify(in_time(request))
                except LoraplexError as exc:
                    outcome = exc
                finally:
                    num_running -= 1
                if not isinstance(outcome, QueueFullError) or not num_running:
                    ended.set()
                    return outcome
                ended.clear()  # this call's own requests fill the queue: retry when one of them ends
                await ended.wait()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(request)) for request in requests]
    outcomes = [task.result() for task in tasks]
    answers = [outcome for outcome in outcomes if isinstance(outcome, ClassifyResult)]
    if not answers:
        for outcome in outcomes:
            assert isinstance(outcome, LoraplexError), "every outcome is an answer or an error"
            raise outcome
    return BatchResult(
        results=tuple(
            outcome if isinstance(outcome, ClassifyResult) else Failure(error=ErrorInfo.of(outcome))
            for outcome in outcomes
        ),
        usage=Usage(
            prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
            computed_tokens=sum(answer.usage.computed_tokens for answer in answers),
            cached_tokens=sum(answer.usage.cached_tokens for answer in answers),
        ),
        timings=Timings(
            tokenize_ms=max(answer.timings.tokenize_ms for answer in answers),
            queue_ms=max(answer.timings.queue_ms for answer in answers),
            compute_ms=max(answer.timings.compute_ms for answer in answers),
            total_ms=(time.monotonic() - started) * 1000,
        ),
    )
