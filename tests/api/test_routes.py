"""Routes, batches and feedback by a real client against a real server, and what of them survives a restart."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import serving

JSON = {"Content-Type": "application/json"}
TEXT = "Customer: hello, is my payment done?"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(tiny_bundle, "--dtype", "float32") as server:
        yield server


@pytest.fixture
def own(server: serving.Server) -> Iterator[httpx.Client]:
    """Without routes, whatever the test before this left behind."""
    with serving.client(server) as client:
        yield client
        for route in client.get("/v1/routes").json()["routes"]:
            client.delete(f"/v1/routes/{route['name']}")


def put(http: httpx.Client, name: str, shadows: tuple[str, ...] = (), **targets: float) -> dict[str, Any]:
    response = http.put(f"/v1/routes/{name}", json={"targets": targets, "shadows": shadows})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/classify", json={"input": TEXT} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stats(http: httpx.Client, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    targets = http.get(f"/v1/routes/{name}/stats").json()["targets"]
    return {(one["target"], one["role"]): one for one in targets}


def test_the_articles_ab_test(own: httpx.Client) -> None:
    """Ten per cent of a classifier's conversations go to its next version; nobody changes the name that they ask."""
    plain = ask(own, classifiers="task0")["verdicts"][0]
    before = stats(own, "task0")["task0", "primary"]["num_verdicts"]
    put(own, "task0", task0=90, task1=10, shadows=("task2",))
    answered: dict[str, str] = {}
    for turn in range(2):
        for i in range(60):
            [verdict] = ask(own, classifiers="task0", conversation_id=f"c{i}")["verdicts"]
            assert verdict["classifier"] == "task0"
            assert answered.setdefault(f"c{i}", verdict["adapter"]["name"]) == verdict["adapter"]["name"], turn
            if verdict["adapter"]["name"] == "task0":
                assert verdict["scores"] == pytest.approx(plain["scores"], abs=1e-5)
    shares = Counter(answered.values())
    assert 0 < shares["task1"] < 20 and sum(shares.values()) == 60
    deadline = time.monotonic() + 20
    while (found := stats(own, "task0")).get(("task2", "shadow"), {}).get("num_verdicts", 0) < 120:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    # Those that were asked before there was a route are the classifier's own, too.
    assert found["task0", "primary"]["num_verdicts"] - before == 2 * shares["task0"]
    assert found["task1", "primary"]["num_verdicts"] == 2 * shares["task1"]
    assert found["task2", "shadow"]["agreement"]["num_compared"] == 120
    assert sum(found["task0", "primary"]["label_shares"].values()) == pytest.approx(1)
    assert 0 < found["task0", "primary"]["latency_ms"]["p50"] <= found["task0", "primary"]["latency_ms"]["p99"]


def test_a_star_asks_the_route_and_not_its_targets(own: httpx.Client) -> None:
    put(own, "done", task0=1, shadows=("task1",))
    assert sorted(one["classifier"] for one in ask(own)["verdicts"]) == ["done", "task2", "verbatim"]
    assert {card["id"] for card in own.get("/v1/models").json()["data"]} >= {"done", "task0", "task1"}
    [invoked] = own.post("/invocations", json={"input_text": TEXT, "adapter_name": "done"}).json()
    assert invoked["predicted_text"] == ask(own, classifiers="task0")["verdicts"][0]["label"]
    raw = {"input_text": TEXT + "<|ask|>", "raw": True}
    [by_route] = own.post("/invocations", json=raw | {"adapter_name": "done"}).json()
    [by_name] = own.post("/invocations", json=raw | {"adapter_name": "task0"}).json()
    assert by_route["predicted_text"] == by_name["predicted_text"]
    # One of them may have run beside a shadow, which changes the last digits.
    assert by_route["confidence_score"] == pytest.approx(by_name["confidence_score"], abs=1e-4)


def test_a_rollback_is_one_call(own: httpx.Client) -> None:
    first = put(own, "undone", task0=1)
    put(own, "undone", task1=1)
    assert ask(own, classifiers="undone")["verdicts"][0]["adapter"]["name"] == "task1"
    assert own.post("/v1/routes/undone/rollback").json() == first
    assert ask(own, classifiers="undone")["verdicts"][0]["adapter"]["name"] == "task0"
    assert own.post("/v1/routes/undone/rollback").json()["error"]["code"] == "no_revision"
    assert own.delete("/v1/routes/undone").json() == {"name": "undone", "state": "deleted"}
    assert own.get("/v1/routes/undone").status_code == 404
    assert own.post("/v1/classify", json={"input": TEXT, "classifiers": "undone"}).status_code == 404
    assert own.post("/v1/routes/undone/rollback").json() == first


