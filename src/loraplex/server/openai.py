"""The HTTP routes of OpenAI's API: generated text with its log probabilities, whole or streamed."""

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Seq
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from loraplex.errors import LoraplexError
from loraplex.generation import GeneratedToken, GenerateRequest, GenerateResult
from loraplex.server import logs
from loraplex.server.answers import trace, unexpected, visible_json
from loraplex.server.json_body import JsonRoute
from loraplex.server.lifecycle import stopping
from loraplex.server.openai_answers import Answer, ChatCompletion, Completion, Format, usage_of, usage_so_far
from loraplex.server.openai_schemas import ChatBody, CompletionBody
from loraplex.server.routes import ERRORS, metrics_of, router_of, service_of, while_connected

logger = logging.getLogger(__name__)
router = APIRouter(tags=["openai"], route_class=JsonRoute)

# nginx would otherwise collect the events and send them late.
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENTS: dict[str, Any] = {"text/event-stream": {}}  # the content type of answers with `stream`


def resolve_model(request: Request, name: str, conversation_id: str | None) -> str | None:
    """Return the adapter that answers for `name`, or None for the bare base. An unknown name is returned unchanged; its
    request fails later with 404."""
    router = router_of(request)
    if name in service_of(request).base_names and not router.knows(name):
        return None
    return router.resolve(name, conversation_id)


@router.post("/v1/completions", response_model=Completion, responses={**ERRORS, 200: {"content": EVENTS}})
async def completions(request: Request, body: CompletionBody) -> Response:
    """Generate the text that follows a prompt. The prompt is taken verbatim."""
    return await openai_answer(request, body)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, 200: {"content": EVENTS}})
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Generate the answer to messages.

    The adapter's contract formats the messages. Without a contract, the base's chat template does.
    """
    return await openai_answer(request, body)


async def openai_answer(request: Request, body: CompletionBody | ChatBody) -> Response:
    """Answer as the path of the body does, whole or streamed."""
    form, adapter = body.format(), resolve_model(request, body.model, body.conversation_id)
    asked = body.to_requests(adapter)
    model = service_of(request).base_name if adapter is None else body.model  # the base is shown under its first name
    head = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    if not body.stream:
        results = await generated_texts(request, model, asked)
        usage = usage_of(results, body.num_choices)
        return Response(
            _json(form.answer(results, **head, **_facts(results), usage=usage)), media_type="application/json"
        )
    events = _events(request, body, form, asked, head)
    await anext(events)  # an error up to here is answered with its own HTTP status
    return _EventStream(events)


async def generated_texts(
    request: Request,
    model: str,
    asked: Seq[GenerateRequest],
    on_token: Callable[[int, GeneratedToken, str], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
) -> list[GenerateResult]:
    """Generate all of `asked` concurrently, and count the outcome in the metrics. If one request fails, raises its
    error and cancels the others. A client that disconnects cancels all."""

    async def all_of_them() -> list[GenerateResult]:
        backend = service_of(request)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        backend.generate(one, *(call and partial(call, index) for call in (on_token, on_prompt)))
                    )
                    for index, one in enumerate(asked)
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    metrics = metrics_of(request)
    try:
        results = await while_connected(request, all_of_them())
    except LoraplexError as exc:
        metrics.observe_completion(model, asked[0].adapter, exc.code)
        raise
    for result in results:
        metrics.observe_completion(model, asked[0].adapter, "ok")
        metrics.observe_work(result.usage, result.timings)
    return results


async def _events(
    request: Request,
    body: CompletionBody | ChatBody,
    form: Format,
    asked: Seq[GenerateRequest],
    head: dict[str, Any],
) -> AsyncGenerator[bytes]:
    """Yield server-sent events. The first is empty and says that the answer has begun. An error before it is raised; a
    later error becomes the last event."""
    chunks: asyncio.Queue[Answer | None] = asyncio.Queue()
    num_prompt: dict[int, int] = {}  # tokens of each choice's prompt
    num_generated = Counter[int]()  # tokens of each choice so far

    def usage(index: int) -> dict[str, Any]:
        if body.counts_usage:
            return {"usage": usage_so_far(num_prompt[index], num_generated[index])}
        return {"usage": None} if body.includes_usage else {}

    def on_token(index: int, token: GeneratedToken, text: str) -> None:
        first = form.first(index, **head, **usage(index)) if not num_generated[index] else None
        num_generated[index] += 1
        for chunk in (first, form.chunk(index, token, text, **head, **usage(index))):
            if chunk is not None:
                chunks.put_nowait(chunk)

    def on_end(work: asyncio.Future[list[GenerateResult]]) -> None:
        work.cancelled() or work.exception()  # retrieved, so that asyncio does not warn of it
        chunks.put_nowait(None)

    work = asyncio.ensure_future(generated_texts(request, head["model"], asked, on_token, num_prompt.__setitem__))
    work.add_done_callback(on_end)
    has_begun = False
    try:
        chunk = await chunks.get()
        if chunk is None:
            work.result()
        has_begun = True
        yield b""
        while chunk is not None:
            yield _event(_json(chunk))
            chunk = await chunks.get()
        results = work.result()
        facts = _facts(results)
        for index, result in enumerate(results):
            yield _event(_json(form.last(index, result, **head, **facts, **usage(index))))
        if body.includes_usage:
            yield _event(_json(form.empty(**head, **facts, usage=usage_of(results, body.num_choices))))
        yield _event(b"[DONE]")
    except (Exception, asyncio.CancelledError) as exc:
        error = stopping() if isinstance(exc, asyncio.CancelledError) else exc  # the drain timeout is over
        if not has_begun:
            raise error from None
        yield _event(_error_event(request, error))
    finally:
        work.cancel()


def _error_event(request: Request, error: Exception) -> bytes:
    """Return `error` as the stream's last event, because an HTTP status was already sent. Counts and logs the error."""
    if not isinstance(error, LoraplexError):
        logger.error("unexpected error in a stream\n%s", trace(error))
        error = unexpected(error)
    logs.current().error = error.code
    metrics_of(request).fail(error.code)
    return json.dumps(visible_json(error)).encode()


def _facts(results: Seq[GenerateResult]) -> dict[str, Any]:
    """Return the fields of an answer that are known only at its end."""
    adapter = results[0].adapter
    warnings = list(dict.fromkeys(warning for result in results for warning in result.warnings))
    facts: dict[str, Any] = {} if adapter is None else {"system_fingerprint": adapter.version}
    return facts | ({"warnings": warnings} if warnings else {})


def _json(answer: Answer) -> bytes:
    return answer.model_dump_json(exclude_unset=True).encode()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class _EventStream(StreamingResponse):
    """A stream that can still send a last event after it was cancelled. Starlette's own response is cancelled together
    with the client's connection."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, headers=UNBUFFERED)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await self.stream_response(send)
