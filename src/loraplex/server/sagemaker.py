"""SageMaker's HTTP routes for containers, with the bodies that people send there. Also AWS's runtime API, for a local
boto3 client."""

import json
import math
import re
import struct
import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from zlib import crc32

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import InvalidRequestError
from loraplex.generation import GenerateRequest
from loraplex.routing.questions import EVERYTHING
from loraplex.server.classification import Classification, ClassificationBody, classification, classify_kind
from loraplex.server.decisions import DecisionsBody, DecisionsResult, decisions_answer
from loraplex.server.huggingface import GeneratedText, HuggingFaceBody, ScoredLabel, huggingface_answer, to_json
from loraplex.server.openai import EVENTS, generated_texts, openai_answer
from loraplex.server.openai_answers import ChatCompletion, Completion
from loraplex.server.openai_schemas import ChatBody, CompletionBody
from loraplex.server.proxies import path_of
from loraplex.server.records import RecordsRoute
from loraplex.server.routes import ERRORS, SESSION_ID, answer, answered, router_of, service_of
from loraplex.server.schemas import (
    ClassifyBody,
    ErrorBody,
    FeedbackBody,
    FeedbackResult,
    InvocationBody,
    InvocationResult,
)
from loraplex.server.systemone import SystemOneBody, SystemOneResult, systemone_answer
from loraplex.server.traffic import feedback
from loraplex.server.typed_errors import typed_kind
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult, classifier_names

router = APIRouter(tags=["sagemaker"], route_class=RecordsRoute)

ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
COMPONENT_HEADER = "X-Amzn-SageMaker-Inference-Component"
MODEL_HEADER = "X-Amzn-SageMaker-Target-Model"  # of multi-model endpoints, whose models are archives
ARCHIVE = ".tar.gz"
# Which part of an endpoint answers. SageMaker itself follows these before it asks a container; there is no part here.
PART_HEADERS = ("X-Amzn-SageMaker-Target-Variant", "X-Amzn-SageMaker-Target-Container-Hostname")
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION_HEADER = "X-Amzn-SageMaker-New-Session-Id"
NEW_SESSION = "NEW_SESSION"  # asks for a session
SESSION_ENDS = timedelta(days=1)  # AWS routes no request to a session after its end; nothing here ends with it
MOST_TRANSFORM_MB = 2  # of a batch transform's payload: some thousand texts, so that an answer takes minutes at most
IS_RUNTIME_API = "loraplex.runtime_api"  # key of a scope's state
UNNAMED = "\0"  # the model of an OpenAI body that names none
ENDPOINT = re.compile(r"/endpoints/[^/]+/invocations(-response-stream)?")


def _body_kind(body: Any) -> str:
    """Return whose body it is, by the fields that only one of them has."""
    given = body if isinstance(body, dict) else {}
    if (typed := typed_kind(given)) is not None:
        return typed
    if "input_text" in given:
        return "article"
    if "label" in given and given.keys() & {"verdict_id", "request_id"}:
        return "feedback"
    if "messages" in given and "input" not in given:
        return "chat"
    if "prompt" in given:
        return "completion"
    if "parameters" in given or (isinstance(given.get("inputs"), str) and "classifiers" not in given):
        return "hugging face"
    if given.keys() & {"input", "inputs"}:
        return classify_kind(given)
    return "article"


def _named_later(body: Any) -> Any:
    return {"model": UNNAMED, **body} if isinstance(body, dict) else body


_NamedLater = BeforeValidator(_named_later)  # a header may name the model
SageMakerBody = Annotated[
    Annotated[InvocationBody, Tag("article")]
    | Annotated[ClassifyBody, Tag("native")]
    | Annotated[ClassificationBody, Tag("vllm")]
    | Annotated[HuggingFaceBody, Tag("hugging face")]
    | Annotated[FeedbackBody, Tag("feedback")]
    | Annotated[DecisionsBody, _NamedLater, Tag("decisions")]
    | Annotated[SystemOneBody, Tag("systemone")]
    | Annotated[ChatBody, _NamedLater, Tag("chat")]
    | Annotated[CompletionBody, _NamedLater, Tag("completion")],
    Discriminator(_body_kind),
]
SageMakerAnswer = (
    list[InvocationResult]
    | ClassifyResult
    | BatchResult
    | Classification
    | list[ScoredLabel | GeneratedText | ErrorBody | list[ScoredLabel | GeneratedText]]
    | ChatCompletion
    | Completion
    | FeedbackResult
    | DecisionsResult
    | SystemOneResult
)


