"""vLLM's /tokenize and /detokenize: a text's ids are the tokenizer's own, those of messages are the asked prompt's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer, MistralConfig

import serving
import tiny

TEXT = "Customer: is it done? é 😀<|ask|>"
CHAT_TEMPLATE = "<s>{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}<|ask|>"
MESSAGES = [{"role": "user", "content": "hello </s>"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer adds a BOS and has a chat template; `task0` has a contract, `verbatim` has none."""
    folder = tmp_path_factory.mktemp("tokenize") / "bundle"
    config = tiny.FAMILIES["mistral"]
    assert isinstance(config, MistralConfig)
    tiny.save_bundle(folder, 1, MistralConfig.from_dict(config.to_dict() | {"vocab_size": 600}))
    tokenizer = tiny.metaspace_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for old in folder.glob("tokenizer*"):
        old.unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def http(bundle: Path) -> Iterator[httpx.Client]:
    with serving.serve(bundle, "--dtype", "float32") as server, serving.client(server) as http:
        yield http


def tokens(http: httpx.Client, **body: Any) -> list[int]:
    answer = http.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["tokens"]
    assert answer.json()["count"] == len(found)
    return found


def test_a_text(http: httpx.Client, bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    for text in (TEXT, "", "word " * 20_000):
        for adds in (None, True, False):
            expected = tokenizer(text, add_special_tokens=adds is not False, verbose=False)["input_ids"]
            assert tokens(http, prompt=text, add_special_tokens=adds) == expected
        assert tokens(http, prompt=text, model="task0") == tokens(http, prompt=text, model="bundle")
    answer = http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert http.post("/tokenize", json={"prompt": TEXT}).json()["token_strs"] is None


def test_messages_are_tokenized_as_they_are_asked(http: httpx.Client, bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    plain = tokenizer("<s>user: hello < /s>\nassistant: hi\n<|ask|>", add_special_tokens=False)["input_ids"]
    for model in (None, "bundle", "verbatim"):
        assert tokens(http, messages=MESSAGES, model=model) == plain
    bos = tokenizer.bos_token_id
    assert tokens(http, messages=MESSAGES, add_special_tokens=True) == [bos, *plain]
    contract = tokenizer("Customer: hello < /s>\nAgent: hi<|ask|>Is it done?\n")["input_ids"]
    assert tokens(http, messages=MESSAGES, model="task0") == contract
    for model, found in (("task0", contract), ("verbatim", plain)):
        for extra in ({}, {"add_special_tokens": True}) if model == "verbatim" else ({},):
            body = {"model": model, "messages": MESSAGES, "max_tokens": 1, **extra}
            usage = http.post("/v1/chat/completions", json=body).json()["usage"]
            assert usage["prompt_tokens"] == len(found) + len(extra)


def test_roles_of_a_request_count_for_its_tokens(http: httpx.Client) -> None:
    asked = {"model": "task0", "messages": [{"role": "system", "content": "be kind"}, *MESSAGES]}
    assert "system" in http.post("/tokenize", json=asked).json()["error"]["remedy"]
    assert tokens(http, **asked, roles={"system": None}) == tokens(http, model="task0", messages=MESSAGES)


def test_tokens_become_their_text(http: httpx.Client, bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    for text in (TEXT, "Customer: </s> ok"):
        ids = tokenizer(text)["input_ids"]
        for model in (None, "task0"):
            answer = http.post("/detokenize", json={"tokens": ids, "model": model})
            assert answer.json() == {"prompt": tokenizer.decode(ids)}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "mentions"),
    [
        ("/tokenize", {}, 422, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 422, "prompt"),
        ("/tokenize", {"prompt": 3}, 422, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "nope"),
        ("/tokenize", {"prompt": "\ud800"}, 422, "Unicode"),
        ("/tokenize", {"prompt": "a", "unheard_of": 1}, 422, "unheard_of"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, 422, "add_generation_prompt"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "x"}], "model": "task0"}, 422, "nobody"),
        ("/tokenize", {"messages": []}, 422, "messages"),
        ("/detokenize", {"tokens": [1, 99999]}, 422, "99999"),
        ("/detokenize", {"tokens": [-1]}, 422, "-1"),
        ("/detokenize", {"tokens": "a"}, 422, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "nope"),
        ("/detokenize", {}, 422, "tokens"),
    ],
)
def test_wrong_bodies(http: httpx.Client, path: str, body: dict[str, Any], status: int, mentions: str) -> None:
    answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert mentions in answer.json()["error"]["message"]