def test_an_adapter_that_a_route_leads_to_is_not_unloaded(own: httpx.Client) -> None:
    put(own, "done", task0=1, shadows=("task1",))
    for name in ("task0", "task1"):
        response = own.delete(f"/v1/adapters/{name}")
        assert response.status_code == 409 and response.json()["error"]["code"] == "adapter_in_use"
    assert own.post("/v1/unload_lora_adapter", json={"lora_name": "task0"}).status_code == 409
    own.delete("/v1/routes/done")
    source = own.get("/v1/adapters/task0").json()["path"]
    assert own.delete("/v1/adapters/task0").status_code == 200
    assert own.put("/v1/adapters/task0", json={"source": source}).status_code == 200


def test_a_rollback_to_what_is_not_there_any_more_is_refused(own: httpx.Client) -> None:
    source = own.get("/v1/adapters/task0").json()["path"]
    assert own.put("/v1/adapters/old", json={"source": source}).status_code == 200
    put(own, "backwards", old=1)
    put(own, "backwards", task0=1)
    assert own.delete("/v1/adapters/old").status_code == 200
    refused = own.post("/v1/routes/backwards/rollback")
    assert refused.status_code == 422 and "'old'" in refused.json()["error"]["message"]
    assert ask(own, classifiers="backwards")["verdicts"][0]["adapter"]["name"] == "task0"


def test_the_bases_name_is_its_own(own: httpx.Client) -> None:
    source = own.get("/v1/adapters/task0").json()["path"]
    response = own.put("/v1/adapters/bundle", json={"source": source})
    assert response.status_code == 422 and "the base's name" in response.json()["error"]["message"]


