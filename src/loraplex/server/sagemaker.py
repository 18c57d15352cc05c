"""SageMaker's HTTP routes for containers, with the article's body or Loraplex's own. Also AWS's runtime API, for a
local boto3 client."""

import json
import math
import re
import struct
from typing import Annotated
from zlib import crc32

from fastapi import APIRouter, Header, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import InvalidRequestError
from loraplex.generation import GenerateRequest
from loraplex.server.json_body import JsonRoute
from loraplex.server.openai import generated_texts
from loraplex.server.proxies import path_of
from loraplex.server.routes import ERRORS, answer, answered, router_of, service_of
from loraplex.server.schemas import ClassifyBody, InvocationBody, InvocationResult, SageMakerBody
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult, classifier_names

router = APIRouter(tags=["sagemaker"], route_class=JsonRoute)

ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
COMPONENT_HEADER = "X-Amzn-SageMaker-Inference-Component"
MODEL_HEADER = "X-Amzn-SageMaker-Target-Model"  # of multi-model endpoints, whose models are archives
ARCHIVE = ".tar.gz"
# Which part of an endpoint answers. SageMaker itself follows these before it asks a container; there is no part here.
PART_HEADERS = ("X-Amzn-SageMaker-Target-Variant", "X-Amzn-SageMaker-Target-Container-Hostname")
IS_RUNTIME_API = "loraplex.runtime_api"  # key of a scope's state
ENDPOINT = re.compile(r"/endpoints/[^/]+/invocations(-response-stream)?")


@router.post("/invocations", response_model=list[InvocationResult] | ClassifyResult | BatchResult, responses=ERRORS)
async def invocations(
    request: Request,
    body: SageMakerBody,
    adapter: Annotated[str | None, Header(alias=ADAPTER_HEADER)] = None,
    model: Annotated[str | None, Header(alias=MODEL_HEADER)] = None,
) -> Response | list[InvocationResult]:
    """Answer `{"input_text", "adapter_name"?}` with `[{"confidence_score", "predicted_text"}]`.

    The body of /v1/classify is answered as on that path. The header of the adapter, or of the target model (with or
    without `.tar.gz`), names the adapter if the body names none. A target model beside another name is refused.
    """
    _check_parts(request)
    if isinstance(body, ClassifyBody):
        named = classifier_names(body.classifiers) if "classifiers" in body.model_fields_set else adapter
    else:
        named = body.adapter_name if body.adapter_name is not None else adapter
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
    return [await _invoke(request, body, named)]


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
        result = await answered(request, ClassifyRequest(input=body.input_text, classifiers=(adapter,)))
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
        content = b""

        async def translated(message: Message) -> None:
            nonlocal start, content
            if message["type"] == "http.response.start":
                start = message
                return
            content += message.get("body", b"")
            if not message.get("more_body", False):
                await _answer(start, content, bool(found[1]), send)

        await self.app(scope, receive, translated)


async def _answer(start: Message, content: bytes, is_stream: bool, send: Send) -> None:
    """Send the container's answer in AWS's form."""
    status = start["status"]
    headers = MutableHeaders(raw=list(start["headers"]))
    if status >= 400:
        status, kind, content = _error(status, content)
        headers["X-Amzn-ErrorType"] = kind
    elif is_stream:
        headers["X-Amzn-SageMaker-Content-Type"] = headers["Content-Type"]
        headers["Content-Type"] = "application/vnd.amazon.eventstream"
        content = _event(content)
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
