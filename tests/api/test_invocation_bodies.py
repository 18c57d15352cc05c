"""The bodies that people send to SageMaker's containers, and what they are answered with."""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import torch
from botocore.config import Config
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import serving

TEXT = "Customer: hello, is my payment done?"
OTHER = "Customer: I would like to book a table, please\nAgent: at what time?"
PROMPT = TEXT + "<|ask|>"
ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"
LINES = "application/jsonlines"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|ask|>"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scored` is a SEQ_CLS adapter with three labels, without a contract."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bodies") / "bundle")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    lora = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    lora.save_pretrained(str(folder / "scored"))
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32", "--max-queue", 8) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as http:
        yield http


def invoke(http: httpx.Client, body: Any, adapter: str | None = None, **headers: str) -> Any:
    response = http.post("/invocations", json=body, headers=headers | ({} if adapter is None else {ADAPTER: adapter}))
    assert response.status_code == 200, response.text
    return response.json()


def near(answer: Any) -> Any:
    """The same with numbers that need not be equal to the last bit: what is computed together decides that."""
    if isinstance(answer, dict):
        return {name: near(one) for name, one in answer.items()}
    if isinstance(answer, list):
        return [near(one) for one in answer]
    return pytest.approx(answer, abs=1e-5) if isinstance(answer, float) else answer


def error_of(http: httpx.Client, body: Any, adapter: str | None = None, path: str = "/invocations") -> str:
    response = http.post(path, json=body, headers={} if adapter is None else {ADAPTER: adapter})
    assert response.status_code in (404, 413, 422), response.text
    error = response.json()["error"]
    assert error["remedy"]
    return str(error["message"])


def scores(http: httpx.Client, name: str, text: str) -> dict[str, float]:
    [verdict] = http.post("/v1/classify", json={"input": text, "classifiers": name}).json()["verdicts"]
    return dict(verdict["scores"])


# ------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize(
    "parameters", [{}, {"top_k": None}, {"top_k": 2}, {"top_k": 1}, {"function_to_apply": "softmax"}]
)
def test_labels_are_those_of_transformers_pipeline(http: httpx.Client, bundle: Path, parameters: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bundle, num_labels=3, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, bundle / "scored").merge_and_unload()
    merged.config.pad_token_id = 2
    classify: Any = pipeline("text-classification", model=merged, tokenizer=AutoTokenizer.from_pretrained(bundle))
    for inputs in (TEXT, [TEXT, OTHER], [TEXT]):
        expected = classify(inputs, **parameters)
        answer = invoke(http, {"inputs": inputs, "parameters": parameters}, "scored")
        assert json.dumps(answer).count("{") == json.dumps(expected).count("{")
        for one, other in zip(flat(answer), flat(expected), strict=True):
            assert one == {"label": other["label"], "score": pytest.approx(other["score"], abs=1e-4)}
        assert nesting(answer) == nesting(expected)


def flat(answer: Any) -> list[Any]:
    return [one for part in answer for one in flat(part)] if isinstance(answer, list) else [answer]


def nesting(answer: Any) -> Any:
    return [nesting(one) for one in answer] if isinstance(answer, list) else 0


def test_a_contracts_labels_in_hugging_faces_shape(http: httpx.Client) -> None:
    expected = scores(http, "task0", TEXT)
    [best] = invoke(http, {"inputs": TEXT}, "task0")
    label = max(expected, key=expected.__getitem__)
    assert best == {"label": label, "score": pytest.approx(expected[label], abs=1e-5)}
    everything = invoke(http, {"inputs": TEXT, "parameters": {"return_all_scores": True}}, "task0")
    assert everything == [[{"label": name, "score": pytest.approx(expected[name], abs=1e-5)} for name in ("yes", "no")]]
    named = {"inputs": [TEXT, OTHER], "parameters": {"adapter_id": "task0", "truncation": True}, "options": {"x": 1}}
    assert invoke(http, named)[0] == near(best)
    assert invoke(http, {**named, "inputs": TEXT}, **{"X-Amzn-SageMaker-Target-Model": "task0.tar.gz"}) == near([best])
    answers = invoke(http, {"inputs": [TEXT, "", OTHER], "parameters": {}}, "task0")
    assert answers[0] == near(best) and answers[1]["error"]["message"] == "the input is empty" and "label" in answers[2]


