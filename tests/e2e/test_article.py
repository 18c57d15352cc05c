"""The article's programs run as their page says, and answer as Loraplex does."""

import ast
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import serving
import tiny
from loraplex import Loraplex

ARTICLE = serving.ROOT / "examples" / "article"
Answers = dict[str, tuple[str, float]]


def run(name: str, *arguments: str) -> Answers:
    """What it prints: a task, the answer, its confidence."""
    command = [sys.executable, str(ARTICLE / name), *arguments]
    environment = os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}  # by default vLLM logs on standard output
    done = subprocess.run(command, cwd=serving.ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {task: (text, float(confidence)) for task, text, confidence in rows}


@pytest.fixture(scope="module")
def expected(demo_bundle: Path) -> Iterator[Answers]:
    """By the top token of the verbatim prompt, as the article's programs answer."""
    sys.path.insert(0, str(ARTICLE))
    try:
        from prompt import CONVERSATION, TASKS, format_prompt
    finally:
        sys.path.remove(str(ARTICLE))
    answers = {}
    with Loraplex.load(demo_bundle, dtype="float32") as loraplex:
        for task in TASKS:
            [token] = loraplex.generate(format_prompt(CONVERSATION, task), task).tokens
            answers[task] = (token.text, math.exp(token.log_prob))
    yield answers


def check(answers: Answers, expected: Answers) -> None:
    assert len(answers) == 16 and answers.keys() == expected.keys()
    for task, (text, confidence) in expected.items():
        assert answers[task][0] == text
        assert answers[task][1] == pytest.approx(confidence, abs=1e-3)
    assert {text for text, _ in expected.values()} == {"yes", "no"}


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_with_peft(expected: Answers) -> None:
    check(run("with_peft.py"), expected)


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_the_client(expected: Answers, demo_bundle: Path) -> None:
    with serving.serve(demo_bundle, "--dtype", "float32") as server:
        check(run("classify_conversation.py", server.url), expected)


@pytest.mark.skipif(not tiny.HAS_VLLM, reason="vLLM is not installed here")
def test_with_vllm(expected: Answers) -> None:
    check(run("with_vllm.py"), expected)


def output_of(name: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(ARTICLE / name), *arguments]
    done = subprocess.run(
        command, cwd=serving.ROOT, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_the_ab_test(demo_bundle: Path) -> None:
    with serving.serve(demo_bundle) as server:
        by_client, by_route, *accuracy = output_of("ab_test.py", server.url).splitlines()
        with serving.client(server) as http:
            left = http.get("/v1/adapters").json()["adapters"], http.get("/v1/routes").json()["routes"]
    assert len(left[0]) == 16 and not left[1]  # it cleans up
    drawn, routed = (ast.literal_eval(line[line.index("{") :]) for line in (by_client, by_route))
    assert sum(drawn.values()) == 100 and sum(routed.values()) == 200
    # Two turns of a conversation have one version. Of 100 draws of 10 %, 30 come in fewer than one of a million runs.
    assert all(number % 2 == 0 for number in routed.values()) and 0 < routed["issueResolved_v2"] < 60
    assert len(accuracy) == 2


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_the_deployment_against_moto() -> None:
    """moto stands in for AWS. Its list of instance types is old, so the article's is not in it."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    aws = "http://{}:{}".format(*moto.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        check_deployment(aws, keys)
    finally:
        moto.stop()


def check_deployment(aws: str, keys: dict[str, str]) -> None:
    import boto3

    names = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    sagemaker: Any = boto3.client("sagemaker", endpoint_url=aws, **names)
    given = ("--role", "arn:aws:iam::123456789012:role/endpoint", "--image", "123.dkr.ecr.us-east-1.amazonaws.com/l:1")
    output = output_of(
        "deploy.py",
        *given,
        *("--model-data", "s3://bucket/model.tar.gz", "--instance-type", "ml.g4dn.2xlarge"),
        AWS_ENDPOINT_URL=aws,
        **keys,
    )
    assert output.split() == ["mistral-7b-multi-lora"]
    found = sagemaker.describe_endpoint(EndpointName="mistral-7b-multi-lora")
    assert found["EndpointStatus"] == "InService"
    model = sagemaker.describe_model(ModelName="mistral-7b-multi-lora")
    assert model["PrimaryContainer"]["ModelDataUrl"] == "s3://bucket/model.tar.gz"


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_its_figures_are_on_its_page() -> None:
    """Those of its costs: tests/unit/test_cost.py."""
    page = (serving.ROOT / "docs" / "article.md").read_text()
    lines = output_of("limits.py").splitlines()
    assert len(lines) == 7
    for line in lines:
        for figure in re.findall(r"\d+\.\d+ ms|\d+ tokens|\d+ sequences|\d+\.\d+ GB|\d+ MB", line[40:]):
            number, unit = figure.split()
            assert re.search(rf"\b{re.escape(number)} ({unit}|of them)", page), f"{line}: {figure}"
