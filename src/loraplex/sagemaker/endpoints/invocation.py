"""Asks an endpoint."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from loraplex.sagemaker.endpoints.aws import Aws, translated
from loraplex.sagemaker.endpoints.calls import Call

RUNTIME = "sagemaker-runtime"


def body_of(text: str, adapters: Sequence[str]) -> bytes:
    """Return the body of `/v1/classify` for a text. Without adapters, all classifiers judge it, or the component's."""
    return json.dumps({"input": text, **({"classifiers": list(adapters)} if adapters else {})}).encode()


def invoke(
    aws: Aws, endpoint: str, body: bytes, *, content_type: str, component: str | None = None, stream: bool = False
) -> Iterator[bytes]:
    """Yield the endpoint's answer: whole, or with `stream` in the parts in which it comes. Raises AwsError."""
    parameters: dict[str, Any] = {"EndpointName": endpoint, "ContentType": content_type, "Body": body}
    if component is not None:
        parameters["InferenceComponentName"] = component
    if not stream:
        call = Call(RUNTIME, "InvokeEndpoint", parameters)
        answer = aws.run(call)
        with translated(call):
            yield answer["Body"].read()
        return
    call = Call(RUNTIME, "InvokeEndpointWithResponseStream", parameters)
    answer = aws.run(call)
    with translated(call):
        for event in answer["Body"]:
            if part := event.get("PayloadPart"):
                yield part["Bytes"]


def invoke_async(aws: Aws, endpoint: str, input_url: str, *, content_type: str) -> str:
    """Queue a request whose body is on S3, and return the s3:// URL where the answer will be. Raises AwsError."""
    parameters = {"EndpointName": endpoint, "ContentType": content_type, "InputLocation": input_url}
    return str(aws.run(Call(RUNTIME, "InvokeEndpointAsync", parameters))["OutputLocation"])