@pytest.mark.parametrize("adapter", ["verbatim", None])
def test_without_labels_the_text_goes_on(http: httpx.Client, bundle: Path, adapter: str | None) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(bundle)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, bundle / adapter)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    parameters = {"max_new_tokens": 5, "return_full_text": False}
    assert invoke(http, {"inputs": PROMPT, "parameters": parameters}, adapter) == [{"generated_text": text}]
    several = {"inputs": [PROMPT, PROMPT], "parameters": {"max_new_tokens": 5, "do_sample": False}}
    assert invoke(http, several, adapter) == [[{"generated_text": PROMPT + text}]] * 2
    drawn = {"inputs": PROMPT, "parameters": {"temperature": 5.0, "seed": 3, "max_new_tokens": 8}}
    assert invoke(http, drawn, adapter) == invoke(http, drawn, adapter) != invoke(http, several, adapter)[0]


def test_the_bases_name_stands_for_the_base(http: httpx.Client) -> None:
    for body in ({"inputs": TEXT, "parameters": {"seed": 1}}, {"input_text": TEXT}):
        unnamed = near(invoke(http, body))
        assert invoke(http, body, "bundle") == unnamed
        assert invoke(http, body, **{"X-Amzn-SageMaker-Target-Model": "bundle"}) == unnamed


def test_adapters_that_were_not_read_yet_are_told_apart(bundle: Path) -> None:
    with serving.serve(bundle, "--dtype", "float32", "--preload", "none") as server, serving.client(server) as http:
        parameters = {"max_new_tokens": 2}
        [made] = invoke(http, {"inputs": PROMPT, "parameters": parameters}, "verbatim")
        assert made["generated_text"].startswith(PROMPT)
        assert "'scored' has labels" in error_of(http, {"inputs": TEXT, "parameters": parameters}, "scored")
        routed = {"targets": {"task0": 1, "verbatim": 1}}
        assert http.put("/v1/routes/both", json=routed).status_code == 200
        for _ in range(8):
            assert http.post(
                "/invocations", json={"inputs": [PROMPT] * 3, "parameters": {}}, headers={ADAPTER: "both"}
            ).json()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": TEXT, "parameters": {"adapter_id": "nope"}}, "no classifier named 'nope'"),
        (
            {"inputs": TEXT, "parameters": {"adapter_id": "task0", "max_new_tokens": 5}},
            "parameters.max_new_tokens: 'task0'",
        ),
        ({"inputs": TEXT, "parameters": {"adapter_id": "verbatim", "top_k": 5}}, "parameters.top_k: 'verbatim' has no"),
        ({"inputs": TEXT, "parameters": {"return_all_scores": True}}, "parameters.return_all_scores: the base has no"),
        ({"inputs": TEXT, "parameters": {"repetition_penalty": 1.2}}, "unknown field 'parameters.repetition_penalty'"),
        ({"inputs": TEXT, "parameters": {"top_k": True}}, "parameters.top_k: true is not a number"),
        ({"inputs": {"text": "x"}, "parameters": {}}, "inputs: "),
        ({"inputs": [3], "parameters": {}}, "inputs.0: 3 is not text"),
        ({"inputs": "", "parameters": {}}, "the input is empty"),
    ],
)
def test_what_hugging_faces_body_cannot_say(http: httpx.Client, body: Any, said: str) -> None:
    assert said in error_of(http, body)


# ------------------------------------------------------------------------------------------- OpenAI, vLLM, SGLang


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "logprobs": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}),
    ],
)
def test_openais_bodies_are_answered_as_on_their_paths(http: httpx.Client, path: str, body: Any) -> None:
    for name in ("verbatim", "task0", "bundle"):
        expected = http.post(path, json={**body, "model": name}).json()
        by_header = {**body} if name == "bundle" else {**body, "model": name}
        for answer in (invoke(http, by_header), invoke(http, body, None if name == "bundle" else name)):
            assert answer["choices"] == expected["choices"] and answer["model"] == name
    streamed = http.post("/invocations", json={**body, "model": "task0", "stream": True})
    assert streamed.headers["Content-Type"].startswith("text/event-stream") and streamed.text.endswith(
        "data: [DONE]\n\n"
    )
    assert "no classifier named ''" in error_of(http, {**body, "model": ""}, "task0")
    assert "unknown field 'mood'" in error_of(http, {**body, "mood": 1}, "task0")


