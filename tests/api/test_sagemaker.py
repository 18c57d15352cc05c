"""What a real boto3 client of SageMaker's runtime sees when its endpoint is a local server."""

import json
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

import serving

TEXT = "Customer: hello, is my payment done?"


@pytest.fixture
def runtime(tiny_server: serving.Server) -> Any:
    return client(tiny_server.url)


def client(url: str) -> Any:
    return boto3.client(
        "sagemaker-runtime",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(retries={"total_max_attempts": 1}),
    )


def invoke(runtime: Any, body: object, **arguments: str) -> Any:
    response = runtime.invoke_endpoint(
        EndpointName="production", ContentType="application/json", Body=json.dumps(body), **arguments
    )
    assert response["ContentType"] == "application/json"
    return json.loads(response["Body"].read())


def test_the_articles_client(runtime: Any, http: httpx.Client) -> None:
    body = {"input_text": TEXT, "adapter_name": "task1"}
    [answer] = invoke(runtime, body)
    assert answer == http.post("/invocations", json=body).json()[0]


def test_the_content_type_may_be_left_out(runtime: Any, http: httpx.Client) -> None:
    body = json.dumps({"input_text": TEXT, "adapter_name": "task1"}).encode()
    response = runtime.invoke_endpoint(EndpointName="production", Body=body)
    assert json.loads(response["Body"].read()) == invoke(runtime, json.loads(body))
    assert http.post("/invocations", content=body).json() == invoke(runtime, json.loads(body))


def test_the_native_body(runtime: Any) -> None:
    answer = invoke(runtime, {"input": TEXT, "classifiers": ["task0", "nope"]})
    assert [verdict["classifier"] for verdict in answer["verdicts"]] == ["task0", "nope"]
    assert answer["verdicts"][1]["error"]["code"] == "unknown_classifier"
    batch = invoke(runtime, {"inputs": [TEXT, TEXT], "classifiers": "task0"})
    assert len(batch["results"]) == 2


def test_the_adapter_comes_from_the_body_then_from_the_header(runtime: Any, http: httpx.Client) -> None:
    by_body = {name: invoke(runtime, {"input_text": TEXT, "adapter_name": name}) for name in ("task0", "task1")}
    assert by_body["task0"] != by_body["task1"]
    assert invoke(runtime, {"input_text": TEXT}, InferenceComponentName="task1") == by_body["task1"]
    both = invoke(runtime, {"input_text": TEXT, "adapter_name": "task0"}, InferenceComponentName="task1")
    assert both == by_body["task0"]
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "task1"}
    assert http.post("/invocations", json={"input_text": TEXT}, headers=headers).json() == by_body["task1"]
    native = http.post("/invocations", json={"input": TEXT}, headers=headers).json()
    assert [verdict["classifier"] for verdict in native["verdicts"]] == ["task1"]
    null = {"input_text": TEXT, "adapter_name": None}
    assert http.post("/invocations", json=null, headers=headers).json() == by_body["task1"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"input_text": TEXT, "adapter_name": "nope"}, 404, "unknown_classifier"),
        ({"input_text": ""}, 422, "invalid_request"),
        ({"input": TEXT, "classifiers": []}, 422, "invalid_request"),
        ({"input_text": "x" * 3_000_000}, 413, "body_too_large"),
        ([1], 422, "invalid_request"),
    ],
)
def test_an_error_of_the_container_is_a_typed_model_error(runtime: Any, body: object, status: int, code: str) -> None:
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        invoke(runtime, body)
    assert caught.value.response["OriginalStatusCode"] == status
    assert json.loads(caught.value.response["OriginalMessage"])["error"]["code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 424


def test_a_component_that_is_no_adapter_is_an_error(runtime: Any) -> None:
    with pytest.raises(runtime.exceptions.ModelError, match="nope"):
        invoke(runtime, {"input_text": TEXT}, InferenceComponentName="nope")


def test_a_target_model_names_the_adapter(runtime: Any, http: httpx.Client) -> None:
    by_body = invoke(runtime, {"input_text": TEXT, "adapter_name": "task1"})
    for model in ("task1", "task1.tar.gz"):
        assert invoke(runtime, {"input_text": TEXT}, TargetModel=model) == by_body
        assert invoke(runtime, {"input_text": TEXT, "adapter_name": "task1"}, TargetModel=model) == by_body
        native = invoke(runtime, {"input": TEXT}, TargetModel=model)
        assert [verdict["classifier"] for verdict in native["verdicts"]] == ["task1"]
        headers = {"X-Amzn-SageMaker-Target-Model": model}
        assert http.post("/invocations", json={"input_text": TEXT}, headers=headers).json() == by_body
    with pytest.raises(runtime.exceptions.ModelError, match="no classifier named 'nope'"):
        invoke(runtime, {"input_text": TEXT}, TargetModel="nope.tar.gz")


@pytest.mark.parametrize(
    ("body", "more"),
    [
        ({"input_text": TEXT, "adapter_name": "task0"}, {}),
        ({"input": TEXT, "classifiers": ["task0", "task1"]}, {}),
        ({"input": TEXT, "classifiers": "*"}, {}),
        ({"input_text": TEXT}, {"InferenceComponentName": "task0"}),
    ],
)
def test_a_target_model_beside_another_name_is_refused(runtime: Any, body: object, more: dict[str, str]) -> None:
    with pytest.raises(
        runtime.exceptions.ModelError, match=r"Target-Model is 'task1', and the request names"
    ) as caught:
        invoke(runtime, body, TargetModel="task1", **more)
    assert caught.value.response["OriginalStatusCode"] == 422


@pytest.mark.parametrize("part", ["TargetVariant", "TargetContainerHostname"])
def test_a_part_of_an_endpoint_is_refused(runtime: Any, http: httpx.Client, part: str) -> None:
    with pytest.raises(runtime.exceptions.ModelError, match="'blue', and this server is a single container"):
        invoke(runtime, {"input_text": TEXT}, **{part: "blue"})
    # SageMaker has followed it before it asks its container.
    headers = {"X-Amzn-SageMaker-Target-Variant": "blue"}
    assert http.post("/invocations", json={"input_text": TEXT}, headers=headers).status_code == 200


def test_a_streamed_answer_comes_in_one_part(runtime: Any) -> None:
    body = json.dumps({"input_text": TEXT, "adapter_name": "task0"})
    response = runtime.invoke_endpoint_with_response_stream(
        EndpointName="production", ContentType="application/json", Body=body
    )
    [event] = list(response["Body"])
    [answer] = json.loads(event["PayloadPart"]["Bytes"])
    assert set(answer) == {"confidence_score", "predicted_text"}
    with pytest.raises(runtime.exceptions.ModelError):
        runtime.invoke_endpoint_with_response_stream(
            EndpointName="production", ContentType="application/json", Body=b"{"
        )


def test_what_is_no_endpoints_path_stays_what_it_is(http: httpx.Client) -> None:
    assert http.post("/endpoints/production", json={}).status_code == 404
    assert http.get("/endpoints/production/invocations").status_code == 404


def test_a_client_error_has_a_code_for_those_that_look_at_it(runtime: Any) -> None:
    with pytest.raises(ClientError) as caught:
        invoke(runtime, {})
    assert caught.value.response["Error"]["Code"] == "ModelError"
