"""The article's client, as it stands there: `{"input_text", "adapter_name"}` -> `[{"confidence_score", …}]`."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Customer: hello, is my payment done?"


def invoke(http: httpx.Client, **body: object) -> dict[str, object]:
    response = http.post("/invocations", json=body)
    assert response.status_code == 200, response.text
    [answer] = response.json()
    assert set(answer) == {"confidence_score", "predicted_text"}
    return dict(answer)


@pytest.mark.parametrize("adapter", ["verbatim", "task0", None])
def test_verbatim_prompts_are_answered_as_peft_does(http: httpx.Client, tiny_bundle: Path, adapter: str | None) -> None:
    """The article's predict_fn: tokenizer(text), top token, its probability. An adapter with a contract needs `raw`."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_bundle, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bundle)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, tiny_bundle / adapter)
    text = TEXT + "<|ask|>"
    with torch.inference_mode():
        probabilities = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
    body = {"input_text": text} | ({} if adapter is None else {"adapter_name": adapter, "raw": adapter == "task0"})
    answer = invoke(http, **body)
    assert answer["predicted_text"] == tokenizer.decode([int(probabilities.argmax())])
    assert answer["confidence_score"] == pytest.approx(probabilities.max().item(), abs=1e-4)


def test_a_contract_is_applied(http: httpx.Client) -> None:
    answer = invoke(http, input_text=TEXT, adapter_name="task0")
    [verdict] = http.post("/v1/classify", json={"input": TEXT, "classifiers": "task0"}).json()["verdicts"]
    assert answer == {"predicted_text": verdict["label"], "confidence_score": pytest.approx(verdict["confidence"])}


def test_the_native_body_is_answered_as_v1_classify(http: httpx.Client) -> None:
    body = {"input": TEXT, "classifiers": ["task0", "task1"]}
    native, classify = http.post("/invocations", json=body).json(), http.post("/v1/classify", json=body).json()
    for one, other in zip(native["verdicts"], classify["verdicts"], strict=True):
        assert one.pop("id") != other.pop("id")
        assert one == other


@pytest.mark.parametrize("raw", [False, True])
def test_an_unknown_adapter_is_never_answered_by_the_base(http: httpx.Client, raw: bool) -> None:
    response = http.post("/invocations", json={"input_text": TEXT, "adapter_name": "nope", "raw": raw})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_classifier"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"input_text": "x", "adapter_name": "\ud800"}, 422),
        ({"input": "x", "classifiers": "\ud800"}, 422),
        ({"input": 3}, 422),
        ({"input_text": ""}, 422),
        ({"input_text": "", "adapter_name": "task0"}, 422),
        ({"input_text": 3}, 422),
        ({"input_text": "x", "adapter_name": 3}, 422),
        ({"input_text": "x", "other": 1}, 422),
        ({"input_text": "hello " * 1000}, 413),
        ({"input_text": "hello " * 1000, "adapter_name": "verbatim"}, 413),
        ({"input_text": "\ud800"}, 422),
    ],
)
def test_wrong_input(http: httpx.Client, body: object, status: int) -> None:
    response = http.post("/invocations", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["remedy"]


def test_a_wrong_field_is_named_without_what_pydantic_tried(http: httpx.Client) -> None:
    for body, said in (
        ({"input_text": 3}, "input_text: 3 is not text"),
        ({"input_text": "x", "article": 1}, "unknown field 'article'"),
        ({}, "input_text: is missing"),
    ):
        message = http.post("/invocations", json=body).json()["error"]["message"]
        assert message == said
