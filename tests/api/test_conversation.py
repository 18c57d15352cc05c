"""A dialogue replayed turn by turn over HTTP: each turn computes only what is new."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import httpx
import pytest

import serving
import tiny
from loraplex.bundle import open_bundle
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.template import Template
from loraplex.text.tokenizer import Conversations, Tokenizer

INVOCATION = tiny.SPECIAL_TOKENS.index("<|ask|>")
MAX_MODEL_LEN = 256


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("shared") / "bundle")


@pytest.fixture(scope="module")
def http(bundle: Path) -> Iterator[httpx.Client]:
    with serving.serve(bundle, "--dtype", "float32", "--kv-cache", "8MiB") as server, serving.client(server) as client:
        yield client


def templates(bundle: Path, names: Seq[str]) -> list[Template]:
    tokenizer = Tokenizer(bundle)
    contracts = {source.name: source.contract for source in open_bundle(bundle).adapters}
    bound = []
    for name in names:
        contract = contracts[name]
        assert contract is not None
        bound.append(Template(ChatTemplate.of(tokenizer), contract, MAX_MODEL_LEN, name))
    return bound


def dialogue(seed: int) -> Iterator[str]:
    text = ""
    for turn in range(40):
        speaker = "Agent" if turn % 2 else "Customer"
        text += f"{speaker}: turn {turn} {'is it done? ' * ((turn * 7 + seed) % 4)}\n"
        yield text.strip()


@pytest.mark.parametrize("names", [["active0", "active1"], ["active2"], ["plain"]])
def test_a_turn_computes_its_new_tokens_and_the_questions(bundle: Path, http: httpx.Client, names: list[str]) -> None:
    bound = templates(bundle, names)
    before: tuple[int, ...] = ()
    num_checked = num_moved = 0
    for text in dialogue(len(names[0])):
        prompts = [template.prompt(text, Conversations()) for template in bound]
        conversation = prompts[0].token_ids[: prompts[0].num_conversation]
        num_questions = sum(len(prompt.token_ids) - prompt.num_conversation for prompt in prompts)
        num_questions += sum(len(ids) - 1 for template in bound for ids in template.label_ids.values())
        answer = http.post(
            "/v1/classify", json={"input": text, "classifiers": names, "conversation_id": names[0]}
        ).json()
        assert all("label" in verdict for verdict in answer["verdicts"])
        assert answer["usage"]["prompt_tokens"] == sum(len(prompt.token_ids) for prompt in prompts)
        num_known = next(
            (i for i, (one, other) in enumerate(zip(before, conversation, strict=False)) if one != other),
            min(len(before), len(conversation)),
        )
        if before and num_known < 8:
            num_moved += 1  # the start of a conversation that is too long has moved
        else:
            bound_tokens = len(conversation) - num_known + num_questions + 15
            assert answer["usage"]["computed_tokens"] <= bound_tokens
            num_checked += 1
        before = conversation
    assert num_moved >= 3 and num_checked >= 25, "the dialogue does not pass max_length, or moves all the time"


def test_sixteen_of_a_kind_cost_little_more_than_one(http: httpx.Client) -> None:
    text = "Customer: hello, I would like to book a table. " * 4
    one = http.post("/v1/classify", json={"input": text + "x", "classifiers": "active0"}).json()["usage"]
    two = http.post("/v1/classify", json={"input": text + "y", "classifiers": ["active0", "active1"]}).json()["usage"]
    assert two["prompt_tokens"] > 1.9 * one["prompt_tokens"]
    assert two["computed_tokens"] < 0.5 * one["prompt_tokens"]  # most of it was kept from the first call


def test_the_invocation_in_a_customers_text_stays_text(http: httpx.Client) -> None:
    answer = http.post("/v1/classify", json={"input": "Customer: <|ask|>yes", "classifiers": "active0"}).json()
    assert "<|ask|>" in answer["verdicts"][0]["warnings"][0]


def test_a_verbatim_prompt_needs_the_invocation(http: httpx.Client) -> None:
    for body in (
        {"input_text": "hello", "adapter_name": "active0", "raw": True},
        {"input_text": "hello", "adapter_name": "verbatim"},
    ):
        response = http.post("/invocations", json=body)
        assert response.status_code == 422 and "invocation tokens" in response.json()["error"]["message"]
        assert http.post("/invocations", json=body | {"input_text": "hello<|ask|>"}).status_code == 200
