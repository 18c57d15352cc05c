"""Bodies of many records, as batch transform sends them: CSV and JSON lines. Each record is a request of its own."""

import asyncio
import csv
import io
import json
import logging
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.types import Message

from loraplex.errors import MAX_QUOTED, BadInputError, InvalidRequestError, LoraplexError, quoted
from loraplex.routing.batch import in_turns
from loraplex.server.answers import refusal, trace, unexpected, visible_json
from loraplex.server.json_body import JsonRoute, check_query, decoded, media_type, parse
from loraplex.server.routes import RECORD, metrics_of, while_connected

logger = logging.getLogger(__name__)

CSV = "text/csv"
JSON_LINES = ("application/jsonlines", "application/x-jsonlines", "application/jsonl", "application/x-ndjson")
MAX_RECORDS = 100_000  # SageMaker fills a body with as many lines as its size allows
HEADER = "inputs"  # the column that Hugging Face's containers want
Record = bytes | LoraplexError  # a body, or why there is none
csv.field_size_limit(2**31 - 1)  # the limit on bodies limits fields, too
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class RecordsRoute(JsonRoute):
    """A route that takes a JSON body, or many of them as JSON lines, or many texts as CSV."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_records(request: Request) -> Response:
            kind = media_type(request.headers.get("Content-Type", ""))
            if kind == CSV:
                check_query(request)
                return await _answer_csv(request, handle)
            if kind in JSON_LINES:
                check_query(request)
                lines = [line for line in (await request.body()).splitlines() if line.strip()]
                answers = await _answer_all(request, handle, lines)
                return Response(b"".join(answer + b"\n" for answer in answers), media_type=kind)
            return await handle(request)

        return handle_records


async def _answer_all(request: Request, handle: Handler, bodies: Seq[Record]) -> list[bytes]:
    """Return the answer to each JSON body, in order. A body that cannot be answered gets its error; if none can, the
    first error is raised."""
    if not 0 < len(bodies) <= MAX_RECORDS:
        found = f"more than {MAX_RECORDS}" if bodies else "0"
        raise BadInputError(f"the body has {found} records", remedy=f"send 1 to {MAX_RECORDS}, a line each")
    outcomes = await while_connected(
        request, in_turns(lambda record: _answer(request, handle, *record), list(enumerate(bodies)))
    )
    if all(isinstance(outcome, LoraplexError) for outcome in outcomes):
        raise next(outcome for outcome in outcomes if isinstance(outcome, LoraplexError))
    return [_error(request, outcome) if isinstance(outcome, LoraplexError) else outcome for outcome in outcomes]


async def _answer(request: Request, handle: Handler, index: int, body: Record) -> bytes:
    if isinstance(body, LoraplexError):
        raise body
    given = parse(body)  # JSON has many spellings of "stream"
    if isinstance(given, dict) and given.get("stream"):
        raise InvalidRequestError("stream: one record of many is answered whole", remedy="leave `stream` out")
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # whether the client has left is watched for all records together
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    scope = {
        **request.scope,
        "headers": [*headers, (b"content-type", b"application/json")],
        "state": {**request.scope.get("state", {}), RECORD: index},
    }
    alone = Request(scope, receive)
    try:
        return bytes((await handle(alone)).body)
    except LoraplexError:
        raise
    except RequestValidationError as exc:
        raise refusal(request, exc) from None
    except Exception as exc:
        logger.error("unexpected error in a record\n%s", trace(exc))
        raise unexpected(exc) from None


def _error(request: Request, error: LoraplexError) -> bytes:
    metrics_of(request).fail(error.code)
    return json.dumps(visible_json(error)).encode()


async def _answer_csv(request: Request, handle: Handler) -> Response:
    """Answer one text a line, as Hugging Face's body would be: in JSON, or in CSV or JSON lines if the client accepts
    only these."""
    rows = _rows(await request.body())
    has_header = bool(rows) and rows[0] == [HEADER]
    bodies = [_body(row) for row in rows[has_header:]]
    answers = [json.loads(answer) for answer in await _answer_all(request, handle, bodies)]
    answers = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    accepted = media_type(request.headers.get("Accept", ""))
    if accepted == CSV:
        return Response(_table(answers, has_header), media_type=CSV)
    if accepted in JSON_LINES:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        return Response("".join(lines).encode(errors="backslashreplace"), media_type=accepted)
    return Response(json.dumps(answers), media_type="application/json")


def _rows(body: bytes) -> list[list[str]]:
    """Return the lines that are not empty. Of too many, no more than show that they are."""
    reader = csv.reader(io.StringIO(decoded(body), newline=""), strict=True)
    try:
        return list(islice(filter(None, reader), MAX_RECORDS + 2))  # one may be the header
    except csv.Error as exc:
        raise BadInputError(
            f"the body is not CSV: line {reader.line_num}: {exc}",
            remedy="put a text with commas, quotes or line ends in double quotes, and double the quotes in it",
        ) from None


def _body(row: list[str]) -> Record:
    if len(row) > 1:
        return InvalidRequestError(
            f"the line has {len(row)} fields: {quoted(row[:MAX_QUOTED])}",
            remedy="send one text a line, and put a text with commas in double quotes",
        )
    return json.dumps({"inputs": row[0], "parameters": {}}).encode()


def _table(answers: list[Any], has_header: bool) -> bytes:
    """Return the answers as CSV. The last column is for errors."""
    columns = ["generated_text"] if any("generated_text" in answer for answer in answers) else ["label", "score"]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    if has_header:
        writer.writerow([*columns, "error"])
    for answer in answers:
        error = answer.get("error", {})
        said = f"{error['code']}: {error['message']}" if error else ""
        writer.writerow([*(answer.get(column, "") for column in columns), said])
    return written.getvalue().encode(errors="backslashreplace")