@router.post(
    "/invocations",
    response_model=SageMakerAnswer,
    response_model_exclude_none=True,
    responses={**ERRORS, 200: {"content": EVENTS}},
)
async def invocations(
    request: Request,
    body: SageMakerBody,
    adapter: Annotated[str | None, Header(alias=ADAPTER_HEADER)] = None,
    model: Annotated[str | None, Header(alias=MODEL_HEADER)] = None,
) -> Response | list[InvocationResult] | FeedbackResult:
    """Answer `{"input_text", "adapter_name"?}` with `[{"confidence_score", "predicted_text"}]`.

    The bodies of /v1/classify, /v1/decisions, /v1/systemone, /v1/chat/completions and /v1/completions are answered as
    on those paths, and `{"inputs", "parameters"}` as by Hugging Face's containers. The body of /v1/feedback is taken,
    too, because an endpoint has no other path. `text/csv` has one text a line, `application/jsonlines` one body a line.
    The header of the adapter, or of the target model (with or without `.tar.gz`), names the adapter if the body names
    none. A target model beside another name is refused.
    """
    _check_parts(request)
    if isinstance(body, FeedbackBody):
        return await feedback(request, body)
    named = adapter if (given := _named(body)) is None or _is_alias(request, body, given) else given
    if model is not None:
        target = model.removesuffix(ARCHIVE)
        if named not in (None, target, (target,)):
            raise InvalidRequestError(
                f"{MODEL_HEADER} is {model!r}, and the request names {named!r} too", remedy="name one of them"
            )
        named = target
    if isinstance(body, ClassifyBody):
        return await answer(request, body if named is None else body.model_copy(update={"classifiers": named}))
    assert named is None or isinstance(named, str)
    if named in service_of(request).base_names and not router_of(request).knows(named):
        named = None  # the base
    if isinstance(body, InvocationBody):
        return [await _invoke(request, body, named)]
    if isinstance(body, DecisionsBody):
        return await decisions_answer(request, body, named)
    if isinstance(body, SystemOneBody):
        return await systemone_answer(request, body, named)
    if isinstance(body, HuggingFaceBody):
        answers = await huggingface_answer(request, body, named)
        return Response(to_json(answers), media_type="application/json")
    if isinstance(body, ClassificationBody):
        return await classification(request, body)
    name = service_of(request).base_name if named is None else named
    return await openai_answer(request, body.model_copy(update={"model": name}))


class ExecutionParameters(BaseModel):
    """What batch transform asks a container, in SageMaker's words."""

    max_concurrent_transforms: Literal[4] = Field(4, alias="MaxConcurrentTransforms")
    batch_strategy: Literal["MULTI_RECORD"] = Field("MULTI_RECORD", alias="BatchStrategy")
    max_payload_in_mb: int = Field(alias="MaxPayloadInMB")


@router.get("/execution-parameters")
async def execution_parameters(request: Request) -> ExecutionParameters:
    """Tell batch transform how to send its records: several at once, and as many lines in a body as fit."""
    most_mb = request.app.state.config.max_body_bytes // 2**20
    return ExecutionParameters(MaxPayloadInMB=min(max(1, most_mb), MOST_TRANSFORM_MB))


def _named(body: Any) -> Any:
    """Return the name or names of adapters in the body, or None."""
    if isinstance(body, ClassifyBody):
        return classifier_names(body.classifiers) if "classifiers" in body.model_fields_set else None
    if isinstance(body, InvocationBody):
        return body.adapter_name
    if isinstance(body, HuggingFaceBody):
        return None if body.parameters is None else body.parameters.adapter_id
    return None if body.model in (UNNAMED, None) else body.model


def _is_alias(request: Request, body: Any, name: Any) -> bool:
    """Return whether a typed body's model leaves the choice of a classifier open."""
    is_open = name == EVERYTHING or name in request.app.state.config.decisions_alias
    return isinstance(body, DecisionsBody | SystemOneBody) and is_open and not router_of(request).knows(name)


def _check_parts(request: Request) -> None:
    """Raise InvalidRequestError where a request to the runtime API asks for one part of the endpoint."""
    for header in PART_HEADERS if IS_RUNTIME_API in request.scope.get("state", ()) else ():
        if header in request.headers:
            raise InvalidRequestError(
                f"{header} is {request.headers[header]!r}, and this server is a single container without variants",
                remedy="leave it out; to split traffic, make a route: PUT /v1/routes/{name}",
            )


async def _invoke(request: Request, body: InvocationBody, adapter: str | None) -> InvocationResult:
    """Answer through the adapter's contract. A raw text, an adapter without a contract and the bare base take the text
    verbatim."""
    if adapter is not None and not body.raw:
        result = await answered(request, ClassifyRequest(input=body.input_text, classifiers=(adapter,), cascade=False))
        assert isinstance(result, ClassifyResult)
        verdict = result.verdicts[0]
        assert verdict.label is not None and verdict.confidence is not None, "a lone verdict's error is raised"
        return InvocationResult(confidence_score=verdict.confidence, predicted_text=verdict.label)
    answers = None if adapter is None else router_of(request).resolve(adapter)
    [generated] = await generated_texts(
        request, adapter or service_of(request).base_name, [GenerateRequest(prompt=body.input_text, adapter=answers)]
    )
    [token] = generated.tokens
    return InvocationResult(confidence_score=math.exp(token.log_prob), predicted_text=token.text)


