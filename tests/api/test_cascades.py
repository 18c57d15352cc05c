"""Cascades by a real client against a real server: what is skipped, and how each way in tells it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import serving
import tiny
from loraplex import Client, Loraplex, Question

BLOCK = 16  # tokens of K/V that are kept together
TEXT = "Customer: hello\nAgent: at what time?"
NEVER, ALWAYS = 1.0, 1e-9  # what the gate's label never reaches, and what it always reaches
GATES = {
    "task1": {"when": {"classifier": "task0", "label": "yes", "at_least": NEVER}},
    "task2": {"when": {"classifier": "gate", "label": "yes", "at_least": ALWAYS}},
}
PREDICATES = {name: Question(type="predicate", instructions="") for name in ("task0", "task1", "task2")}


def with_settings(tiny_bundle: Path, folder: Path, classifiers: Any) -> Path:
    for part in tiny_bundle.iterdir():
        (folder / part.name).symlink_to(part)
    settings = {"routes": {"gate": "task0"}, "classifiers": classifiers}
    (folder / "loraplex.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_settings(tiny_bundle, tmp_path_factory.mktemp("cascades"), GATES)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as http:
        yield http


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def classify(http: httpx.Client, *names: str, **body: Any) -> list[Any]:
    answer = post(http, "/v1/classify", input=TEXT, classifiers=names or "*", **body)
    verdicts: list[Any] = answer["verdicts"]
    return verdicts


def counted(http: httpx.Client, series: str) -> float:
    lines = (one.rsplit(" ", 1) for one in http.get("/metrics").text.splitlines() if one.startswith(series))
    return sum(float(value) for _, value in lines)


def test_a_skipped_verdict_says_who_skipped_it(http: httpx.Client) -> None:
    skipped = 'loraplex_classifications_total{adapter="",classifier="task1",outcome="skipped"}'
    before = counted(http, skipped), counted(http, "loraplex_skipped_tokens_total")
    first, second, third = classify(http, "task1", "task0", "task2")
    assert first == {"classifier": "task1", "abstained": False, "skipped_by": "task0"}
    assert second["label"] in ("yes", "no") and second["id"].endswith("-1")
    assert third["label"] in ("yes", "no") and "skipped_by" not in third and "gate_failed" not in str(third)
    assert counted(http, skipped) == before[0] + 1 and counted(http, "loraplex_skipped_tokens_total") > before[1]


def test_a_verdict_is_the_same_with_its_gate_and_without(http: httpx.Client) -> None:
    [gated], [alone] = classify(http, "task2"), classify(http, "task2", cascade=False)
    assert gated["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert "label" in classify(http, "task1", cascade=False)[0]


def test_a_star_and_many_texts_heed_the_gates(http: httpx.Client) -> None:
    assert [one["classifier"] for one in classify(http) if "skipped_by" in one] == ["task1"]
    answer = post(http, "/v1/classify", inputs=[TEXT, TEXT], classifiers=["task1"])
    assert [one["verdicts"][0]["skipped_by"] for one in answer["results"]] == ["task0", "task0"]
    assert answer["usage"]["skipped_tokens"] > 0


def test_a_skipped_question_is_a_refusal_in_decisions(http: httpx.Client) -> None:
    questions = [{"type": "predicate", "name": name, "instructions": ""} for name in PREDICATES]
    answer = post(http, "/v1/decisions", model="*", input=TEXT, questions=questions)
    assert [one["type"] for one in answer["answers"]] == ["predicate", "refusal", "predicate"]
    refusal = {"type": "refusal", "name": "task1", "x_adapter": None, "x_skipped_by": "task0"}
    assert answer["answers"][1] == refusal and "task1" not in answer["diagnostics"]
    answer = post(http, "/v1/decisions", model="*", input=TEXT, questions=questions, cascade=False)
    assert [one["type"] for one in answer["answers"]] == ["predicate"] * 3


def test_systemone_answers_every_question_unless_it_is_asked_to_cascade(http: httpx.Client) -> None:
    questions = {name: {"type": "noul"} for name in PREDICATES}
    answer = post(http, "/v1/systemone", state=TEXT, questions=questions)
    assert [*answer["answers"]] == [*questions] and "x_skipped" not in answer
    answer = post(http, "/v1/systemone", state=TEXT, questions=questions, cascade=True)
    assert [*answer["answers"]] == ["task0", "task2"] and answer["x_skipped"] == {"task1": "task0"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"model": "task1", "input": TEXT}),
        ("/v1/classify", {"model": "task1", "input": TEXT}),
        ("/invocations", {"input_text": TEXT, "adapter_name": "task1"}),
    ],
)
def test_bodies_without_a_place_for_it_are_answered(http: httpx.Client, path: str, body: Any) -> None:
    assert "yes" in str(post(http, path, **body)) or "no" in str(post(http, path, **body))


def test_a_hugging_face_body_is_answered(http: httpx.Client) -> None:
    headers = {"X-Amzn-SageMaker-Target-Model": "task1"}
    response = http.post("/invocations", json={"inputs": TEXT}, headers=headers)
    assert response.status_code == 200 and response.json()[0]["label"] in ("yes", "no"), response.text


def test_python_tells_the_same_over_http_and_in_process(server: serving.Server, bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex, Client(server.url) as client:
        for api in (loraplex, client):
            verdicts = api.classify(TEXT, ["task0", "task1"]).verdicts
            assert [one.skipped_by for one in verdicts] == [None, "task0"]
            assert api.classify(TEXT, "task1", cascade=False)["task1"].label is not None
            answers = api.decide(TEXT, PREDICATES).answers
            assert [one.skipped_by for one in answers.values()] == [None, "task0", None]
            assert answers["task1"].error is None and answers["task1"].probability is None
            assert api.decide(TEXT, PREDICATES, cascade=False)["task1"].probability is not None
        [result] = client.classify_many([TEXT], ["task1"], cascade=False)
        assert result["task1"].label is not None
        loraplex.run(loraplex.router.delete_route("gate"))
        loraplex.unload_adapter("task0")
        assert "gate_failed" in str(loraplex.classify(TEXT, "task1")["task1"].warnings)


def test_a_server_starts_again_after_its_gate_was_unloaded(tiny_bundle: Path, tmp_path: Path) -> None:
    folder, state = tmp_path / "bundle", tmp_path / "state"
    folder.mkdir()
    with_settings(tiny_bundle, folder, GATES)
    (folder / "loraplex.yaml").write_text(yaml.safe_dump({"classifiers": {"task1": GATES["task1"]}}))
    with Loraplex.load(folder, dtype="float32", state_dir=str(state)) as loraplex:
        assert loraplex.classify(TEXT, "task1")["task1"].skipped_by == "task0"
        loraplex.unload_adapter("task0")
    with Loraplex.load(folder, dtype="float32", state_dir=str(state)) as loraplex:
        assert "gate_failed" in str(loraplex.classify(TEXT, "task1")["task1"].warnings)


def test_the_second_pass_does_not_compute_the_conversation_again(tmp_path: Path) -> None:
    tiny.save_shared_bundle(tmp_path)
    (tmp_path / "loraplex.yaml").write_text(
        yaml.safe_dump(
            {"classifiers": {"active2": {"when": {"classifier": "active0", "label": "yes", "at_least": ALWAYS}}}}
        )
    )
    with Loraplex.load(tmp_path, dtype="float32", kv_cache="2MiB") as loraplex:
        text = "\n".join([TEXT] * 12)
        gated = loraplex.classify(text, ["active0", "active1", "active2"]).usage
        alone = loraplex.classify(text[1:], ["active0", "active1", "active2"], cascade=False).usage
        assert abs(gated.prompt_tokens - alone.prompt_tokens) < 10 and alone.prompt_tokens > 3 * 100
        assert gated.computed_tokens < alone.computed_tokens + 2 * BLOCK


def test_a_gate_that_leads_nowhere_is_said_before_the_base_is_loaded(tiny_bundle: Path, tmp_path: Path) -> None:
    for classifiers, mentions in (
        ({"task1": {"when": {**GATES["task1"]["when"], "classifier": "nope"}}}, "classifiers.task1.when.classifier"),
        ({"task1": {"when": {**GATES["task1"]["when"], "label": "maybe"}}}, "'maybe' is no label of 'task0'"),
        ({"task1": {"when": {**GATES["task1"]["when"], "label": True}}}, "quote"),
        ({"task0": GATES["task1"]}, "task0 -> task0"),
    ):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        run = serving.loraplex("serve", with_settings(tiny_bundle, folder, classifiers), "--port", 0)
        assert run.returncode == 1 and mentions in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_the_command_line_tells_it_too(bundle: Path) -> None:
    arguments = ("classify", bundle, "-c", "task1", "--dtype", "float32", "--text", TEXT)
    run = serving.loraplex(*arguments)
    assert run.returncode == 0 and "skipped" in run.stdout and "task0" in run.stdout, run.stdout + run.stderr
    run = serving.loraplex(*arguments, "--no-cascade")
    assert run.returncode == 0 and "skipped" not in run.stdout