def test_a_stream_through_the_runtime_api_comes_in_parts(server: serving.Server) -> None:
    runtime: Any = boto3.client(
        "sagemaker-runtime",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(retries={"total_max_attempts": 1}),
    )
    body = {"model": "task0", "prompt": PROMPT, "max_tokens": 4, "stream": True, "logprobs": 1}
    asked: dict[str, Any] = {"EndpointName": "any", "ContentType": "application/json"}
    response = runtime.invoke_endpoint_with_response_stream(Body=json.dumps(body), **asked)
    parts = [event["PayloadPart"]["Bytes"] for event in response["Body"]]
    assert len(parts) > 3 and b"".join(parts).endswith(b"data: [DONE]\n\n")
    assert response["ContentType"].startswith("text/event-stream")
    with pytest.raises(runtime.exceptions.ModelError, match="nope"):
        runtime.invoke_endpoint_with_response_stream(Body=json.dumps({**body, "model": "nope"}), **asked)
    text = runtime.invoke_endpoint(
        EndpointName="any", ContentType="text/csv", Accept="text/csv", Body=f'"{TEXT}"', TargetModel="task0"
    )
    assert text["ContentType"].startswith("text/csv")
    assert text["Body"].read().decode().startswith(("yes,", "no,"))


@pytest.mark.parametrize("path", ["/v1/classify", "/classify", "/invocations"])
def test_the_classification_api_of_vllm_and_sglang(http: httpx.Client, path: str) -> None:
    body = {"model": "task0", "input": [TEXT, OTHER], "user": "me", "priority": 0}
    answer = http.post(path, json=body).json()
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert (answer["object"], answer["model"]) == ("list", "task0") and answer["id"].startswith("classify-")
    for index, (one, text) in enumerate(zip(answer["data"], (TEXT, OTHER), strict=True)):
        expected = scores(http, "task0", text)
        assert one["label"] == max(expected, key=expected.__getitem__)
        assert one["probs"] == pytest.approx(list(expected.values()), abs=1e-5)
        assert (one["index"], one["num_classes"], list(expected)) == (index, 2, ["yes", "no"])
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] > 0 == usage["completion_tokens"]
    [alone] = http.post(path, json={"model": "task0", "input": TEXT}).json()["data"]
    assert alone["probs"] == pytest.approx(answer["data"][0]["probs"], abs=1e-5)
    chat = {"model": "scored", "messages": [{"role": "user", "content": "hello, is my payment done?"}]}
    if path != "/invocations":  # there `messages` are a chat's
        [one] = http.post(path, json=chat).json()["data"]
        assert one["num_classes"] == 3 and one["label"] in scores(http, "scored", TEXT)
    for wrong, said in (
        ({"model": "nope", "input": TEXT}, "no classifier named 'nope'"),
        ({"model": "task0", "input": [TEXT, ""]}, "the input is empty"),
        ({"model": "verbatim", "input": TEXT}, "'verbatim' has no labels"),
        ({"model": "task0", "input": [1, 2]}, "input.0: 1 is not text"),
        ({"model": "task0", "input": TEXT, "truncate_prompt_tokens": 5}, "unknown field 'truncate_prompt_tokens'"),
        ({"model": "task0", "input": TEXT, "use_activation": False}, "use_activation: false is not true"),
    ):
        assert said in error_of(http, wrong, path=path)


# ------------------------------------------------------------------------------------------- batch transform


def send(http: httpx.Client, content: str | bytes, kind: str, adapter: str | None = "task0", **headers: str) -> Any:
    named = {} if adapter is None else {ADAPTER: adapter}
    return http.post("/invocations", content=content, headers={"Content-Type": kind, **named, **headers})


