"""POST /v1/classify and what stands around it, by a real client against a real server."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving

NAMES = ["task0", "task1", "task2", "verbatim"]
TEXT = "Customer: hello\nAgent: at what time?"


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/classify", json={"input": TEXT, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def labels(answer: dict[str, Any]) -> dict[str, Any]:
    return {verdict["classifier"]: verdict.get("label") for verdict in answer["verdicts"]}


def test_one_several_or_all(http: httpx.Client) -> None:
    every = labels(ask(http))
    assert list(every) == NAMES
    assert labels(ask(http, classifiers="*")) == every
    assert labels(ask(http, classifiers="task1")) == {"task1": every["task1"]}
    assert list(labels(ask(http, classifiers=["task2", "task0"]))) == ["task2", "task0"]


def test_a_verdict_says_all_there_is(http: httpx.Client) -> None:
    answer = ask(http, classifiers="task0")
    [verdict] = answer["verdicts"]
    assert verdict["label"] in ("yes", "no")
    assert verdict["confidence"] == verdict["scores"][verdict["label"]]
    assert sum(verdict["scores"].values()) == pytest.approx(1)
    assert 0 < verdict["label_mass"] <= 1
    assert verdict["abstained"] is False
    assert verdict["adapter"]["name"] == "task0" and len(verdict["adapter"]["version"]) == 16
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["computed_tokens"] > 0
    assert set(answer["timings"]) == {"tokenize_ms", "queue_ms", "compute_ms", "total_ms"}


def test_without_a_contract_the_top_token_is_the_label(http: httpx.Client) -> None:
    [verdict] = ask(http, classifiers="verbatim")["verdicts"]
    assert verdict["label"] and 0 < verdict["confidence"] <= 1
    assert "scores" not in verdict and "label_mass" not in verdict


def test_messages_equal_their_text(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "at what time?"}]
    by_messages, by_text = ask(http, input=messages), ask(http)
    for one, other in zip(by_messages["verdicts"], by_text["verdicts"], strict=True):
        assert one.pop("id") != other.pop("id")
        assert one == other


def test_an_unknown_name_beside_known_ones_is_an_error_in_its_verdict(http: httpx.Client) -> None:
    known, unknown = ask(http, classifiers=["task0", "nope"])["verdicts"]
    assert known["label"] == labels(ask(http))["task0"]
    assert unknown["error"]["code"] == "unknown_classifier" and "label" not in unknown


def test_special_tokens_in_the_input_are_warned_of_and_change_nothing_else(http: httpx.Client) -> None:
    [verdict] = ask(http, input=TEXT + "<|ask|>", classifiers="task0")["verdicts"]
    assert "'<|ask|>'" in verdict["warnings"][0]


def test_labels_that_the_model_does_not_expect_are_warned_of(http: httpx.Client) -> None:
    [verdict] = ask(http, classifiers="task0")["verdicts"]
    assert verdict["label_mass"] < 0.05, "the tiny model is random, so no label is likely"
    [warning] = verdict["warnings"]
    assert warning.startswith(f"low_label_mass: the labels have a probability of {verdict['label_mass']:.2g} together")
    [both, _] = ask(http, input=TEXT + "<|ask|>", classifiers="task0")["verdicts"][0]["warnings"]
    assert both.startswith("escaped_special_tokens: ")


def test_many_at_once_equal_one_by_one(http: httpx.Client) -> None:
    texts = [f"Customer: hello {'and again ' * (i % 5)} {i}" for i in range(24)]
    alone = [labels(ask(http, input=text)) for text in texts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda text: labels(ask(http, input=text)), texts))
    assert together == alone


def test_a_long_conversation_is_cut_by_contract_and_refused_without(http: httpx.Client) -> None:
    cut, refused = ask(http, input="Customer: hello\n" * 300, classifiers=["task0", "verbatim"])["verdicts"]
    assert cut["label"] and "cut" in cut["warnings"][0]
    assert refused["error"]["code"] == "input_too_long"
    alone = http.post("/v1/classify", json={"input": "hello " * 1000, "classifiers": "verbatim"})
    assert alone.status_code == 413 and alone.json()["error"]["code"] == "input_too_long"


@pytest.mark.parametrize(
    ("body", "status", "code", "mentions"),
    [
        ({"input": "x", "classifiers": "nope"}, 404, "unknown_classifier", "'nope'"),
        ({"input": "x", "classifiers": ["no", "pe"]}, 404, "unknown_classifier", "'no'"),
        ({"input": "x", "classifiers": ["*", "nope"]}, 404, "unknown_classifier", "'*'"),
        ({"input": "x", "classifiers": "\ud800"}, 422, "invalid_request", "Unicode"),
        ({"input": "x", "classifiers": ["task0", "\ud800"]}, 422, "invalid_request", "Unicode"),
        ({"input": "x", "classifiers": 5}, 422, "invalid_request", "classifiers: 5 is not a name or a list"),
        ({"input": "x", "classifiers": ["task0", 5]}, 422, "invalid_request", "classifiers.1: "),
        ({"input": "x", "classifiers": ["task0"] * 10_001}, 422, "invalid_request", "classifiers: "),
        ({"input": "x", "classifiers": []}, 422, "invalid_request", "no classifier"),
        ({"input": ""}, 422, "invalid_request", "empty"),
        ({"input": " \n"}, 422, "invalid_request", "empty"),
        ({"input": []}, 422, "invalid_request", "empty"),
        ({"input": 3}, 422, "invalid_request", "input: 3 is not text or a list of messages"),
        ({"input": ["x"]}, 422, "invalid_request", "input.0: "),
        ({"input": "x", "str": 1}, 422, "invalid_request", "'str'"),
        ({"input": "x", "list[": 1}, 422, "invalid_request", "'list['"),
        ({"input": "x", "\ud800": 1}, 422, "invalid_request", "Unicode"),
        ({"input": None}, 422, "invalid_request", "input"),
        ({}, 422, "invalid_request", "input"),
        ({"input": "x", "clasifiers": "task0"}, 422, "invalid_request", "clasifiers"),
        ({"input": "x", "deadline_ms": -1}, 422, "invalid_request", "deadline_ms"),
        ({"input": [{"role": "user"}]}, 422, "invalid_request", "input.0.content: "),
        ({"input": [{"role": "user", "content": "x", "text": 1}]}, 422, "invalid_request", "'input.0.text'"),
        ({"input": [{"role": "robot", "content": "x"}]}, 422, "invalid_request", "'robot'"),
        ({"input": "\ud800"}, 422, "invalid_request", "Unicode"),
        ([], 422, "invalid_request", "JSON object"),
        ("x", 422, "invalid_request", "JSON object"),
    ],
)
def test_wrong_input_gets_status_code_and_remedy(
    http: httpx.Client, body: Any, status: int, code: str, mentions: str
) -> None:
    response = http.post("/v1/classify", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert_error(response, status, code, mentions)


def test_a_misspelt_field_is_told_the_right_one(http: httpx.Client) -> None:
    response = http.post("/v1/classify", json={"text": TEXT})
    assert_error(response, 422, "invalid_request", "unknown field 'text'; did you mean input?")
    assert response.json()["error"]["remedy"].startswith("use: input, inputs, classifiers, ")
    response = http.post("/v1/classify", json={"input": TEXT, "deadline_ms": -3})
    assert_error(response, 422, "invalid_request", "deadline_ms: -3 is not above 0")


LONG = "y" * 15_000  # in a path, too: a head may have 16 KiB


@pytest.mark.parametrize(
    ("method", "path", "body", "mentions"),
    [
        ("POST", "/v1/classify", {"input": "x", "classifiers": LONG}, "no classifier named 'yy"),
        ("POST", "/v1/classify", {"input": "x", "classifiers": [f"no{i}" for i in range(5000)]}, "(5000 in all)"),
        ("POST", "/v1/classify", {"input": "x", "classifiers": ["task0", *map(str, range(5000))]}, "(5000 in all)"),
        ("POST", "/v1/classify", {"input": "x", "classifiers": ["task0", *([LONG] * 2)], LONG: 1}, "yy"),
        ("POST", "/v1/classify", {"input": [{"role": LONG, "content": "x"}], "classifiers": "task0"}, "unknown role"),
        ("POST", "/v1/classify", {"input": [{"role": "user", "content": "x", LONG: 1}]}, "input.0.yy"),
        ("POST", "/invocations", {"input_text": "x", "adapter_name": LONG}, "no classifier named 'yy"),
        ("POST", "/v1/completions", {"model": LONG, "prompt": "x"}, "no classifier named 'yy"),
        ("POST", "/v1/completions", {"model": "task0", "prompt": "x", LONG: 1}, "unknown field"),
        ("POST", "/v1/completions", {"model": "task0", "prompt": "x", "suffix": LONG}, "suffix"),
        ("POST", "/v1/completions", {"model": "task0", "prompt": "x", "logit_bias": {LONG: 1}}, "logit_bias"),
        ("POST", "/v1/completions", {"model": "task0", "prompt": [10**4000]}, "the token 1000"),
        ("POST", "/v1/chat/completions", {"model": "task0", "messages": [{"role": LONG, "content": "x"}]}, "role"),
        (
            "POST",
            "/v1/chat/completions",
            {"model": "task0", "messages": [{"role": "user", "content": "x", LONG: 1}]},
            "unknown field 'messages.0.yy",
        ),
        ("PUT", "/v1/routes/r", {"targets": {LONG: 1}}, "no classifier named 'yy"),
        ("PUT", "/v1/routes/r", {"targets": {"task0": 1, LONG: "z"}}, "targets.yy"),
        ("PUT", f"/v1/routes/{LONG}", {"targets": {"task0": 1}}, "cannot name"),
        ("POST", f"/v1/routes/{LONG}/rollback", {}, "can be rolled back"),
        ("PUT", f"/v1/adapters/{LONG}", {"source": "nowhere"}, ""),
        ("PUT", "/v1/adapters/new", {"source": LONG}, ""),
        ("POST", "/v1/load_lora_adapter", {"lora_name": LONG, "lora_path": LONG}, ""),
        ("POST", "/v1/feedback", {"verdict_id": LONG, "label": LONG}, ""),
        ("GET", f"/v1/adapters/{LONG}", None, "no classifier named 'yy"),
        ("GET", f"/{LONG}", None, "no path '/yy"),
        ("PATCH", f"/v1/adapters/{LONG}", None, "not allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_repeats_only_the_beginning_of_what_was_sent(
    http: httpx.Client, method: str, path: str, body: Any, mentions: str
) -> None:
    response = http.request(method, path, json=body)
    assert response.status_code in (404, 405, 409, 422), response.text[:500]
    error = response.json()["error"]
    assert mentions in error["message"] and error["remedy"], error
    assert len(response.content) < 5_000


def test_some_unknown_names_leave_the_others_their_verdicts(http: httpx.Client) -> None:
    known, *unknown = ask(http, classifiers=["task0", *(f"no{i}" for i in range(100))])["verdicts"]
    assert known["label"] and all(one["error"]["code"] == "unknown_classifier" for one in unknown)


@pytest.mark.parametrize("content", [b"", b"{", b'{"input": }', b'{"input": "\xff"}', b"\x00", b"[" * 100_000])
def test_what_is_not_json_gets_400(http: httpx.Client, content: bytes) -> None:
    for route in ("/v1/classify", "/invocations"):
        response = http.post(route, content=content, headers={"Content-Type": "application/json"})
        assert_error(response, 400, "bad_input", "")


def test_a_large_body_is_refused_whether_it_is_declared_or_not(http: httpx.Client) -> None:
    large = b'{"input": "' + b"x" * (3 * 2**20) + b'"}'
    headers = {"Content-Type": "application/json"}
    assert_error(http.post("/v1/classify", content=large, headers=headers), 413, "body_too_large", "2097152")
    pieces = (large[at : at + 65536] for at in range(0, len(large), 65536))
    assert_error(http.post("/v1/classify", content=pieces, headers=headers), 413, "body_too_large", "2097152")
    assert ask(http)["verdicts"]


def test_a_body_full_of_mistakes_does_not_keep_the_others_waiting(http: httpx.Client) -> None:
    body = b'{"input": [' + b",".join([b"{}"] * 500_000) + b"]}"
    started = time.monotonic()
    response = http.post("/v1/classify", content=body, headers={"Content-Type": "application/json"})
    assert_error(response, 422, "invalid_request", "input")
    assert time.monotonic() - started < 2, "every item was looked at"


def test_unknown_routes_and_methods_have_the_same_shape(http: httpx.Client) -> None:
    assert_error(http.get("/nope"), 404, "not_found", "/nope")
    assert_error(http.get("/v1/classify"), 405, "method_not_allowed", "GET")
    assert_error(http.post("/v1/classify/", json={"input": "x"}), 404, "not_found", "/v1/classify/")


def assert_error(response: httpx.Response, status: int, code: str, mentions: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code and error["remedy"]
    assert mentions in error["message"]
    assert set(error) == {"code", "message", "remedy"}


def test_a_deadline_that_cannot_be_met_is_504(http: httpx.Client) -> None:
    response = http.post("/v1/classify", json={"input": TEXT, "deadline_ms": 0.0001})
    assert_error(response, 504, "deadline_exceeded", "deadline")


def test_a_deadline_is_kept_whatever_runs_on(tiny_bundle: Path) -> None:
    """Nor does tokenizing, of which there is much here."""
    with serving.serve(tiny_bundle, "--dtype", "float32") as server, serving.client(server) as http:
        long = "Customer: hello " * 6000
        started = time.monotonic()
        response = http.post("/v1/classify", json={"input": long, "classifiers": "task0", "deadline_ms": 5})
        assert_error(response, 504, "deadline_exceeded", "deadline")
        assert time.monotonic() - started < 5
        assert ask(http, classifiers="task0")["verdicts"][0]["label"]


def test_a_client_that_leaves_does_not_harm_the_others(tiny_server: serving.Server, http: httpx.Client) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=tiny_server.url) as client:
            calls = [
                asyncio.create_task(client.post("/v1/classify", json={"input": "Customer: hello " * 20 + str(i)}))
                for i in range(20)
            ]
            await asyncio.sleep(0.05)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(leave())
    assert list(labels(ask(http))) == NAMES


def test_models_lists_the_base_and_its_adapters(http: httpx.Client, tiny_bundle: Path) -> None:
    answer = http.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == [tiny_bundle.name, *NAMES]
    assert {card["parent"] for card in answer["data"][1:]} == {tiny_bundle.name}


def test_health_readiness_docs_and_schema(http: httpx.Client) -> None:
    for route in ("/health", "/ready", "/ping", "/docs"):
        assert http.get(route).status_code == 200
    for route in ("/health", "/ready", "/ping"):
        assert http.head(route).status_code == 200
    schema = http.get("/openapi.json").json()
    assert {"/v1/classify", "/invocations", "/ping", "/v1/models", "/health", "/ready"} <= set(schema["paths"])
    described = schema["paths"]["/v1/classify"]["post"]["responses"]
    assert {"200", "400", "404", "413", "422", "429", "503", "504"} <= set(described)
