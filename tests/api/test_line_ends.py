"""A verdict depends on a conversation's words: not on its kind of line end, nor on the way that it came."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import serving
from loraplex import ClassifyResult, Client, Loraplex, Message
from loraplex.server.schemas import result_json

ORDER = "Customer: My order never came.\nAgent: I sent a new one.\nCustomer: Great, thank you, bye!"
TABLE = (
    "Customer: I need a table for two.\nAgent: How about Bella Mia?\nCustomer: Is there anything else?\n"
    "Agent: Yes, Luigi's.\nCustomer: No, forget it."
)
LINE_ENDS = ["\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"]
TAILS = ["\n", "\r\n", " \t\r\n\r\n", "\u00a0"]


@pytest.fixture(scope="module")
def http(demo_bundle: Path) -> Iterator[httpx.Client]:
    with serving.serve(demo_bundle, "--dtype", "float32") as server, serving.client(server) as client:
        yield client


@pytest.fixture(scope="module")
def loraplex(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loraplex]:
    """The demo bundle, and an adapter whose golden example comes out right only if its line ends are taken as such."""
    folder = tmp_path_factory.mktemp("golden") / "adapter"
    shutil.copytree(demo_bundle / "isAcceptingOption", folder)
    contract = yaml.safe_load((folder / "classifier.yaml").read_text())
    contract["golden"] = [{"text": ORDER.replace("\n", "\r\n") + "\r\n", "label": "yes"}]
    (folder / "classifier.yaml").write_text(yaml.safe_dump(contract))
    with Loraplex.load(demo_bundle, adapters={"withGolden": folder}, dtype="float32", device="cpu") as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def expected(loraplex: Loraplex) -> Mapping[str, Any]:
    """Text -> classifier -> its score of "yes" for the text as it stands, within rounding."""
    found = {text: scores(loraplex.classify(text)) for text in (ORDER, TABLE)}
    assert found[ORDER]["isAcceptingOption"] > 0.5 > found[TABLE]["transactionCompleted"]
    return {text: pytest.approx(found[text], abs=1e-4) for text in found}


def scores(result: ClassifyResult) -> dict[str, float]:
    return scores_of(json.loads(result_json(result)))


def scores_of(answer: Mapping[str, Any]) -> dict[str, float]:
    return {one["classifier"]: one["scores"]["yes"] for one in answer["verdicts"] if one["classifier"] != "withGolden"}


def messages_of(text: str, line_end: str = "") -> list[dict[str, str]]:
    roles = {"Customer": "user", "Agent": "assistant"}
    turns = (line.partition(": ") for line in text.split("\n"))
    return [{"role": roles[name], "content": content + line_end} for name, _, content in turns]


@pytest.mark.parametrize("text", [ORDER, TABLE], ids=["order", "table"])
@pytest.mark.parametrize("line_end", LINE_ENDS)
def test_in_process(loraplex: Loraplex, expected: Mapping[str, Any], text: str, line_end: str) -> None:
    assert scores(loraplex.classify(text.replace("\n", line_end) + line_end)) == expected[text]


@pytest.mark.parametrize("text", [ORDER, TABLE], ids=["order", "table"])
@pytest.mark.parametrize("tail", TAILS)
def test_whitespace_at_the_end(loraplex: Loraplex, expected: Mapping[str, Any], text: str, tail: str) -> None:
    assert scores(loraplex.classify(text + tail)) == expected[text]
    messages = [Message(role=one["role"], content=one["content"] + tail) for one in messages_of(text)]
    assert scores(loraplex.classify(messages)) == expected[text]


@pytest.mark.parametrize("text", [ORDER, TABLE], ids=["order", "table"])
def test_over_http(http: httpx.Client, expected: Mapping[str, Any], text: str) -> None:
    crlf, wanted = text.replace("\n", "\r\n") + "\r\n", expected[text]
    assert scores_of(http.post("/v1/classify", json={"input": crlf}).json()) == wanted
    assert scores_of(http.post("/v1/classify", json={"input": messages_of(text, "\r\n")}).json()) == wanted
    assert scores_of(http.post("/invocations", json={"input": crlf}).json()) == wanted
    inputs = [crlf, messages_of(text, "\r\n"), {"input": crlf, "conversation_id": "one"}]
    assert [scores_of(one) for one in http.post("/v1/classify", json={"inputs": inputs}).json()["results"]] == [
        wanted
    ] * 3
    invoked = {}
    for name in wanted.expected:
        [answer] = http.post("/invocations", json={"input_text": crlf, "adapter_name": name}).json()
        score = answer["confidence_score"]
        invoked[name] = score if answer["predicted_text"] == "yes" else 1 - score
    assert invoked == wanted
    with Client(str(http.base_url)) as client:
        assert scores(client.classify(crlf)) == wanted
        [result] = client.classify_many([crlf])
        assert isinstance(result, ClassifyResult)
        assert scores(result) == wanted


def test_chat_completions_through_a_contract(http: httpx.Client) -> None:
    def log_prob(content: str) -> float:
        messages = [{"role": "user", "content": content}]
        body = {"model": "isAcceptingOption", "messages": messages, "max_tokens": 1, "temperature": 0, "logprobs": True}
        answer = http.post("/v1/chat/completions", json=body).json()
        return float(answer["choices"][0]["logprobs"]["content"][0]["logprob"])

    assert log_prob("One.\r\nTwo.\r\n") == pytest.approx(log_prob("One.\nTwo."), abs=1e-4)


@pytest.mark.parametrize("way", ["--text", "--file", "-"])
def test_on_the_command_line(demo_bundle: Path, expected: Mapping[str, Any], tmp_path: Path, way: str) -> None:
    crlf = ORDER.replace("\n", "\r\n") + "\r\n"
    (tmp_path / "conversation.txt").write_bytes(crlf.encode())
    source = {"--text": ("--text", crlf), "--file": ("--file", tmp_path / "conversation.txt"), "-": ("-",)}[way]
    stdin = crlf.encode() if way == "-" else None
    run = serving.loraplex("classify", demo_bundle, "--all", "--json", "--dtype", "float32", *source, stdin=stdin)
    assert scores_of(json.loads(run.stdout)) == expected[ORDER]


def test_a_conversation_without_a_contract_is_taken_as_it_is(tiny_server: serving.Server) -> None:
    with serving.client(tiny_server) as http:
        answers = [
            http.post("/v1/classify", json={"input": text, "classifiers": "verbatim"}).json()["usage"]["prompt_tokens"]
            for text in ("Customer: hello", "Customer: hello\r\n")
        ]
        raw = [
            http.post("/v1/completions", json={"model": "verbatim", "prompt": text}).json()["usage"]["prompt_tokens"]
            for text in ("Customer: hello", "Customer: hello\r\n")
        ]
    assert answers == raw and answers[0] < answers[1]
