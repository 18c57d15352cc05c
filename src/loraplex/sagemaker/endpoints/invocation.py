"""Asks an endpoint."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from loraplex.sagemaker.endpoints.aws import Aws, AwsError, translated
from loraplex.sagemaker.endpoints.calls import Call
from loraplex.sagemaker.endpoints.deployment import base_component

RUNTIME = "sagemaker-runtime"
NO_COMPONENT = "Inference Component Name header is required"


def body_of(text: str, adapters: Sequence[str]) -> bytes:
    """Return the body of `/v1/classify` for a text. Without adapters, all classifiers judge it, or the component's."""
    return json.dumps({"input": text, **({"classifiers": list(adapters)} if adapters else {})}).encode()


def invoke(
    aws: Aws, endpoint: str, body: bytes, *, content_type: str, component: str | None = None, stream: bool = False
) -> Iterator[bytes]:
    """Yield the endpoint's answer: whole, or with `stream` in the parts in which it comes. Raises AwsError.

    Without `component`, an endpoint with components asks its base component."""
    parameters: dict[str, Any] = {"EndpointName": endpoint, "ContentType": content_type, "Body": body}
    if component is not None:
        parameters["InferenceComponentName"] = component
    if not stream:
        call = Call(RUNTIME, "InvokeEndpoint", parameters)
        answer = _answer_of(aws, call)
        with translated(call):
            yield answer["Body"].read()
        return
    call = Call(RUNTIME, "InvokeEndpointWithResponseStream", parameters)
    answer = _answer_of(aws, call)
    with translated(call):
        for event in answer["Body"]:
            if part := event.get("PayloadPart"):
                yield part["Bytes"]


def _answer_of(aws: Aws, call: Call) -> dict[str, Any]:
    """Make the call, and again for the base component where AWS asks for a component.

    To look first whether there are components would take a right that a user who only asks need not have."""
    try:
        return aws.run(call)
    except AwsError as error:
        if error.aws_code != "ValidationError" or NO_COMPONENT not in error.message:
            raise
    base = {"InferenceComponentName": base_component(call.parameters["EndpointName"])}
    return aws.run(replace(call, parameters={**call.parameters, **base}))


def invoke_async(aws: Aws, endpoint: str, input_url: str, *, content_type: str) -> str:
    """Queue a request whose body is on S3, and return the s3:// URL where the answer will be. Raises AwsError."""
    parameters = {"EndpointName": endpoint, "ContentType": content_type, "InputLocation": input_url}
    return str(aws.run(Call(RUNTIME, "InvokeEndpointAsync", parameters))["OutputLocation"])
