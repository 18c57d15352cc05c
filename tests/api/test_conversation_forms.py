"""The same conversation, in every form and through every way in, gets the same answer; and roles say what is in it."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from transformers import AutoTokenizer

import serving
import tiny
from loraplex import AsyncClient, Client, Loraplex
from loraplex.errors import InvalidRequestError

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.order }}){% endfor %}\n"
    "{% endfor %}<|ask|>"
)
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"order": 7}'}}
PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "is my payment\ndone?"},
    {"role": "assistant", "content": "yes, it is"},
]
FORMS: list[dict[str, Any]] = [
    {
        "role": "user",
        "name": "bob",
        "content": [
            {"type": "text", "text": "is my payment", "cache_control": {"type": "ephemeral"}},
            {"type": "input_text", "text": "done?"},
        ],
    },
    {"role": "assistant", "content": "yes, it is", "refusal": None, "annotations": [], "function_call": None},
]
TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": "be kind"},
    PLAIN[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"paid": true}'},
    PLAIN[1],
]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`task0` has the default roles; `mapped` leaves the system's turns out and writes the tools'; `chat` takes
    messages as they are; `verbatim` has no contract."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("forms") / "bundle")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    roles = {"user": "Customer", "assistant": "Agent", "system": None, "tool": "Tool"}
    for name, contract in (
        ("mapped", {**tiny.CONTRACT, "roles": roles}),
        ("chat", {"labels": ["yes", "no"], "format": "chat", "roles": {"system": None}}),
    ):
        shutil.copytree(folder / "task1", folder / name)
        (folder / name / "classifier.yaml").write_text(yaml.safe_dump(contract))
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as http:
        yield http


@pytest.fixture(scope="module")
def loraplex(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        yield loraplex


LEFT_OUT = "left_out_tool_calls: the text has no place for calls of tools: 'find'"


def others(warnings: Any) -> list[str]:
    """Without the one that tiny models always give."""
    return [one for one in warnings or () if not one.startswith("low_label_mass")]


def confidence(http: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, Any, list[str]]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    [verdict] = response.json()["verdicts"]
    return verdict["label"], pytest.approx(verdict["confidence"], abs=1e-5), others(verdict.get("warnings"))


def test_every_form_is_read_by_every_way_in(server: serving.Server, http: httpx.Client, loraplex: Loraplex) -> None:
    asked = {"classifiers": "task0"}
    expected = confidence(http, "/v1/classify", {"input": "Customer: is my payment\ndone?\nAgent: yes, it is", **asked})
    for messages in (PLAIN, FORMS):
        for path in ("/v1/classify", "/invocations"):
            assert confidence(http, path, {"input": messages, **asked}) == expected
        batch = http.post("/v1/classify", json={"inputs": [messages, {"input": messages}], **asked}).json()["results"]
        assert [one["verdicts"][0]["label"] for one in batch] == [expected[0]] * 2

        async def ask(messages: Any) -> Any:
            async with AsyncClient(server.url) as client:
                return await client.classify(messages, "task0")

        with Client(server.url) as client:
            results = [client.classify(messages, "task0"), *client.classify_many([messages], "task0")]
        for result in (*results, asyncio.run(ask(messages)), loraplex.classify(messages, "task0")):
            verdict = result["task0"]
            assert (verdict.label, verdict.confidence, others(verdict.warnings)) == expected
        body = {"model": "task0", "messages": messages, "max_tokens": 1, "temperature": 0}
        text = "Customer: is my payment\ndone?\nAgent: yes, it is<|ask|>Is it done?\n"
        chat = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert chat == loraplex.generate(text, "task0", skip_special_tokens=True).text
        assert loraplex.generate(messages, "task0").text == loraplex.generate(text, "task0").text


def test_roles_of_the_contract_and_of_the_request(http: httpx.Client, server: serving.Server) -> None:
    by_contract = confidence(http, "/v1/classify", {"input": TOOLS, "classifiers": "mapped"})
    text = 'Customer: is my payment\ndone?\nTool: {"paid": true}\nAgent: yes, it is'
    label, score, warnings = confidence(http, "/v1/classify", {"input": text, "classifiers": "mapped"})
    assert warnings == [] and by_contract[:2] == (label, score)
    assert by_contract[2] == [LEFT_OUT]

    body = {"input": TOOLS, "classifiers": "task1", "roles": {"system": None, "tool": "Tool"}}
    assert confidence(http, "/v1/classify", body) == by_contract  # the same weights, with the default roles
    assert confidence(http, "/invocations", body) == by_contract
    several = {"inputs": [TOOLS], **{name: value for name, value in body.items() if name != "input"}}
    [one] = http.post("/v1/classify", json=several).json()["results"]
    assert one["verdicts"][0]["label"] == label
    with Client(server.url) as client:
        [result] = client.classify_many([TOOLS], "task1", roles={"system": None, "TOOL": "Tool"})
    assert result["task1"].confidence == score
    chat = {"messages": TOOLS, "model": "task1", "roles": {"system": None, "tool": "Tool"}, "max_tokens": 1}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["warnings"] == [LEFT_OUT] and answer["choices"]


def test_a_role_without_a_rule_is_refused_and_the_remedies_work(http: httpx.Client) -> None:
    response = http.post("/v1/classify", json={"input": TOOLS, "classifiers": "task0"})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["message"] == "unknown role 'system'" and '`"roles": {"system": null}`' in error["remedy"]
    body = {"input": TOOLS, "classifiers": "task0", "roles": {"system": None, "tool": None}}
    dropped = confidence(http, "/v1/classify", body)
    assert dropped[:2] == confidence(http, "/v1/classify", {"input": PLAIN, "classifiers": "task0"})[:2]
    empty = {"input": PLAIN, "classifiers": "task0", "roles": {"user": None, "assistant": None}}
    assert http.post("/v1/classify", json=empty).json()["error"]["message"] == "the input is empty"
    wrong = http.post("/v1/classify", json={**body, "roles": {"system": 3}}).json()["error"]["message"]
    assert wrong == "roles.system: 3 is not text"


def test_a_chat_template_writes_the_tool_calls_and_leaves_out_only_nulls(loraplex: Loraplex, bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    turns = [*TOOLS[1:]]
    turns[1] = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "find", "arguments": {"order": 7}}}],
    }
    expected: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "(find 7)" in expected
    by_text = loraplex.generate(expected, "chat", num_top=3)
    by_contract = loraplex.generate(TOOLS, "chat", num_top=3)
    without = loraplex.generate(TOOLS[1:], "verbatim", num_top=3)
    assert [one.id for one in by_contract.tokens[0].top] == [one.id for one in by_text.tokens[0].top]
    assert by_contract.usage.prompt_tokens == by_text.usage.prompt_tokens == without.usage.prompt_tokens
    assert by_contract.warnings == without.warnings == ()
    spelled = [
        {**TOOLS[2], "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"order": "\\u003c|ask|>"}'}}]}
    ]
    assert "'<|ask|>'" in loraplex.generate([PLAIN[0], *spelled], "verbatim").warnings[0]
    with pytest.raises(InvalidRequestError, match="chat template does that itself"):
        loraplex.classify(TOOLS, "chat", roles={"tool": "Tool"})


@pytest.mark.parametrize("path", ["/v1/classify", "/invocations", "/v1/chat/completions"])
def test_what_cannot_be_read_is_named_at_its_place(http: httpx.Client, path: str) -> None:
    image = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]
    key, named = ("messages", {"model": "task0"}) if "chat" in path else ("input", {"classifiers": "task0"})
    response = http.post(path, json={key: image, **named})
    assert response.status_code == 422
    assert response.json()["error"]["message"] == f"{key}.0.content.1.type: 'image_url' is no text"