def test_feedback_makes_accuracy(own: httpx.Client) -> None:
    put(own, "judged", task0=1, shadows=("task1",))
    [verdict] = ask(own, classifiers="judged")["verdicts"]
    deadline = time.monotonic() + 10
    while ("task1", "shadow") not in stats(own, "judged"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    body = {"verdict_id": verdict["id"], "label": verdict["label"]}
    assert own.post("/v1/feedback", json=body).json() == {"verdict_id": verdict["id"], "num_answers": 2}
    accuracy = stats(own, "judged")["task0", "primary"]["accuracy"]
    assert (accuracy["num_labelled"], accuracy["share"]) == (1, 1.0) and 0 < accuracy["low"] < accuracy["high"] == 1
    assert stats(own, "judged")["task1", "shadow"]["accuracy"]["num_labelled"] == 1
    assert own.post("/v1/feedback", json=body | {"label": "perhaps"}).status_code == 422
    assert (
        own.post("/v1/feedback", content=b'{"verdict_id": "\\ud800", "label": "yes"}', headers=JSON).status_code == 422
    )
    unknown = own.post("/v1/feedback", json=body | {"verdict_id": "cls-0-0"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_verdict"


@pytest.mark.parametrize(
    ("name", "body", "code", "mentions"),
    [
        ("r", {"targets": {"nope": 1}}, "unknown_classifier", "nope"),
        ("r", {"targets": {"task0": 1}, "shadows": ["nope"]}, "unknown_classifier", "nope"),
        ("r", {"targets": {}}, "invalid_request", "targets"),
        ("r", {"targets": {"task0": -1}}, "invalid_request", "targets.task0"),
        ("r", {"targets": {"task0": 0}}, "invalid_request", "targets"),
        ("r", {"targets": {"task0": 1}, "weight": 1}, "invalid_request", "weight"),
        ("r", {"shadows": []}, "invalid_request", "targets"),
        ("*", {"targets": {"task0": 1}}, "bundle_error", "'*'"),
        ("bundle", {"targets": {"task0": 1}}, "invalid_request", "base"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(
    http: httpx.Client, name: str, body: dict[str, Any], code: str, mentions: str
) -> None:
    response = http.put(f"/v1/routes/{name}", json=body)
    error = response.json()["error"]
    assert response.status_code == 422 and error["code"] == code and mentions in error["message"]
    assert http.get("/v1/routes").json() == {"routes": []}
    for answer in (http.get("/v1/routes/r/stats"), http.delete("/v1/routes/r"), http.get("/v1/routes/r")):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_route"


def test_a_route_leads_to_adapters_and_not_to_routes(own: httpx.Client) -> None:
    put(own, "first", task0=1, task1=1)
    for body in ({"targets": {"first": 1}}, {"targets": {"task0": 1}, "shadows": ["first"]}):
        response = own.put("/v1/routes/second", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (422, "invalid_request")
        assert "'first' is a route" in error["message"] and "'task0', 'task1'" in error["remedy"]
    own.delete("/v1/routes/first").raise_for_status()


def test_routes_verdicts_and_feedback_survive_a_restart_and_the_bundles_file_is_read(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for part in tiny_bundle.iterdir():
        (bundle / part.name).symlink_to(part)
    routes = {"alias": "task1", "split": {"targets": {"task0": 1, "task1": 0}, "shadows": ["task2"]}}
    (bundle / "loraplex.yaml").write_text(yaml.safe_dump({"routes": routes}))
    arguments = (bundle, "--dtype", "float32", "--state-dir", tmp_path / "state")
    with serving.serve(*arguments) as server, serving.client(server) as http:
        assert [one["name"] for one in http.get("/v1/routes").json()["routes"]] == ["alias", "split"]
        verdict = ask(http, classifiers=["alias", "split"])["verdicts"][0]
        assert verdict["adapter"]["name"] == "task1"
        changed = put(http, "alias", task2=1)
        assert server.stop() == 0
    with serving.serve(*arguments) as server, serving.client(server) as http:
        assert http.get("/v1/routes/alias").json() == changed
        feedback = {"verdict_id": verdict["id"], "label": "yes"}
        assert http.post("/v1/feedback", json=feedback).json()["num_answers"] == 1
        found = stats(http, "alias")["task1", "primary"]
        assert found["num_verdicts"] == 1 and found["accuracy"]["num_labelled"] == 1
        server.process.kill()  # what was answered more than a second ago is on disk all the same
    (bundle / "loraplex.yaml").write_text(yaml.safe_dump({"routes": routes | {"alias": "task0"}}))
    with serving.serve(*arguments) as server, serving.client(server) as http:
        assert http.get("/v1/routes/alias").json()["targets"] == {"task0": 1}
        assert stats(http, "alias")["task1", "primary"]["accuracy"]["num_labelled"] == 1


def test_a_route_of_the_bundle_that_leads_nowhere_is_said_at_the_start(tiny_bundle: Path, tmp_path: Path) -> None:
    for part in tiny_bundle.iterdir():
        (tmp_path / part.name).symlink_to(part)
    to_a_route = {"a": "task0", "b": "a"}
    for routes, mentions in (
        ({"a": "nope"}, "nope"),
        (to_a_route, "routes.b: 'a' is a route"),
        ({"a": {"targets": {"task0": "x"}}}, "routes.a.targets.task0"),
    ):
        (tmp_path / "loraplex.yaml").write_text(yaml.safe_dump({"routes": routes}))
        run = serving.loraplex("serve", tmp_path, "--port", 0)
        assert run.returncode == 1 and mentions in run.stderr and "Traceback" not in run.stderr


# ------------------------------------------------------------------------------------------------- batches


def test_a_batch_equals_its_conversations_one_by_one(http: httpx.Client) -> None:
    texts = [f"Customer: hello {'again ' * i}" for i in range(40)]
    messages = [{"role": "user", "content": "hello"}]
    inputs = [*texts, messages, {"input": messages, "conversation_id": "x"}]
    response = http.post("/v1/classify", json={"inputs": inputs, "classifiers": ["task1", "task0"]})
    batch = response.json()
    assert response.status_code == 200 and len(batch["results"]) == 42
    for given, result in zip(inputs, batch["results"], strict=True):
        body = given if isinstance(given, dict) else {"input": given}
        alone = ask(http, classifiers=["task1", "task0"], **body)
        for one, other in zip(alone["verdicts"], result["verdicts"], strict=True):
            assert one["label"] == other["label"] and one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert batch["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in batch["results"])


def test_one_conversation_of_a_batch_that_fails_does_not_fail_the_others(http: httpx.Client) -> None:
    batch = http.post("/v1/classify", json={"inputs": ["", TEXT], "classifiers": "task0"}).json()
    assert batch["results"][0]["error"]["code"] == "invalid_request" and batch["results"][1]["verdicts"][0]["label"]
    alone = http.post("/v1/classify", json={"inputs": [""], "classifiers": "task0"})
    assert alone.status_code == 422
    unknown = http.post("/v1/classify", json={"inputs": [TEXT], "classifiers": "nope"})
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    ("body", "mentions"),
    [
        ({}, "either `input` or `inputs`"),
        ({"input": TEXT, "inputs": [TEXT]}, "either `input` or `inputs`"),
        ({"input": None, "inputs": [TEXT]}, "either `input` or `inputs`"),
        ({"input": TEXT, "inputs": None}, "either `input` or `inputs`"),
        ({"input": None}, "either `input` or `inputs`"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [1]}, "inputs.0"),
        ({"inputs": [[{"role": "user"}]]}, "inputs.0.0.content"),
        ({"inputs": [{"input": 1}]}, "inputs.0.input"),
        ({"inputs": [TEXT], "conversation_id": "x"}, "conversation_id"),
    ],
)
def test_a_wrong_batch_is_named(http: httpx.Client, body: dict[str, Any], mentions: str) -> None:
    response = http.post("/v1/classify", json=body)
    assert response.status_code == 422 and mentions in response.json()["error"]["message"]