def test_json_lines_have_one_body_and_one_answer_a_line(http: httpx.Client) -> None:
    """More of them than the queue holds, of all kinds, and a broken one gets its own error."""
    bodies: list[Any] = [
        {"input_text": TEXT, "adapter_name": "task1"},
        {"input": TEXT, "classifiers": ["task0", "task1"]},
        {"inputs": TEXT},
        {"model": "task0", "input": TEXT},
        {"prompt": PROMPT, "max_tokens": 1, "temperature": 0},
        *({"input_text": f"{TEXT} {index}"} for index in range(40)),
    ]
    wrong = ['{"input_text": 3}', "{", '{"inputs": "x", "parameters": {"adapter_id": "nope"}}', "[]"]
    streams = ['{"prompt": "x", "stream": true}', '{"prompt": "x", "str\\u0065am": true}']
    content = "\n".join([*map(json.dumps, bodies), "", *wrong, *streams]) + "\r\n"
    response = send(http, content, LINES)
    assert response.status_code == 200 and response.headers["Content-Type"] == LINES
    answers = [json.loads(line) for line in response.text.splitlines()]
    assert len(answers) == len(bodies) + len(wrong) + len(streams)
    assert near(answers[0]) == invoke(http, bodies[0]) and near(answers[2]) == invoke(http, bodies[2], "task0")
    assert [one["classifier"] for one in answers[1]["verdicts"]] == ["task0", "task1"]
    assert answers[3]["object"] == "list" and answers[4]["choices"][0]["text"]
    assert near(answers[5:45]) == [invoke(http, one, "task0") for one in bodies[5:]]
    said = [one["error"]["message"] for one in answers[45:]]
    assert said[0] == "input_text: 3 is not text" and "the body is not JSON: line 1" in said[1]
    assert "no classifier named 'nope'" in said[2] and said[3] == "the body is not a JSON object"
    assert said[4:] == ["stream: one record of many is answered whole"] * len(streams)


def test_if_no_line_can_be_answered_the_first_error_is(http: httpx.Client) -> None:
    response = send(http, '{"input_text": "x"}\n{"input_text": "y"}', LINES, "nope")
    assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_classifier"
    for content, kind in (("", LINES), ("\n \n", LINES), ("", "text/csv"), ("inputs\n", "text/csv")):
        response = send(http, content, kind)
        assert response.status_code == 400 and "0 records" in response.json()["error"]["message"]


@pytest.mark.parametrize("header", [False, True])
def test_csv_has_one_text_a_line(http: httpx.Client, header: bool) -> None:
    quoted = 'Customer: "hello", he said\nAgent: é, yes'
    written = io.StringIO()
    csv.writer(written).writerows([["inputs"], [TEXT], [quoted], [" "]][not header :])
    content = "\ufeff" + written.getvalue() + "a,b\n"
    expected = [invoke(http, {"inputs": one}, "task0")[0] for one in (TEXT, quoted)]
    response = send(http, content.encode(), "text/csv; charset=utf-8")
    assert response.headers["Content-Type"] == "application/json"
    answers = response.json()
    assert near(answers[:2]) == expected
    assert answers[2]["error"]["message"] == "the input is empty"
    assert answers[3]["error"]["message"] == 'the line has 2 fields: ["a", "b"]'
    lines = send(http, content.encode(), "text/csv", Accept=LINES)
    assert [json.loads(line) for line in lines.text.splitlines()] == near(answers)
    table = send(http, content.encode(), "text/csv", Accept="text/csv")
    assert table.headers["Content-Type"].startswith("text/csv")
    rows = list(csv.reader(io.StringIO(table.text)))
    if header:
        assert rows.pop(0) == ["label", "score", "error"]
    assert [{"label": row[0], "score": float(row[1])} for row in rows[:2]] == near(expected)
    assert rows[2] == ["", "", "invalid_request: the input is empty"]
    made = send(http, f'"{TEXT}"', "text/csv", None, Accept="text/csv").text
    assert next(csv.reader(io.StringIO(made)))[0].startswith(TEXT)  # the base goes on with the text


@pytest.mark.parametrize("kind", [LINES, "text/csv"])
@pytest.mark.parametrize("body", [b"1\n", b",\n", b","])
def test_too_many_records_or_fields_are_refused(http: httpx.Client, kind: str, body: bytes) -> None:
    """A batch holds as many lines as a body can."""
    response = send(http, body * (2**21 // len(body)), kind)
    many = "the body has more than 100000 records" if b"\n" in body else "fields: " if kind != LINES else "is not JSON"
    assert response.status_code in (400, 422) and many in response.json()["error"]["message"]


def test_broken_csv_says_where(http: httpx.Client) -> None:
    response = send(http, 'fine\n"x"y\n', "text/csv")
    assert response.status_code == 400 and "the body is not CSV: line 2" in response.json()["error"]["message"]
    assert http.post("/v1/classify", content="x", headers={"Content-Type": "text/csv"}).status_code == 422
    assert send(http, "x", "text/csv").status_code == 200 != http.post("/invocations?a=1", content="x").status_code