class JsonByDefault:
    """Middleware: reads a body of unspecified type as JSON, because boto3's runtime client names none by default."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope) == "/invocations":
            scope = {**scope, "headers": list(scope["headers"])}
            headers = MutableHeaders(scope=scope)
            if headers.get("Content-Type") == "application/octet-stream":
                headers["Content-Type"] = "application/json"
        await self.app(scope, receive, send)


class Sessions:
    """Middleware: makes the session of a request to /invocations the id of its conversation, and new sessions."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = scope["type"] == "http" and path_of(scope) == "/invocations"
        session = Headers(scope=scope).get(SESSION_HEADER) if is_asked else None
        if session is None:
            return await self.app(scope, receive, send)
        is_new = session == NEW_SESSION
        session = uuid.uuid4().hex if is_new else session

        async def send_new(message: Message) -> None:
            if is_new and message["type"] == "http.response.start" and message["status"] < 400:
                ends = datetime.now(UTC) + SESSION_ENDS
                headers = MutableHeaders(raw=list(message["headers"]))
                headers[NEW_SESSION_HEADER] = f"{session}; Expires={ends:%Y-%m-%dT%H:%M:%SZ}"
                message = {**message, "headers": headers.raw}
            await send(message)

        await self.app({**scope, "state": {**scope.get("state", {}), SESSION_ID: session}}, receive, send_new)


class RuntimeApi:
    """Middleware: answers `POST /endpoints/{name}/invocations[-response-stream]` as AWS does, for boto3's
    `sagemaker-runtime` client with `endpoint_url`.

    Requests are passed on as /invocations, and errors take AWS's shape. Any endpoint name is accepted. The name of an
    inference component is taken as the adapter's name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        found = ENDPOINT.fullmatch(path_of(scope)) if is_post else None
        if found is None:
            return await self.app(scope, receive, send)
        path = f"{scope.get('root_path', '')}/invocations"
        scope = {**scope, "path": path, "raw_path": path.encode(), "headers": list(scope["headers"])}
        scope["state"] = {**scope.get("state", {}), IS_RUNTIME_API: True}
        headers = Headers(scope=scope)
        if COMPONENT_HEADER in headers and ADAPTER_HEADER not in headers:
            MutableHeaders(scope=scope)[ADAPTER_HEADER] = headers[COMPONENT_HEADER]
        start: Message = {}
        content, is_streamed = b"", False

        async def translated(message: Message) -> None:
            nonlocal start, content, is_streamed
            if message["type"] == "http.response.start":
                start = message
                return
            body, goes_on = message.get("body", b""), message.get("more_body", False)
            if is_streamed or (found[1] and goes_on and start["status"] < 400):  # each part is an event
                if not is_streamed:
                    await send(_event_stream(start))
                    is_streamed = True
                event = _event(body) if body else b""
                return await send({"type": "http.response.body", "body": event, "more_body": goes_on})
            content += body
            if not goes_on:
                await _answer(start, content, bool(found[1]), send)

        await self.app(scope, receive, translated)


def _event_stream(start: Message) -> Message:
    """Return the start of an answer whose body is AWS's event stream."""
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["X-Amzn-SageMaker-Content-Type"] = headers["Content-Type"]
    headers["Content-Type"] = "application/vnd.amazon.eventstream"
    return {**start, "headers": headers.raw}


async def _answer(start: Message, content: bytes, is_stream: bool, send: Send) -> None:
    """Send the container's answer in AWS's form."""
    status = start["status"]
    if status < 400 and is_stream:
        start, content = _event_stream(start), _event(content)
    headers = MutableHeaders(raw=list(start["headers"]))
    if status >= 400:
        status, kind, content = _error(status, content)
        headers["X-Amzn-ErrorType"] = kind
    headers["Content-Length"] = str(len(content))
    await send({**start, "status": status, "headers": headers.raw})
    await send({"type": "http.response.body", "body": content})


def _error(status: int, content: bytes) -> tuple[int, str, bytes]:
    text = content.decode()
    if status in (401, 403):
        return 403, "AccessDeniedException", json.dumps({"Message": text}).encode()
    if status == 503:
        return 503, "ServiceUnavailable", json.dumps({"Message": text}).encode()
    who = "client" if status < 500 else "server"
    error = {
        "Message": f'Received {who} error ({status}) from primary with message "{text}".',
        "OriginalStatusCode": status,
        "OriginalMessage": text,
        "LogStreamArn": "",
    }
    return 424, "ModelError", json.dumps(error).encode()


def _event(payload: bytes) -> bytes:
    """Return one frame of AWS's event stream that holds a PayloadPart: lengths, their CRC, headers, payload, and the
    CRC of all before."""
    headers = b"".join(
        struct.pack(f"!B{len(name)}sBH{len(value)}s", len(name), name, 7, len(value), value)  # 7: a string
        for name, value in ((b":message-type", b"event"), (b":event-type", b"PayloadPart"))
    )
    frame = struct.pack("!II", 16 + len(headers) + len(payload), len(headers))
    frame += struct.pack("!I", crc32(frame)) + headers + payload
    return frame + struct.pack("!I", crc32(frame))
