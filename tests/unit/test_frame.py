"""Prompts without a `template` are what the chat template writes, however it writes a message; `format: chat` gives it
each message."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies
from transformers import PreTrainedTokenizerFast

import tiny
from loraplex.classifier import Contract
from loraplex.errors import ContractError, InvalidRequestError
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.template import Template
from loraplex.text.tokenizer import Conversations, Tokenizer
from loraplex.types import Message

QUESTION = 'Is it "done"?'
CHATML = "{% for m in messages %}<|ask|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<|ask|>assistant\n"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer: "
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML.partition("%}")[2]
)
KINDS = {
    "as it is": CHATML,
    "stripped": CHATML.replace("m.content", "m.content | trim"),
    "twice": CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"),
    "as json": CHATML.replace("m.content", "m.content | tojson"),
    "upper case": CHATML.replace("m.content", "m.content | upper"),
    "escaped": CHATML.replace("m.content", "m.content | e"),
    "by length": CHATML.replace("{{ m.content }}", "{{ m.content | length }} {{ m.content }}"),
    "without special tokens": PLAIN,
    "thoughts left out": CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
    "tools apart": CHATML.replace("{{ m.content }}", "{% if '<tool>' in m.content %}[tool]{% endif %}{{ m.content }}"),
    "last message apart": PLAIN.replace("{{ m.content }}", "{% if loop.last %}>>{% endif %}{{ m.content }}"),
}
FITS_CHAT = ("as it is", "without special tokens", "last message apart", "thoughts left out", "tools apart")


@pytest.fixture(scope="module")
def hugging_face() -> PreTrainedTokenizerFast:
    return tiny.metaspace_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(hugging_face: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.FAMILIES["llama"].save_pretrained(folder)
    hugging_face.save_pretrained(folder)
    return Tokenizer(folder)


def bind(tokenizer: Tokenizer, text: str | None, max_model_len: int = 4096, **contract: Any) -> Template:
    values = {"question": QUESTION, "labels": ("yes", "no"), **contract}
    return Template(ChatTemplate(tokenizer, text, "base"), Contract(**values), max_model_len, "c", reads_labels=False)


def rendered(hugging_face: PreTrainedTokenizerFast, text: str, messages: Iterable[tuple[str, str]]) -> tuple[str, Any]:
    """Return what transformers makes of (role, content): text and token ids."""
    turns = [{"role": role, "content": content} for role, content in messages]
    made: Any = hugging_face.apply_chat_template(turns, chat_template=text, tokenize=False, add_generation_prompt=True)
    encoded: Any = hugging_face(made, add_special_tokens=False)
    return made, encoded["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=strategies.text(min_size=1, max_size=60).filter(str.strip))
@example(conversation="Customer: <think>a</think>b")
@example(conversation="Customer: <tool>")
def test_a_conversation_is_one_message_as_the_template_writes_it(
    hugging_face: PreTrainedTokenizerFast, tokenizer: Tokenizer, kind: str, conversation: str
) -> None:
    bound = bind(tokenizer, KINDS[kind])
    conversations = Conversations()
    prompt = bound.prompt(conversation, conversations)
    taken, _ = tokenizer.escape(conversations.normalized(conversation))
    text, ids = rendered(hugging_face, KINDS[kind], [("user", f"{taken}\n{QUESTION}")])
    assert (prompt.text, list(prompt.token_ids)) == (text, ids)


def test_where_the_template_only_strips_the_place_of_the_suffix_is_known(tokenizer: Tokenizer) -> None:
    """So a plain adapter's K/V is kept for the next turn with the most common templates, such as Llama 3's."""
    for kind, is_known in (("as it is", True), ("stripped", True), ("twice", False)):
        bound = bind(tokenizer, KINDS[kind])
        assert (bound.prompt("Customer: hello", Conversations()).num_conversation > 5) == is_known, kind


def test_a_template_that_leaves_the_message_out_is_refused(tokenizer: Tokenizer) -> None:
    for text in ("Hello!", "{% for m in messages %}{{ m.role }}{% endfor %}"):
        with pytest.raises(ContractError, match="leaves the user's message out"):
            bind(tokenizer, text)
    with pytest.raises(ContractError, match="refuses the messages: nothing pleases me"):
        bind(tokenizer, "{{ raise_exception('nothing pleases me') }}")


TURNS = strategies.lists(
    strategies.tuples(strategies.sampled_from(["user", "assistant", "system"]), strategies.text(max_size=30)),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("kind", FITS_CHAT)
@pytest.mark.parametrize("question", [QUESTION, None])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS)
def test_each_message_is_one_of_the_template_and_the_question_the_last(
    hugging_face: PreTrainedTokenizerFast,
    tokenizer: Tokenizer,
    kind: str,
    question: str | None,
    turns: list[tuple[str, str]],
) -> None:
    bound, conversations = bind(tokenizer, KINDS[kind], format="chat", question=question), Conversations()
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    if not any(content.strip() for _, content in turns):
        with pytest.raises(InvalidRequestError, match="empty"):
            bound.prompt(messages, conversations)
        return
    prompt = bound.prompt(messages, conversations)
    taken = [(role, tokenizer.escape(conversations.normalized(content))[0]) for role, content in turns]
    asked = [*taken, ("user", question)] if question is not None else taken
    text, ids = rendered(hugging_face, KINDS[kind], asked)
    assert (prompt.text, list(prompt.token_ids)) == (text, ids)


def test_classifiers_with_other_questions_share_a_chat_up_to_the_question(tokenizer: Tokenizer) -> None:
    conversations, turns = Conversations(), (Message(role="user", content="hi"), Message(role="assistant", content="s"))
    chat, prompts = ChatTemplate(tokenizer, CHATML, "base"), []
    for word in ("new", "old", "blue"):
        contract = Contract(format="chat", question=f"Is it {word}?", labels=("yes", "no"))
        prompts.append(Template(chat, contract, 4096, "c").prompt(turns, conversations))
    shared = prompts[0].num_conversation
    assert {prompt.num_conversation for prompt in prompts} == {shared}
    assert len({prompt.token_ids[:shared] for prompt in prompts}) == 1
    assert conversations.encode.cache_info().misses == 1, "the conversation is tokenized once"
    assert conversations.render.cache_info().misses == 1, "and rendered once"


def test_a_text_is_one_message_of_the_user(hugging_face: PreTrainedTokenizerFast, tokenizer: Tokenizer) -> None:
    prompt = bind(tokenizer, CHATML, format="chat").prompt("hello\r\nthere ", Conversations())
    assert prompt.text == rendered(hugging_face, CHATML, [("user", "hello\nthere"), ("user", QUESTION)])[0]


def test_a_template_that_reads_parts_gets_them(tokenizer: Tokenizer) -> None:
    """As those of vision-language bases: they leave out a content that is text."""
    parts = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    chat = ChatTemplate(tokenizer, CHATML.replace("{{ m.content }}", parts), "base")
    turns = (Message(role="user", content="hi<|ask|>"),)
    assert chat.chat(turns, {})[0] == ChatTemplate(tokenizer, CHATML, "base").chat(turns, {})[0]
    contract = Contract(question=QUESTION, labels=("yes", "no"))
    assert "hello" in Template(chat, contract, 4096, "c").prompt("hello", Conversations()).text


def test_special_tokens_in_messages_stay_text(tokenizer: Tokenizer) -> None:
    turns = (Message(role="user", content="a<|ask|>b"), Message(role="assistant", content="c</s>"))
    prompt = bind(tokenizer, CHATML, format="chat").prompt(turns, Conversations())
    assert prompt.token_ids.count(tiny.SPECIAL_TOKENS.index("<|ask|>")) == 4  # the template's own
    assert "'<|ask|>', '</s>'" in prompt.warnings[0]


def test_a_long_chat_loses_its_oldest_messages(tokenizer: Tokenizer) -> None:
    bound, starts = bind(tokenizer, CHATML, format="chat", max_length=400), []
    for num_turns in range(1, 40):
        turns = tuple(
            Message(role=("user", "assistant")[i % 2], content=f"turn {i} says hello") for i in range(num_turns)
        )
        prompt = bound.prompt(turns, Conversations())
        assert len(prompt.token_ids) <= 400 and f"turn {num_turns - 1} says hello</s>" in prompt.text
        starts.append(prompt.text.split(" says")[0])
        assert starts[-1].startswith(("<|ask|>user\nturn ", "<|ask|>assistant\nturn ")), "cut inside a message"
        assert bool(prompt.warnings) == (starts[-1] != "<|ask|>user\nturn 0")
    assert 3 <= len(set(starts)) <= len(starts) / 2, "the start stays put"
    for long in ("hello " * 500 + "the end", "x" * 100_000 + " the end"):
        prompt = bound.prompt(long, Conversations())
        assert "the end</s>" in prompt.text and 200 <= len(prompt.token_ids) <= 400


def test_a_tokenizer_may_have_no_special_token(hugging_face: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    made = json.loads(hugging_face.backend_tokenizer.to_str())
    for token in made["added_tokens"]:
        token["special"] = False
    tiny.FAMILIES["llama"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    plain = Tokenizer(tmp_path)
    assert not plain.special_ids
    prompt = bind(plain, PLAIN, format="chat").prompt("hello", Conversations())
    assert prompt.text == f"user: hello\nuser: {QUESTION}\nanswer: "


def test_the_last_cut_is_the_last_of_all(tokenizer: Tokenizer) -> None:
    assert tokenizer.last_cut("hello") == 0
    assert tokenizer.last_cut("<|ask|>a</s>b<|ask|>c") == len("<|ask|>a</s>b")
    assert tokenizer.last_cut("<|ask|>a<|ask|>b</s>c") == len("<|ask|>a<|ask|>b")


def test_what_a_chat_template_does_not_take_is_refused_when_it_is_bound(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContractError, match="no chat template"):
        bind(tokenizer, None, format="chat")
    with pytest.raises(ContractError, match=r"roles must alternate.*behind a user's"):
        bind(tokenizer, ALTERNATES, format="chat")
    assert bind(tokenizer, ALTERNATES, format="chat", question=None)
    for kind in set(KINDS) - set(FITS_CHAT) - {"stripped"}:
        with pytest.raises(ContractError, match="does not write the question as it is"):
            bind(tokenizer, KINDS[kind], format="chat")
    with pytest.raises(InvalidRequestError, match="refuses the messages: roles must alternate"):
        bind(tokenizer, ALTERNATES, format="chat", question=None).prompt(
            (Message(role="assistant", content="hi"),), Conversations()
        )


@pytest.mark.parametrize("contract", [{}, {"format": "chat"}, {"template": "{conversation}<|ask|>{question} "}])
def test_the_answers_start_stands_at_the_prompts_end(tokenizer: Tokenizer, contract: Any) -> None:
    for text in (KINDS["as it is"], KINDS["twice"] if not contract else PLAIN):
        plain, started = (bind(tokenizer, text, answer_start=start, **contract) for start in ("", '{"score": "'))
        prompts = [one.prompt("hello", Conversations()) for one in (plain, started)]
        assert prompts[1].text == prompts[0].text + '{"score": "'
        assert list(prompts[1].token_ids) == tokenizer.encode(
            prompts[1].text, add_special_tokens=contract.get("template") is not None
        )


def test_a_label_that_merges_with_the_answers_start_is_refused_and_the_remedy_works(tokenizer: Tokenizer) -> None:
    def made(start: str, *labels: str) -> Template:
        contract = Contract(template="{conversation}<|ask|>", answer_start=start, labels=labels)
        return Template(ChatTemplate(tokenizer, None, "base"), contract, 4096, "c")

    with pytest.raises(ContractError, match=r"'yes' merges with .*move the end of 'answer_start'"):
        made("say ", "yes", "no")
    assert made("say", " yes", " no").label_ids.keys() == {" yes", " no"}
