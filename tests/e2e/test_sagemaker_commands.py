"""`loraplex sagemaker …` over HTTP: against moto's server in AWS's place, and against a real Loraplex server in its
runtime's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

import serving
from loraplex.cli.main import app

ROLE = "arn:aws:iam::123456789012:role/loraplex"
TEXT = "Customer: hello, is my payment done?"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture
def aws_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    httpx.post(f"{url}/moto-api/reset")
    yield url
    httpx.post(f"{url}/moto-api/reset")
    server.stop()


def run(*arguments: str, code: int = 0, stdin: bytes = b"") -> str:
    result = CliRunner().invoke(app, ["sagemaker", *arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_an_endpoints_life(aws_url: str) -> None:
    s3 = boto3.client("s3", "us-east-1")
    s3.create_bucket(Bucket="models")
    s3.put_object(Bucket="models", Key="model.tar.gz", Body=b"x")
    deploy = ("deploy", "support", "--role", ROLE, "--image", "registry/loraplex:1")
    options = ("--model-data", "s3://models/model.tar.gz", "--instance-type", "ml.m5.large")
    run(*deploy, *options)
    run("autoscale", "support", "--max", "2", "--target-concurrency", "8")
    kinds = [one["kind"] for one in json.loads(run("status", "support", "--json"))["resources"]]
    assert kinds == ["endpoint", "scaling policy", "scalable target", "config", "model"]
    run("delete", "support", "--yes")
    sagemaker = boto3.client("sagemaker", "us-east-1")
    assert not sagemaker.list_endpoints()["Endpoints"] and not sagemaker.list_models()["Models"]
    assert not sagemaker.list_endpoint_configs()["EndpointConfigs"]
    run(*deploy, "--model-data", "s3://models/none.tar.gz", code=1)


@pytest.fixture
def runtime(tiny_server: serving.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", tiny_server.url)


def labels(output: str) -> dict[str, Any]:
    return {verdict["classifier"]: verdict["label"] for verdict in json.loads(output)["verdicts"]}


def test_a_text_is_judged(runtime: None, http: httpx.Client) -> None:
    asked = http.post("/v1/classify", json={"input": TEXT}).json()
    everything = {verdict["classifier"]: verdict["label"] for verdict in asked["verdicts"]}
    assert labels(run("invoke", "support", "--text", TEXT)) == everything
    some = run("invoke", "support", "--text", TEXT, "--adapter", "task0", "--adapter", "task1")
    assert labels(some) == {name: everything[name] for name in ("task0", "task1")}
    assert labels(run("invoke", "support", "--text", TEXT, "--component", "task1")) == {"task1": everything["task1"]}


def test_a_body_is_sent_as_it_is(runtime: None, http: httpx.Client, tmp_path: Path) -> None:
    body = {"input_text": TEXT, "adapter_name": "task0"}
    (tmp_path / "body.json").write_text(json.dumps(body))
    expected = http.post("/invocations", json=body).json()
    assert json.loads(run("invoke", "support", "--body", str(tmp_path / "body.json"))) == expected
    assert json.loads(run("invoke", "support", "--body", "-", stdin=json.dumps(body).encode())) == expected
    lines = json.dumps(body).encode() + b"\n" + json.dumps(body).encode()
    answer = run("invoke", "support", "--body", "-", "--content-type", "application/jsonlines", stdin=lines)
    assert [json.loads(line) for line in answer.splitlines()] == [expected, expected]


def test_a_stream_is_printed(runtime: None, http: httpx.Client) -> None:
    body = {"prompt": TEXT, "model": "task0", "max_tokens": 4, "stream": True}
    answer = run("invoke", "support", "--body", "-", "--stream", stdin=json.dumps(body).encode())
    assert answer.count("data: ") > 2 and "[DONE]" in answer
    assert labels(run("invoke", "support", "--text", TEXT, "--adapter", "task0", "--stream")).keys() == {"task0"}


def test_the_containers_error_is_shown(runtime: None) -> None:
    output = run("invoke", "support", "--text", TEXT, "--component", "nope", code=1)
    assert "sagemaker:InvokeEndpoint: ModelError" in output and "no classifier named 'nope'" in output
    assert "loraplex sagemaker logs" in output
    output = run("invoke", "support", "--text", TEXT, "--component", "nope", "--stream", code=1)
    assert "sagemaker:InvokeEndpointWithResponseStream: ModelError" in output


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--text", TEXT, "--body", "x.json"),
        ("--body", "no-such-file.json"),
        ("--body", "-", "--adapter", "task0"),
        ("--input", "s3://models/body.json", "--stream"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(options: tuple[str, ...]) -> None:
    run("invoke", "support", *options, code=2)
