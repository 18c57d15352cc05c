"""POST /v1/decisions and /v1/systemone, by a real client against a real server."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving
import tiny
from asked import WRONG, assert_refused, assert_same
from loraplex import AsyncClient, Client, Loraplex, Question
from loraplex.decisions import choice_confidence, score_confidence
from loraplex.errors import InvalidRequestError, UnknownClassifierError

TEXT = "Customer: hello\nAgent: at what time?"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "at what time?"}]
JSON = {"Content-Type": "application/json"}
TOPICS, LEVELS = ("table", "payment", "hello"), ("seven", "thanks", "done")
CONTRACTS: dict[str, dict[str, Any]] = {
    "topic": {"labels": TOPICS, "descriptions": {"table": "wants to book"}},
    "anger": {"type": "score", "labels": LEVELS},
    "unsure": {"abstain_below": 1.0},
    "eager": {"threshold": 0.0},
    "flag": {"type": "choice", "labels": ("true", "false")},
    "withTools": {"roles": {"user": "Customer", "assistant": "Agent", "tool": "Tool", "system": None}},
    "broken": {},
    "spaced": {"labels": (" hello", " table", " payment")},
}
PREDICATE = {"type": "predicate", "name": "task0", "instructions": "Is it done?"}
TOPIC: dict[str, Any] = {"type": "choice", "name": "topic", "instructions": "Is it done?"}
TOPIC |= {"choices": [{"value": one} for one in ("hello", "table", "payment")]}
ANGER = {"type": "score", "name": "anger", "instructions": "Is it done?", "levels": [{"label": one} for one in LEVELS]}
NOULS = {
    "task0": {"type": "noul"},
    "topic": {"type": "choice", "criteria": dict.fromkeys(("hello", "table", "payment"))},
    "anger": {"type": "score", "criteria": [*LEVELS]},
}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("decisions") / "bundle")
    for seed, (name, contract) in enumerate(CONTRACTS.items(), 20):
        contract = {key: list(value) if isinstance(value, tuple) else value for key, value in contract.items()}
        tiny.save_adapter(folder, folder / name, contract={**tiny.CONTRACT, **contract}, seed=seed)
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


def post(http: httpx.Client, path: str, body: Any, status: int = 200, headers: Any = None) -> Any:
    response = http.post(path, content=json.dumps(body), headers=JSON | (headers or {}))
    assert response.status_code == status, response.text
    return response.json()


def decisions(http: httpx.Client, *questions: Any, **body: Any) -> list[Any]:
    answer = post(http, "/v1/decisions", {"model": "*", "input": TEXT, "questions": questions, **body})
    return list(answer["answers"])


def systemone(http: httpx.Client, questions: Any, **body: Any) -> dict[str, Any]:
    return dict(post(http, "/v1/systemone", {"state": TEXT, "questions": questions, **body})["answers"])


def scores(http: httpx.Client, name: str) -> dict[str, float]:
    [verdict] = post(http, "/v1/classify", {"input": TEXT, "classifiers": name})["verdicts"]
    return dict(verdict["scores"])


# ------------------------------------------------------------------------------------------- answers


def test_each_question_is_answered_by_its_own_classifier(http: httpx.Client) -> None:
    predicate, topic, anger = decisions(http, PREDICATE, TOPIC, ANGER)
    found = scores(http, "task0")
    assert predicate["probability"] == pytest.approx(found["yes"], abs=1e-4)
    assert predicate["name"] == "task0" and predicate["x_adapter"]["name"] == "task0"
    found = scores(http, "topic")
    listed = {one["value"]: one["probability"] for one in topic["probabilities"]}
    assert list(listed) == ["hello", "table", "payment"] and listed == pytest.approx(found, abs=1e-4)
    assert topic["choice"] == max(found, key=found.__getitem__)
    assert topic["confidence"] == pytest.approx(choice_confidence([*listed.values()]))
    levels = [scores(http, "anger")[label] for label in LEVELS]
    assert [one["probability"] for one in anger["probabilities"]] == pytest.approx(levels, abs=1e-4)
    assert [(one["value"], one["label"]) for one in anger["probabilities"]] == [*enumerate(LEVELS)]
    assert anger["score"] == pytest.approx(levels[1] + 2 * levels[2], abs=1e-4)
    assert anger["confidence"] == pytest.approx(score_confidence(levels), abs=1e-4)


def test_systemone_answers_the_same_in_its_own_shape(http: httpx.Client) -> None:
    predicate, topic, anger = decisions(http, PREDICATE, TOPIC, ANGER)
    answer = post(http, "/v1/systemone", {"model": "jev-latest", "state": TURNS, "questions": NOULS})
    answers = answer["answers"]
    assert answers["task0"]["noul"] == pytest.approx(predicate["probability"], abs=1e-4)
    assert answers["topic"]["choice"] == topic["choice"] and next(iter(answers["topic"]["probabilities"])) == "hello"
    assert answers["anger"]["score"] == pytest.approx(anger["score"], abs=1e-4)
    assert answers["anger"]["legend"] == {"0": "seven", "1": "thanks", "2": "done"}
    assert list(answers["anger"]["probabilities"]) == ["0", "1", "2"]
    assert answer["usage"]["output_tokens"] == 0 and answer["usage"]["input_tokens"] > 0
    assert answer["diagnostics"].keys() == NOULS.keys()


def test_the_verdict_of_a_score_has_its_expected_level(http: httpx.Client) -> None:
    topic, anger = post(http, "/v1/classify", {"input": TEXT, "classifiers": ["topic", "anger"]})["verdicts"]
    assert anger["score"] == pytest.approx(anger["scores"]["thanks"] + 2 * anger["scores"]["done"])
    assert "score" not in topic


def test_other_questions_and_their_order_move_no_answer(http: httpx.Client) -> None:
    alone = [decisions(http, one)[0] for one in (PREDICATE, TOPIC, ANGER)]
    together = decisions(http, ANGER, {**PREDICATE, "name": "task1"}, TOPIC, PREDICATE)
    for one, other in zip(alone, (together[3], together[2], together[0]), strict=True):
        for key in ("probability", "confidence", "score", "choice"):
            assert one.get(key) == (other.get(key) if key == "choice" else pytest.approx(other.get(key), abs=1e-4))


def test_a_classifier_as_the_model_answers_every_question(http: httpx.Client) -> None:
    named, unnamed = {**PREDICATE, "name": "whatever"}, {"type": "predicate", "instructions": "Is it done?"}
    one, other = decisions(http, named, unnamed, model="task1")
    assert one["probability"] == other["probability"] == pytest.approx(scores(http, "task1")["yes"], abs=1e-4)
    assert (one["name"], other["name"]) == ("whatever", None)
    assert systemone(http, {"with space 🎯": {"type": "noul"}}, model="task1").keys() == {"with space 🎯"}


def test_equal_names_are_answered_each_in_its_own_order(http: httpx.Client) -> None:
    other = {**TOPIC, "choices": TOPIC["choices"][::-1]}
    first, second = decisions(http, TOPIC, other)
    assert [one["value"] for one in second["probabilities"]] == [one["value"] for one in first["probabilities"]][::-1]
    assert first["choice"] == second["choice"]


def test_a_space_at_a_labels_end_does_not_matter_and_the_request_spells_the_answer(http: httpx.Client) -> None:
    [answer] = decisions(http, {**TOPIC, "name": "spaced"})
    assert [one["value"] for one in answer["probabilities"]] == ["hello", "table", "payment"]
    assert answer["choice"] in TOPICS and answer["x_label"] in TOPICS


def test_true_is_a_choice_and_comes_back_as_true(http: httpx.Client) -> None:
    question = {"type": "choice", "name": "flag", "instructions": "Is it done?"}
    [answer] = decisions(http, {**question, "choices": [{"value": False}, {"value": True}]})
    assert answer["choice"] in (True, False) and [one["value"] for one in answer["probabilities"]] == [False, True]
    body = {"model": "*", "input": TEXT, "questions": [{**question, "choices": [{"value": True}, {"value": "true"}]}]}
    assert "two of 'true', 'true'" in post(http, "/v1/decisions", body, 422)["error"]["message"]


def test_a_threshold_shows_in_the_label_alone(http: httpx.Client) -> None:
    [answer] = decisions(http, {**PREDICATE, "name": "eager"})
    assert answer["x_label"] == "yes" and answer["probability"] == pytest.approx(scores(http, "eager")["yes"], abs=1e-4)


def test_an_abstention_is_a_refusal_where_there_are_refusals(http: httpx.Client) -> None:
    refusal, answered = decisions(http, {**PREDICATE, "name": "unsure"}, PREDICATE)
    assert (refusal["type"], refusal["name"], answered["type"]) == ("refusal", "unsure", "predicate")
    assert refusal["x_label"] in refusal["x_scores"] and "x_error" not in refusal
    answer = systemone(http, {"unsure": {"type": "noul"}})["unsure"]
    assert answer["x_abstained"] is True and answer["noul"] == pytest.approx(refusal["x_scores"]["yes"], abs=1e-4)


def test_a_classifier_that_fails_is_a_refusal_or_the_whole_systemone_request(http: httpx.Client) -> None:
    refusal, answered = decisions(http, {**PREDICATE, "name": "broken"}, PREDICATE)
    assert (refusal["type"], refusal["x_error"]["code"], answered["type"]) == ("refusal", "adapter_error", "predicate")
    body = {"state": TEXT, "questions": {"task0": {"type": "noul"}, "broken": {"type": "noul"}}}
    error = post(http, "/v1/systemone", body, 500)["error"]
    assert error["code"] == "adapter_error" and error["message"].startswith("'broken': ")


def test_usage_is_the_same_when_it_is_asked_again(http: httpx.Client) -> None:
    body = {"model": "*", "input": TEXT * 3, "questions": [PREDICATE], "conversation_id": "usage"}
    first, second = (post(http, "/v1/decisions", body)["usage"] for _ in range(2))
    assert first["input_tokens"] == second["input_tokens"] == first["total_tokens"]
    assert second["input_tokens_details"]["cached_tokens"] > 0


def test_json_is_judged_as_its_text(http: httpx.Client) -> None:
    state = {"subject": "table", "n": [1, 2.5, None]}
    text = json.dumps(state, separators=(",", ":"))
    one = systemone(http, {"task0": {"type": "noul"}}, state=state)["task0"]["noul"]
    assert one == pytest.approx(systemone(http, {"task0": {"type": "noul"}}, state=text)["task0"]["noul"], abs=1e-4)


def test_tool_items_are_turns_where_the_contract_names_them(http: httpx.Client) -> None:
    items: list[Any] = [
        {"role": "system", "content": "Be kind."},
        *TURNS,
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "a table"},
    ]
    [answer] = decisions(http, {**PREDICATE, "name": "withTools"}, input=items)
    said = [*TURNS, {"role": "tool", "content": "a table"}]
    [same] = decisions(http, {**PREDICATE, "name": "withTools"}, input=said)
    assert answer["probability"] == pytest.approx(same["probability"], abs=1e-4)
    body: dict[str, Any] = {"model": "*", "input": items, "questions": [PREDICATE]}
    assert post(http, "/v1/decisions", body, 422)["error"]["param"] == "input.0"
    body = {"model": "*", "input": items[1:], "questions": [PREDICATE], "roles": {"tool": None}}
    assert post(http, "/v1/decisions", body)["answers"][0]["type"] == "predicate"


def test_other_words_are_warned_of_and_the_contracts_are_used(http: httpx.Client) -> None:
    [same] = decisions(http, {**PREDICATE, "instructions": " Is it\ndone? "})
    [other] = decisions(http, {**PREDICATE, "instructions": "Is all well?"})
    assert other["probability"] == pytest.approx(same["probability"], abs=1e-4)
    assert not any("not_used" in one for one in same["x_warnings"])
    assert any(one.startswith("instructions_not_used: ") and "'Is it done?'" in one for one in other["x_warnings"])
    described = {"type": "choice", "criteria": {"table": "wants to book", "payment": {"a": 1}, "hello": None}}
    warnings = systemone(http, {"topic": described})["topic"]["x_warnings"]
    assert next(one for one in warnings if "descriptions_not_used" in one).endswith("its own meaning of 'payment'")


# ------------------------------------------------------------------------------------------- the same service


def test_routes_shadows_and_feedback(http: httpx.Client) -> None:
    http.put("/v1/routes/done", json={"targets": {"task0": 1}, "shadows": ["task1"]}).raise_for_status()
    try:
        [answer] = decisions(http, {**PREDICATE, "name": "done"})
        assert answer["x_adapter"]["name"] == "task0"
        for _ in range(200):  # the shadow answers after the route
            stats = http.get("/v1/routes/done/stats").json()
            if len(stats["targets"]) == 2:
                break
            time.sleep(0.05)
        assert [(one["target"], one["role"]) for one in stats["targets"]] == [("task0", "primary"), ("task1", "shadow")]
        assert [one["num_verdicts"] for one in stats["targets"]] == [1, 1]
        feedback = post(http, "/v1/feedback", {"verdict_id": answer["x_verdict_id"], "label": "yes"})
        assert feedback["num_answers"] == 2
        assert decisions(http, {**PREDICATE, "name": "x"}, model="done")[0]["name"] == "x"
    finally:
        http.delete("/v1/routes/done").raise_for_status()


def test_a_route_whose_targets_have_other_labels_is_refused(http: httpx.Client) -> None:
    http.put("/v1/routes/mixed", json={"targets": {"topic": 1, "anger": 1}}).raise_for_status()
    try:
        body = {"model": "*", "input": TEXT, "questions": [{**TOPIC, "name": "mixed"}]}
        error = post(http, "/v1/decisions", body, 422)["error"]
        assert "the targets of the route 'mixed' have different labels" in error["message"]
        assert "'topic'" in error["message"] and "'anger'" in error["message"] and error["param"] == "questions.0"
    finally:
        http.delete("/v1/routes/mixed").raise_for_status()


def test_metrics_count_the_answers(http: httpx.Client) -> None:
    def count() -> float:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.split()[-1]) for line in lines if 'classifier="task2"' in line and '"ok"' in line)

    name = "loraplex_classifications_total"
    before = count()
    decisions(http, {**PREDICATE, "name": "task2"})
    assert count() == before + 1


def test_sagemaker_takes_both_bodies(http: httpx.Client) -> None:
    expected = scores(http, "task1")["yes"]
    for path in ("/invocations", "/endpoints/any/invocations"):
        answer = post(http, path, {"model": "task1", "input": TEXT, "questions": [PREDICATE]})
        assert answer["answers"][0]["probability"] == pytest.approx(expected, abs=1e-4)
        header = {"X-Amzn-SageMaker-Adapter-Identifier": "task1"}
        answer = post(http, path, {"state": TEXT, "questions": {"x": {"type": "noul"}}}, headers=header)
        assert answer["answers"]["x"]["noul"] == pytest.approx(expected, abs=1e-4)
        answer = post(http, path, {"input": TEXT, "questions": [PREDICATE]}, headers=header)
        assert answer["answers"][0]["probability"] == pytest.approx(expected, abs=1e-4)
    assert "answers" in post(http, "/invocations", {"state": TEXT, "questions": {"task0": {"type": "noul"}}})


def test_a_header_names_the_adapter_where_the_body_has_an_alias(http: httpx.Client) -> None:
    expected = scores(http, "task1")["yes"]
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "task1"}
    for model in ("jev-latest", "*"):
        body = {"model": model, "state": TEXT, "questions": {"x": {"type": "noul"}}}
        answer = post(http, "/invocations", body, headers=header)
        assert answer["answers"]["x"]["noul"] == pytest.approx(expected, abs=1e-4)
    body = {"model": "task2", "state": TEXT, "questions": {"x": {"type": "noul"}}}
    answer = post(http, "/invocations", body, headers=header)
    assert answer["answers"]["x"]["x_adapter"]["name"] == "task2", "a classifier in the body comes first"


def test_errors_of_typed_invocations_have_their_clients_shape(http: httpx.Client) -> None:
    error = post(http, "/invocations", {"input": TEXT, "questions": [{**PREDICATE, "name": "nope"}]}, 404)["error"]
    assert error["type"] == "not_found_error" and error["param"] is None
    answer = post(http, "/invocations", {"questions": {"task0": {"type": "noul"}}}, 422)
    assert answer["error"]["message"] == "state: is missing" and answer["error"]["param"] == "state"
    assert answer["detail"][0]["loc"] == ["body", "state"]


def test_models_are_listed_for_typesafes_client_too(http: httpx.Client) -> None:
    answer = http.get("/v1/models").json()
    assert [one["name"] for one in answer["models"]] == [one["id"] for one in answer["data"]]
    assert all(one["description"] and len(one["release_date"]) == 10 for one in answer["models"])


# ------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("questions", "more", "status", "mentions"),
    [
        ([], {}, 422, "questions"),
        ([PREDICATE] * 401, {}, 422, "questions"),
        ([{**PREDICATE, "name": "nope"}], {}, 404, "'nope'"),
        ([{"type": "predicate", "instructions": "x"}], {}, 422, "questions.0.name: is missing"),
        ([PREDICATE], {"model": "nope"}, 404, "'nope'"),
        ([PREDICATE], {"model": 123}, 422, "model: 123 is not text"),
        ([{**PREDICATE, "name": "verbatim"}], {}, 422, "'verbatim' has no labels"),
        ([{**PREDICATE, "name": "topic"}], {}, 422, "questions.0.type: 'topic' is a choice"),
        ([{**PREDICATE, "name": "flag"}], {}, 422, "'flag' is a choice"),
        ([{**PREDICATE, "type": "yes_no"}], {}, 422, "predicate, choice or score"),
        ([{"type": "predicate", "name": "task0"}], {}, 422, "questions.0.instructions"),
        ([{**PREDICATE, "shuffle": 1}], {}, 422, "'questions.0.shuffle'"),
        ([{**PREDICATE, "x_labels": ["a", "a "]}], {}, 422, "questions.0.x_labels"),
        ([PREDICATE, {**TOPIC, "choices": [{"value": "a"}, {"value": "b"}]}], {}, 422, "questions.1.choices: 'a', 'b'"),
        ([{**TOPIC, "choices": [{"value": "a"}]}], {}, 422, "too few"),
        ([{**TOPIC, "choices": [{"value": str(i)} for i in range(255)]}], {}, 422, "are not the labels"),
        ([{**TOPIC, "choices": [{"value": str(i)} for i in range(256)]}], {}, 422, "too many"),
        ([{**TOPIC, "choices": [{"value": 1}, {"value": 2}]}], {}, 422, "text, true or false"),
        ([{**ANGER, "levels": [{"label": "a"}, {"label": "a"}]}], {}, 422, "same label"),
        ([PREDICATE], {"input": ""}, 422, "empty"),
        ([PREDICATE], {"input": []}, 422, "empty"),
        ([PREDICATE], {"input": 5}, 422, "input: 5 is not text or a list"),
        ([PREDICATE], {"input": "\ud800"}, 422, "Unicode"),
        ([{**PREDICATE, "name": "\ud800"}], {}, 422, "Unicode"),
        ([{**PREDICATE, "name": "\ud800"}], {"model": "task0"}, 422, "Unicode"),
        ([{**PREDICATE, "instructions": "\ud800"}], {}, 422, "Unicode"),
        ([PREDICATE], {"input": [{"role": "robot", "content": "x"}]}, 422, "input.0: unknown role 'robot'"),
        ([PREDICATE], {"chat_template_kwargs": {}}, 422, "chat_template_kwargs"),
        ([PREDICATE], {"stream": True}, 422, "stream"),
        ([PREDICATE], {"deadline_ms": 0.0001}, 504, "deadline"),
        ([PREDICATE], {"deadline_ms": "5"}, 422, "deadline_ms: '5' is not a number"),
        ([PREDICATE], {"cascade": "no"}, 422, "cascade: 'no' is not true or false"),
        ([{**PREDICATE, "choices": []}], {}, 422, "unknown field 'questions.0.choices': a predicate has none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_decision_is_named(http: httpx.Client, questions: Any, more: Any, status: int, mentions: str) -> None:
    body = {"model": "*", "input": TEXT, "questions": questions, **more}
    answer = post(http, "/v1/decisions", body, status)
    error = answer["error"]
    assert mentions in error["message"] and error["remedy"] and error["type"] and "param" in error
    assert answer.keys() == {"error"}


@pytest.mark.parametrize(
    ("questions", "more", "status", "mentions"),
    [
        ({}, {}, 422, "questions"),
        ({"": {"type": "noul"}}, {}, 422, "questions"),
        ({"nope": {"type": "noul"}}, {}, 404, "'nope'"),
        ({"task0": {"type": "boolean"}}, {}, 422, "noul, choice or score"),
        ({"task0": {"type": "box"}}, {}, 422, "noul, choice or score"),
        ({"task0": {"instructions": "x"}}, {}, 422, "noul, choice or score"),
        ({"task0": {"type": "noul", "criteria": {"yes": "x"}}}, {}, 422, "'questions.task0.criteria.yes'"),
        ({"topic": {"type": "choice", "criteria": {}}}, {}, 422, "questions.topic.criteria"),
        ({"topic": {"type": "choice", "criteria": {"a": None, "b": None}}}, {}, 422, "are not the labels of 'topic'"),
        ({"anger": {"type": "score", "criteria": {"0": "calm"}}}, {}, 422, "questions.anger.criteria"),
        ({"anger": {"type": "score", "criteria": ["calm", None]}}, {}, 422, "questions.anger.criteria.1"),
        ({"task0": {"type": "noul"}}, {"state": None}, 422, "state: null is not text"),
        ({"task0": {"type": "noul"}}, {"state": {}}, 422, "empty"),
        ({"task0": {"type": "noul"}}, {"state": {"a": "\ud800"}}, 422, "Unicode"),
        ({"task0": {"type": "noul"}}, {"state": [{"role": "user", "content": 5}]}, 422, "state.0.content"),
        ({"task0": {"type": "noul"}}, {"seed": 7}, 422, "unknown field 'seed'"),
        ({"task0": {"type": "noul"}}, {"images": []}, 422, "unknown field 'images'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_systemone_request_is_named_in_both_shapes(
    http: httpx.Client, questions: Any, more: Any, status: int, mentions: str
) -> None:
    answer = post(http, "/v1/systemone", {"state": TEXT, "questions": questions, **more}, status)
    assert mentions in answer["error"]["message"] and answer["error"]["remedy"]
    if status == 422:
        [detail] = answer["detail"]
        assert detail["loc"][0] == "body" and detail["msg"] == answer["error"]["message"]
    else:
        assert answer["detail"] == {"error_type": "not_found_error", "message": answer["error"]["message"]}


def test_a_role_that_is_no_unicode_is_refused_everywhere(http: httpx.Client) -> None:
    turns = [{"role": "\ud800", "content": "x"}]
    bodies = {
        "/v1/decisions": {"model": "*", "input": turns, "questions": [PREDICATE]},
        "/v1/systemone": {"state": turns, "questions": NOULS},
        "/v1/classify": {"input": turns, "classifiers": ["task0"]},
    }
    for path, body in bodies.items():
        error = post(http, path, body, 422)["error"]
        assert "\\ud800" in error["message"] and error["remedy"].encode()


def test_errors_name_the_place_in_the_request(http: httpx.Client) -> None:
    robot = [*TURNS, {"role": "robot", "content": "x"}]
    data = {"type": "input_json", "data": {"messages": TURNS}}
    places: list[tuple[str, Any, list[str]]] = [
        ("systemone", {"state": {"messages": robot}, "questions": NOULS}, ["state", "messages", "2"]),
        ("systemone", {"state": [{"role": "user"}], "questions": NOULS}, ["state", "0", "content"]),
        ("systemone", {"state": {"messages": TURNS, "x": 1}, "questions": NOULS}, ["state", "x"]),
        ("systemone", {"state": TEXT, "questions": {"a.b": {"type": "noul", "x": 1}}}, ["questions", "a.b", "x"]),
        (
            "systemone",
            {"model": "topic", "state": TEXT, "questions": {"a.b": NOULS["anger"]}},
            ["questions", "a.b", "criteria"],
        ),
        ("decisions", {"input": [{"role": "user", "content": [data]}, robot[2]]}, ["input", "1"]),
        ("decisions", {"input": [{"type": "reasoning"}]}, ["input", "0", "type"]),
    ]
    for path, body, place in places:
        if path == "decisions":
            body = {"model": "*", "questions": [PREDICATE], **body}
        answer = post(http, f"/v1/{path}", body, 422)
        assert answer["error"]["param"] == ".".join(place), answer
        assert path == "decisions" or answer["detail"][0]["loc"] == ["body", *place]


def test_a_route_is_meant_too_where_a_name_is_not_known(http: httpx.Client) -> None:
    http.put("/v1/routes/isSolved", json={"targets": {"task0": 1}}).raise_for_status()
    try:
        body = {"model": "*", "input": TEXT, "questions": [{**PREDICATE, "name": "isSolve"}]}
        error = post(http, "/v1/decisions", body, 404)["error"]
        assert "did you mean isSolved for isSolve?" in error["remedy"] and "--adhoc-questions" in error["remedy"]
        error = post(http, "/v1/decisions", {**body, "model": "gpt-9"}, 404)["error"]
        assert "'*'" in error["remedy"] and "'jev-latest'" in error["remedy"] and "isSolved" in error["remedy"]
    finally:
        http.delete("/v1/routes/isSolved").raise_for_status()


def test_numbers_that_json_does_not_have_are_refused(http: httpx.Client) -> None:
    for number, status in (("NaN", 400), ("1e999", 422)):
        content = f'{{"state": {{"a": {number}}}, "questions": {{"task0": {{"type": "noul"}}}}}}'
        response = http.post("/v1/systemone", content=content, headers=JSON)
        assert response.status_code == status and "detail" in response.json(), response.text


def test_what_clients_send_and_changes_nothing_is_taken(http: httpx.Client) -> None:
    neutral = {"prompt_cache_key": "k", "safety_identifier": "s", "temperature": 0.0, "x_trace": 1, "stream": False}
    neutral["prompt_cache_options"] = {"mode": "implicit", "ttl": "30m"}
    part = {"type": "input_text", "text": "hello", "prompt_cache_breakpoint": {"mode": "explicit"}}
    items = [{"role": "user", "content": [part]}]
    assert decisions(http, PREDICATE, input=items, **neutral)[0]["type"] == "predicate"


def test_both_names_of_the_requests_id(http: httpx.Client) -> None:
    for body, status in (({"state": TEXT, "questions": NOULS}, 200), ({}, 422)):
        response = http.post("/v1/systemone", json=body, headers={"X-Request-ID": "mine"})
        assert response.status_code == status
        assert response.headers["X-Request-ID"] == response.headers["X-TypeSafe-Request-ID"] == "mine"


# ------------------------------------------------------------------------------------------- options


@pytest.fixture(scope="module")
def strict(bundle: Path) -> Iterator[httpx.Client]:
    options = ("--decisions-instructions", "strict", "--decisions-alias", "mine", "--adhoc-questions")
    with serving.serve(bundle, "--dtype", "float32", *options) as server, serving.client(server) as client:
        yield client


def test_strict_refuses_other_words(strict: httpx.Client) -> None:
    assert decisions(strict, PREDICATE)[0]["type"] == "predicate"
    body = {"model": "mine", "input": TEXT, "questions": [{**PREDICATE, "instructions": "Is all well?"}]}
    error = post(strict, "/v1/decisions", body, 422)["error"]
    assert error["param"] == "questions.0.instructions" and "'Is it done?'" in error["message"]
    questions = {"topic": {"type": "choice", "criteria": {"table": "eats", "payment": None, "hello": None}}}
    error = post(strict, "/v1/systemone", {"state": TEXT, "questions": questions}, 422)["error"]
    assert error["param"] == "questions.topic.criteria" and "'wants to book'" in error["message"]


def test_an_alias_with_the_name_of_a_classifier_ends_the_start(bundle: Path) -> None:
    for alias, told in (("task0", "is the name of a classifier or a route"), ("", "decisions-alias")):
        run = serving.loraplex("serve", bundle, "--port", "0", "--preload", "none", "--decisions-alias", alias)
        assert run.returncode != 0 and told in run.stderr, run.stderr


def test_aliases_are_those_that_are_configured(strict: httpx.Client) -> None:
    assert decisions(strict, PREDICATE, model="mine")[0]["type"] == "predicate"
    post(strict, "/v1/decisions", {"model": "gpt-6-luna", "input": TEXT, "questions": [PREDICATE]}, 404)


def test_a_question_without_an_adapter_says_so(strict: httpx.Client) -> None:
    adhoc = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}
    trained, unnamed, named = decisions(strict, PREDICATE, adhoc, {**adhoc, "name": "task9"})
    assert trained["x_adapter"]["name"] == "task0" and unnamed["x_adapter"] is named["x_adapter"] is None
    assert unnamed["choice"] in ("a", "b") and unnamed["name"] is None
    assert [one["probability"] for one in unnamed["probabilities"]] == pytest.approx(
        [one["probability"] for one in named["probabilities"]], abs=1e-4
    )


# ------------------------------------------------------------------------------------------- Python

QUESTIONS = {
    "task0": Question(type="predicate", instructions="Is it done?"),
    "topic": Question(type="choice", instructions="Is it done?", labels=("hello", "table", "payment")),
    "anger": Question(type="score", instructions="", labels=LEVELS),
    "unsure": Question(type="predicate", instructions="Is it done?"),
    "task1": Question(type="predicate", instructions="Is it done?", labels=("no", "yes")),
    "eager": Question(type="predicate", instructions="", labels=("done", "open"), descriptions={"open": "unpaid"}),
    "broken": Question(type="predicate", instructions="Is it done?"),
}


def test_python_answers_the_same_over_http_and_in_process(server: serving.Server, bundle: Path) -> None:
    with Client(server.url) as client, Loraplex.load(bundle, dtype="float32", preload="none") as loraplex:
        remote = client.decide(TURNS, QUESTIONS)
        assert_same(remote, loraplex.decide(TURNS, QUESTIONS))
        assert remote["unsure"].abstained and remote["broken"].error is not None
        for name in ("task0", "topic", "eager"):
            assert (remote[name].scores or {})[remote[name].label or ""] > 0
        assert list(remote["topic"].scores or {}) == list(TOPICS)  # the contract's order
        for wrong, told in WRONG.values():
            for asked in (client, loraplex):
                assert_refused(asked, wrong, told)
        for asked in (client, loraplex):
            with pytest.raises(UnknownClassifierError):
                asked.decide(TEXT, {"nope": Question(type="predicate", instructions="x")})
            with pytest.raises(InvalidRequestError, match="are not the labels"):
                asked.decide({"a": 1}, {"topic": Question(type="choice", instructions="x", labels=("a", "b"))})


@pytest.mark.anyio
async def test_the_async_client_asks_the_same(server: serving.Server) -> None:
    async with AsyncClient(server.url) as client:
        decided = await client.decide(TEXT, {"x": Question(type="predicate", instructions="Is it done?")}, "task1")
    assert decided["x"].probability is not None and decided["x"].verdict_id is not None
