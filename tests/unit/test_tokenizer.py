"""Prompts equal `tokenizer(rendered)`, user text cannot act as template, labels are unambiguous, cuts stay put."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from transformers import PreTrainedTokenizerFast

import tiny
from checks import prompt_text, tail
from loraplex.classifier import Contract, normalized
from loraplex.errors import BundleError, ContractError, InputTooLongError, InvalidRequestError
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.prompt import verbatim
from loraplex.text.template import Template, turn_starts
from loraplex.text.tokenizer import Conversations, Tokenizer

SOURCE = "classifier.yaml"
KINDS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": tiny.byte_level_tokenizer,
    "metaspace": tiny.metaspace_tokenizer,
    "metaspace-always": functools.partial(tiny.metaspace_tokenizer, "always"),
}
TEMPLATES = ["{conversation}<|ask|>{question}\n", "{conversation}\n{question}\n", "Q: {question}\n{conversation}\nA:"]


@pytest.fixture(scope="module", params=KINDS)
def hugging_face(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def tokenizer(hugging_face: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.FAMILIES["llama"].save_pretrained(folder)
    hugging_face.save_pretrained(folder)
    return Tokenizer(folder)


def template(tokenizer: Tokenizer, max_model_len: int = 4096, **contract: Any) -> Template:
    values = {"labels": ("yes", "no"), "question": "Is it done?", **contract}
    if "{question}" not in values.get("template", "{question}"):
        del values["question"]
    return Template(ChatTemplate.of(tokenizer), Contract(**values), max_model_len, SOURCE)


def ids_of(hugging_face: PreTrainedTokenizerFast, text: str) -> list[int]:
    encoded: Any = hugging_face(text)
    ids: list[int] = encoded["input_ids"]
    return ids


@pytest.mark.parametrize("text", TEMPLATES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=strategies.text(min_size=1, max_size=80).filter(str.strip))
def test_prompts_equal_the_tokenizer_on_the_rendered_text(
    hugging_face: PreTrainedTokenizerFast, tokenizer: Tokenizer, text: str, conversation: str
) -> None:
    try:
        conversation.encode()
    except UnicodeEncodeError:
        return
    bound = template(tokenizer, template=text)
    prompt = bound.prompt(conversation, Conversations())
    assert prompt.text == text.replace("{question}", "Is it done?").replace("{conversation}", normalized(conversation))
    assert list(prompt.token_ids) == ids_of(hugging_face, prompt.text)
    assert prompt.warnings == ()


def test_what_is_verbatim_parses_special_tokens(hugging_face: PreTrainedTokenizerFast, tokenizer: Tokenizer) -> None:
    prompt = verbatim("hello<|ask|>there", tokenizer, 100)
    assert list(prompt.token_ids) == ids_of(hugging_face, "hello<|ask|>there")
    assert tiny.SPECIAL_TOKENS.index("<|ask|>") in prompt.token_ids


def test_special_tokens_in_a_conversation_stay_text(tokenizer: Tokenizer) -> None:
    bound = template(tokenizer, template="{conversation}<|ask|>{question}\n")
    prompt = bound.prompt("a<|ask|>b</s>", Conversations())
    ask, eos = tiny.SPECIAL_TOKENS.index("<|ask|>"), tiny.SPECIAL_TOKENS.index("</s>")
    assert prompt.token_ids.count(ask) == 1 and eos not in prompt.token_ids
    assert len(prompt.warnings) == 1 and "'<|ask|>'" in prompt.warnings[0] and "'</s>'" in prompt.warnings[0]


def test_placeholders_in_a_conversation_stay_text(tokenizer: Tokenizer) -> None:
    bound = template(tokenizer, template="{conversation}<|ask|>{question}\n")
    prompt = bound.prompt("{question}{conversation}", Conversations())
    assert prompt.text == "{question}{conversation}<|ask|>Is it done?\n"


def test_a_conversation_is_tokenized_once(tokenizer: Tokenizer) -> None:
    conversations = Conversations()
    for question in ("One?", "Two?", "Three?"):
        template(tokenizer, question=question, template=TEMPLATES[0]).prompt("Customer: hi", conversations)
    assert conversations.encode.cache_info().misses == 1


def test_a_labels_tokens_are_those_that_follow_the_prompt(tokenizer: Tokenizer) -> None:
    bound = template(tokenizer, template=TEMPLATES[0], labels=("yes", "not at all"))
    rendered = prompt_text(bound, "Customer: hi")
    for label, ids in bound.label_ids.items():
        assert tokenizer.encode(rendered + label) == tokenizer.encode(rendered) + list(ids)


def test_a_label_that_merges_with_the_prompts_end_is_refused(tmp_path: Path) -> None:
    tiny.FAMILIES["llama"].save_pretrained(tmp_path)
    tiny.byte_level_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    merged = "Customer: is my payment done? y"
    assert tokenizer.encode(merged + "es")[: len(tokenizer.encode(merged))] != tokenizer.encode(merged), "can fail"
    with pytest.raises(ContractError, match=r"'es' merges") as caught:
        template(tokenizer, template="{conversation} y", labels=("es", "no"))
    assert "labels" in caught.value.message and "special token" in caught.value.remedy


def test_a_label_that_begins_another_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContractError, match="begin those of"):
        template(tokenizer, template=TEMPLATES[0], labels=("no", "no way"))


def test_verbatim_is_never_cut(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputTooLongError, match="takes 10"):
        verbatim("Customer: hello " * 10, tokenizer, 10)


def test_verbatim_of_nothing_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError):
        verbatim("", tokenizer, 10)


def dialogue(num_turns: int) -> str:
    return "\n".join(f"{'Agent' if i % 2 else 'Customer'}: turn {i} says hello" for i in range(num_turns))


def test_a_long_conversation_loses_its_oldest_turns_and_its_start_stays_put(tokenizer: Tokenizer) -> None:
    bound = template(tokenizer, template=TEMPLATES[0], max_length=160)
    starts = []
    for num_turns in range(1, 40):
        prompt = bound.prompt(dialogue(num_turns), Conversations())
        assert len(prompt.token_ids) <= 160
        conversation = prompt.text.removesuffix(tail(bound))
        assert dialogue(num_turns).endswith(conversation)
        assert conversation.startswith(("Customer: turn", "Agent: turn")), "cut inside a turn"
        assert bool(prompt.warnings) == (conversation != dialogue(num_turns))
        starts.append(conversation.split(" says")[0])
    assert len(set(starts)) >= 3, "the case never cuts"
    # A quarter of 160 tokens holds several turns: the start moves far less often than once a turn.
    assert len(set(starts)) <= len(starts) / 2


def test_one_turn_that_is_too_long_is_cut_inside(tokenizer: Tokenizer) -> None:
    bound = template(tokenizer, template=TEMPLATES[0], max_length=100)
    prompt = bound.prompt("Customer: " + "hello there " * 200 + "the end", Conversations())
    assert 50 <= len(prompt.token_ids) <= 100
    assert prompt.text.endswith("the end" + tail(bound))


@pytest.mark.parametrize("max_length", [40, 60, 100, 250])
@pytest.mark.parametrize(
    "text", ["Customer: " + "hello there " * 200, dialogue(60), "Agent: " + "x " * 300 + "\nCustomer: ok"]
)
def test_however_long_the_template_and_the_turns_half_of_the_room_stays_used(
    tokenizer: Tokenizer, text: str, max_length: int
) -> None:
    for num_words in (1, max_length // 8, max_length // 4):
        bound = template(tokenizer, template="{conversation}<|ask|>" + "a " * num_words + "\n", max_length=max_length)
        num_fixed = len(tokenizer.encode(prompt_text(bound, "")))
        used = len(bound.prompt(text, Conversations()).token_ids)
        assert num_fixed + (max_length - num_fixed) // 2 - 1 <= used <= max_length


def test_a_template_that_leaves_no_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContractError, match="without a conversation"):
        template(tokenizer, template="{conversation}<|ask|>" + "word " * 50 + "\n", max_length=20)
    with pytest.raises(ContractError, match="max_length"):
        template(tokenizer, template=TEMPLATES[0], max_length=100, max_model_len=50)


def test_turns_begin_at_a_role_or_else_at_a_line() -> None:
    text = "Customer: a\nb\nAgent: c"
    assert [text[at:] for at in turn_starts(text, ("Customer", "Agent"))] == ["Agent: c"]
    assert [text[at:] for at in turn_starts(text, ("Nobody",))] == ["b\nAgent: c", "Agent: c"]


def test_the_default_template_is_the_bases_chat_template_without_a_second_bos(tmp_path: Path) -> None:
    hugging_face = tiny.metaspace_tokenizer()
    hugging_face.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]<|ask|>"
    tiny.FAMILIES["llama"].save_pretrained(tmp_path)
    hugging_face.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    prompt = template(tokenizer).prompt("Customer: hi", Conversations())
    assert prompt.text == "<s>[INST] Customer: hi\nIs it done? [/INST]<|ask|>"
    encoded: Any = hugging_face(prompt.text, add_special_tokens=False)
    assert list(prompt.token_ids) == encoded["input_ids"]
    assert prompt.token_ids.count(0) == 1


def test_a_chat_template_writes_all_special_tokens_itself(tmp_path: Path) -> None:
    hugging_face = tiny.metaspace_tokenizer()
    hugging_face.chat_template = "{{ messages[0]['content'] }}<|ask|>"
    tiny.FAMILIES["llama"].save_pretrained(tmp_path)
    hugging_face.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    prompt = template(tokenizer).prompt("Customer: hi", Conversations())
    trained: Any = hugging_face.apply_chat_template(
        [{"role": "user", "content": "Customer: hi\nIs it done?"}], tokenize=True, return_dict=True
    )
    assert list(prompt.token_ids) == trained["input_ids"]


def test_a_template_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    tiny.FAMILIES["llama"].save_pretrained(tmp_path)
    tiny.metaspace_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    prompt = template(tokenizer, template="<s>{conversation}<|ask|>").prompt("hi", Conversations())
    assert prompt.token_ids.count(0) == 1


def test_without_a_chat_template_the_question_follows_the_conversation(tokenizer: Tokenizer) -> None:
    assert prompt_text(template(tokenizer), "Customer: hi") == "Customer: hi\nIs it done?\n"


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="tokenizer does not load"):
        Tokenizer(tmp_path)
