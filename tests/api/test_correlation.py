"""What SageMaker's headers name: a request, for feedback, and a session. And how batch transform sends its records."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import httpx
import pytest
from botocore.config import Config

import serving

TEXT = "Customer: hello, is my payment done?"
LONG = "\n".join([TEXT] * 8)  # several blocks of tokens
ID = "X-Amzn-SageMaker-Inference-Id"
LINES = "application/jsonlines"


@pytest.fixture
def runtime(tiny_server: serving.Server) -> Any:
    return boto3.client(
        "sagemaker-runtime",
        endpoint_url=tiny_server.url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(retries={"total_max_attempts": 1}),
    )


def invoke(runtime: Any, body: object, **arguments: str) -> Any:
    return runtime.invoke_endpoint(
        EndpointName="any", ContentType="application/json", Body=json.dumps(body), **arguments
    )


def judge(http: httpx.Client, status: int = 200, **body: str) -> Any:
    response = http.post("/v1/feedback", json={"label": "yes", **body})
    assert response.status_code == status, response.text
    return response.json()


def num_labelled(http: httpx.Client, name: str) -> int:
    targets = http.get(f"/v1/routes/{name}/stats").json()["targets"]
    return sum((one.get("accuracy") or {}).get("num_labelled", 0) for one in targets)


# ------------------------------------------------------------------------------------------------- feedback


def test_feedback_finds_an_inference_of_the_articles_client(runtime: Any, http: httpx.Client) -> None:
    given = str(uuid4())
    invoke(runtime, {"input_text": TEXT, "adapter_name": "task1"}, InferenceId=given)
    before = num_labelled(http, "task1")
    assert judge(http, request_id=given) == {"request_id": given, "num_answers": 1}
    assert judge(http, request_id=given, label="no")["num_answers"] == 1  # the last word counts
    assert num_labelled(http, "task1") == before + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/classify", {"input": TEXT, "classifiers": "task0"}),
        ("/v1/classify", {"model": "task0", "input": TEXT}),
        ("/invocations", {"inputs": TEXT, "parameters": {"adapter_id": "task0"}}),
        ("/invocations", {"input": TEXT, "classifiers": "task0"}),
    ],
)
@pytest.mark.parametrize("header", [ID, "X-Request-ID"])
def test_on_every_path_that_classifies(http: httpx.Client, path: str, body: Any, header: str) -> None:
    given = str(uuid4())
    answer = http.post(path, json=body, headers={header: given})
    assert answer.headers["X-Request-ID"] == given
    assert judge(http, request_id=given)["num_answers"] == 1


def test_feedback_comes_through_an_endpoint_too(runtime: Any) -> None:
    """An endpoint has no other path than /invocations."""
    given = str(uuid4())
    answer = json.loads(invoke(runtime, {"input": TEXT, "classifiers": "task1"}, InferenceId=given)["Body"].read())
    for named in ({"request_id": given}, {"verdict_id": answer["verdicts"][0]["id"]}):
        judged = json.loads(invoke(runtime, {**named, "label": "no"})["Body"].read())
        assert judged == {**named, "num_answers": 1}
    with pytest.raises(runtime.exceptions.ModelError, match="unknown_verdict"):
        invoke(runtime, {"request_id": "nobody's", "label": "no"})


def test_the_servers_own_id_names_no_request(http: httpx.Client) -> None:
    answer = http.post("/invocations", json={"input_text": TEXT, "adapter_name": "task0"})
    judge(http, 404, request_id=answer.headers["X-Request-ID"])


def test_an_id_that_names_many_requests_is_refused(http: httpx.Client) -> None:
    given = str(uuid4())
    for number in range(18):
        if number == 16:
            assert judge(http, request_id=given)["num_answers"] == 16
        http.post("/v1/classify", json={"input": TEXT, "classifiers": "task0"}, headers={ID: given})
    assert "18 verdicts of 'task0'" in judge(http, 422, request_id=given)["error"]["message"]


def test_a_key_finds_its_own_requests_only(tiny_bundle: Path) -> None:
    keys = {name: f"{name}-secret-0123456789" for name in ("one", "two", "ops")}
    given = ",".join(f"{name}:{'admin' if name == 'ops' else 'infer'}:{secret}" for name, secret in keys.items())
    with serving.serve(tiny_bundle, LORAPLEX_API_KEYS=given) as server, serving.client(server) as http:

        def ask(key: str, path: str, body: dict[str, str], status: int = 200) -> None:
            headers = {"X-API-Key": keys[key], "X-Request-ID": "1"}
            response = http.post(path, json=body, headers=headers)
            assert response.status_code == status, response.text

        ask("one", "/v1/classify", {"input": TEXT, "classifiers": "task0"})
        ask("two", "/v1/classify", {"input": TEXT, "classifiers": "task1"})
        ask("two", "/v1/feedback", {"request_id": "1", "classifier": "task0", "label": "yes"}, 404)
        ask("two", "/v1/feedback", {"request_id": "1", "label": "yes"})  # its own, of one classifier
        ask("ops", "/v1/feedback", {"request_id": "1", "label": "yes"}, 422)
        ask("ops", "/v1/feedback", {"request_id": "1", "classifier": "task0", "label": "yes"})


def test_of_several_classifiers_one_is_named(http: httpx.Client) -> None:
    given = str(uuid4())
    http.post("/v1/classify", json={"input": TEXT, "classifiers": ["task0", "task1", "nope"]}, headers={ID: given})
    error = judge(http, 422, request_id=given)["error"]
    assert "'task0', 'task1'" in error["message"] and "classifier" in error["remedy"]
    assert judge(http, request_id=given, classifier="task1")["num_answers"] == 1
    assert "by 'task2'" in judge(http, 404, request_id=given, classifier="task2")["error"]["message"]
    assert "by 'nope'" in judge(http, 404, request_id=given, classifier="nope")["error"]["message"]
    assert "no label" in judge(http, 422, request_id=given, classifier="task0", label="perhaps")["error"]["message"]


def test_each_of_several_texts_has_its_index(http: httpx.Client) -> None:
    given = str(uuid4())
    batch = {"inputs": [TEXT, "Customer: bye", TEXT], "classifiers": "task0"}
    answer = http.post("/v1/classify", json=batch, headers={ID: given}).json()
    judge(http, 404, request_id=given)
    before = num_labelled(http, "task0")
    assert judge(http, request_id=f"{given}-1")["num_answers"] == 1
    assert judge(http, verdict_id=answer["results"][1]["verdicts"][0]["id"])["num_answers"] == 1
    assert num_labelled(http, "task0") == before + 1  # both named the same verdict


def test_each_line_of_a_batch_has_its_index(http: httpx.Client) -> None:
    given = str(uuid4())
    lines = [{"input_text": TEXT, "adapter_name": "task0"}, {"inputs": [TEXT, TEXT], "classifiers": "task1"}]
    body = "".join(json.dumps(line) + "\n" for line in lines)
    answer = http.post("/invocations", content=body, headers={"Content-Type": LINES, ID: given})
    assert answer.status_code == 200
    for name in ("-0", "-1-0", "-1-1"):
        assert judge(http, request_id=given + name)["num_answers"] == 1
    judge(http, 404, request_id=f"{given}-1")


def test_a_request_that_was_sent_again_has_two_verdicts(http: httpx.Client) -> None:
    given = str(uuid4())
    for _ in range(2):
        http.post("/v1/classify", json={"input": TEXT, "classifiers": "task0"}, headers={ID: given})
    assert judge(http, request_id=given)["num_answers"] == 2


def test_an_id_with_spaces_is_kept_for_feedback_though_not_for_the_log(http: httpx.Client) -> None:
    given = f"order 4711, turn {uuid4()}"
    answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": "task0"}, headers={ID: given})
    assert answer.headers["X-Request-ID"] != given
    assert judge(http, request_id=given)["num_answers"] == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either `verdict_id` or `request_id`"),
        ({"verdict_id": "a", "request_id": "b"}, "either `verdict_id` or `request_id`"),
        ({"verdict_id": "a", "classifier": "task0"}, "`classifier` is beside `verdict_id`"),
    ],
)
def test_feedback_that_names_nothing_or_too_much(http: httpx.Client, body: dict[str, str], message: str) -> None:
    assert message in judge(http, 422, **body)["error"]["message"]


def test_unknown_requests_and_long_ids(http: httpx.Client) -> None:
    error = judge(http, 404, request_id="nobody sent it")["error"]
    assert error["code"] == "unknown_verdict" and "of the request 'nobody sent it'" in error["message"]
    answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": "task0"}, headers={ID: "x" * 129})
    assert answer.status_code == 422 and ID in answer.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------- sessions


@pytest.fixture
def split(http: httpx.Client) -> Iterator[None]:
    """A route of two targets."""
    http.put("/v1/routes/split", json={"targets": {"task0": 1, "task1": 1}}).raise_for_status()
    yield
    http.delete("/v1/routes/split").raise_for_status()


def test_a_session_is_a_conversation(runtime: Any, split: None) -> None:
    opened = invoke(runtime, {"input": LONG, "classifiers": "split"}, SessionId="NEW_SESSION")
    session, ends = re.fullmatch(r"([0-9a-f]{32}); Expires=(.+Z)", opened["NewSessionId"]).groups()  # type: ignore[union-attr]
    assert timedelta(hours=23) < datetime.fromisoformat(ends) - datetime.now(UTC) <= timedelta(days=1)

    def target(**arguments: str) -> tuple[str, int]:
        answer = json.loads(invoke(runtime, {"input": LONG, "classifiers": "split"}, **arguments)["Body"].read())
        return answer["verdicts"][0]["adapter"]["name"], answer["usage"]["cached_tokens"]

    first = json.loads(opened["Body"].read())["verdicts"][0]["adapter"]["name"]
    later = {target(SessionId=session) for _ in range(8)}
    assert {name for name, _ in later} == {first}  # a route keeps its target
    assert min(cached for _, cached in later) > 0  # the next turn reuses what was computed
    assert {name for name, _ in (target(SessionId=f"s{i}") for i in range(16))} == {"task0", "task1"}
    assert "NewSessionId" not in invoke(runtime, {"input": LONG, "classifiers": "split"}, SessionId=session)


def test_the_bodys_conversation_counts_before_the_session(http: httpx.Client, split: None) -> None:
    body = {"input": TEXT, "classifiers": "split", "conversation_id": "c"}
    names = {
        http.post("/invocations", json=body, headers={"X-Amzn-SageMaker-Session-Id": f"s{i}"}).json()["verdicts"][0][
            "adapter"
        ]["name"]
        for i in range(12)
    }
    assert len(names) == 1


def test_a_body_of_lines_is_no_single_conversation(http: httpx.Client, split: None) -> None:
    line = json.dumps({"input": TEXT, "classifiers": "split"}) + "\n"
    headers = {"Content-Type": LINES, "X-Amzn-SageMaker-Session-Id": "s"}
    answers = http.post("/invocations", content=line * 24, headers=headers).text.splitlines()
    assert {json.loads(one)["verdicts"][0]["adapter"]["name"] for one in answers} == {"task0", "task1"}


def test_an_error_opens_no_session(runtime: Any) -> None:
    with pytest.raises(runtime.exceptions.ModelError) as caught:
        invoke(runtime, {"input": TEXT, "classifiers": "nope"}, SessionId="NEW_SESSION")
    headers = caught.value.response["ResponseMetadata"]["HTTPHeaders"]
    assert not [name for name in headers if "new-session" in name]


# ------------------------------------------------------------------------------------------------- batch transform


def test_batch_transform_as_the_server_asks_for_it(http: httpx.Client) -> None:
    """As SageMaker does it: lines are packed into bodies up to the size that the server names, and several are sent at
    once. The output has a line for each line of the input."""
    asked = http.get("/execution-parameters").json()
    assert asked == {"MaxConcurrentTransforms": 4, "BatchStrategy": "MULTI_RECORD", "MaxPayloadInMB": 2}
    lines = [
        json.dumps({"input_text": f"Customer: {number}", "adapter_name": f"task{number % 3}"}) for number in range(400)
    ]
    lines[7] = '{"input_text": "x", "adapter_name": "nope"}'
    bodies = ["\n".join(lines[start : start + 90]) + "\n" for start in range(0, len(lines), 90)]
    with ThreadPoolExecutor(asked["MaxConcurrentTransforms"]) as threads:
        answers = list(
            threads.map(lambda body: http.post("/invocations", content=body, headers={"Content-Type": LINES}), bodies)
        )
    assert all(answer.status_code == 200 for answer in answers)
    output = "".join(answer.text for answer in answers).splitlines()
    assert len(output) == len(lines)
    assert json.loads(output[7])["error"]["code"] == "unknown_classifier"
    for number in (0, 1, 123, 399):
        alone = http.post("/invocations", content=lines[number], headers={"Content-Type": "application/json"}).json()
        together = json.loads(output[number])
        assert together[0]["predicted_text"] == alone[0]["predicted_text"]
        assert together[0]["confidence_score"] == pytest.approx(alone[0]["confidence_score"], abs=1e-4)


def test_a_body_of_very_many_lines_is_one_error(http: httpx.Client) -> None:
    answer = http.post("/invocations", content=b"{}\n" * 100_001, headers={"Content-Type": LINES})
    assert answer.status_code == 400 and "more than 100000 records" in answer.json()["error"]["message"]
