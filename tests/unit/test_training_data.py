"""What training makes of data: prompts as the server writes them, a split without leaks, contracts, calibration."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from loraplex.errors import ConfigurationError, ContractError
from loraplex.evaluation.calibration import fit
from loraplex.labelled import Label, Labelled, label_shares
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Conversations, Tokenizer
from loraplex.training.asked import ask, to_score, to_train
from loraplex.training.contracts import make_task, read_questions, seen_labels
from loraplex.training.settings import TrainSettings
from loraplex.training.split import report_on, split_rows
from loraplex.types import Message

PATH = Path("data.jsonl")
CHAT = "{% for m in messages %}<|ask|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{{ '<|ask|>assistant\n' }}"


def row(text: str, line: int = 1, **labels: Label) -> Labelled:
    return Labelled(line=line, input=text, labels=labels)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.byte_level_tokenizer().save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer, CHAT, "base")


def test_a_split_keeps_a_conversation_on_one_side_and_its_shares() -> None:
    draw = random.Random(0)
    rows = [row(f"text {index % 300}", done=draw.random() < 0.1) for index in range(400)]
    split = split_rows(rows, dev=0.2, calibration=0.1, seed=1)
    sides = {side: set(getattr(split, side)) for side in ("train", "dev", "calibration")}
    assert set.union(*sides.values()) == set(range(400)) and sum(map(len, sides.values())) == 400
    texts = {side: {rows[index].input for index in indices} for side, indices in sides.items()}
    assert not texts["train"] & texts["dev"] and not texts["dev"] & texts["calibration"]
    for side, share in (("train", 0.7), ("dev", 0.2), ("calibration", 0.1)):
        assert len(sides[side]) == pytest.approx(400 * share, abs=8)
        positive = sum(rows[index].labels["done"] is True for index in sides[side])
        assert positive == pytest.approx(share * sum(one.labels["done"] is True for one in rows), abs=4)
    assert split == split_rows(rows, dev=0.2, calibration=0.1, seed=1)
    assert split != split_rows(rows, dev=0.2, calibration=0.1, seed=2)


def test_the_report_counts_what_is_odd() -> None:
    rows = [row("Hello  there", a=True), row("hello there", a=False, b="x"), row("bye", b={"x": 0.25, "y": 0.75})]
    found = report_on(rows, {"a": ["yes", "no"], "b": ["x", "y"]}, split_rows(rows, dev=0, calibration=0, seed=0), [])
    assert found.counts == {"a": {"yes": 1, "no": 1}, "b": {"x": 1.25, "y": 0.75}}
    assert (found.num_duplicates, found.contradictions, found.missing) == (1, {"a": 1, "b": 0}, {"a": 1, "b": 1})
    assert found.split == {"train": 3, "dev": 0, "calibration": 0}
    assert not found.unseen and found.num_trained == {"a": 2, "b": 2}


def test_a_label_that_one_side_lacks_is_told_and_a_rare_one_is_trained_on() -> None:
    rows = [row(f"text {index}", a="rare" if index == 7 else ("x", "y")[index % 2]) for index in range(60)]
    for seed in range(10):
        split = split_rows(rows, dev=0.3, calibration=0.3, seed=seed)
        found = report_on(rows, {"a": ["x", "y", "rare", "never"]}, split, [], num_unlabelled=4)
        assert set(found.unseen) == {
            ("a", "rare", "dev"),
            ("a", "rare", "calibration"),
            *(("a", "never", side) for side in ("train", "dev", "calibration")),
        }
        assert found.num_trained == {"a": 3} and found.num_unlabelled == 4


def test_shares_of_votes_are_split_by_the_likeliest_label() -> None:
    draw = random.Random(0)
    shares = [draw.random() for _ in range(200)]
    rows = [row(f"text {index}", a={"x": one, "y": 1 - one}) for index, one in enumerate(shares)]
    split = split_rows(rows, dev=0.2, calibration=0.2, seed=0)
    assert [len(getattr(split, side)) for side in ("train", "dev", "calibration")] == [120, 40, 40]


def test_lines_that_do_not_fit_and_lines_that_make_no_prompt_are_told_apart(chat: ChatTemplate) -> None:
    settings = TrainSettings(max_length=40)
    task = make_task("done", {}, ("yes", "no"), chat, settings, 256)
    rows = [row("hello", 1, done=True), row("hello\n" * 60, 2, done=True)]

    def asked(rows: list[Labelled]) -> Any:
        return ask(PATH, rows, ["done"], [task.template], [("yes", "no")], is_shared=True)

    found, too_long = asked(rows)
    assert [one.row for one in found] == [0, 1] and [(one.row, one.is_left_out) for one in too_long] == [(1, False)]
    with pytest.raises(ConfigurationError, match=r"data\.jsonl: lines 3-4: .*unknown role 'narrator'"):
        asked(
            [
                *rows,
                *(
                    Labelled(line=line, input=(Message(role="narrator", content="x"),), labels={"done": True})
                    for line in (3, 4)
                ),
            ]
        )


LLAMA_3 = (  # how Llama 3 cuts a text into words: a full stop takes the line breaks behind it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("prompt", ["short", "question"])
@pytest.mark.parametrize("words", ["gpt2", "llama3"])
def test_the_invocation_is_what_stands_in_the_prompt_where_its_text_merges_with_its_neighbours(
    tmp_path: Path, prompt: Any, words: str
) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == "gpt2")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = (
        byte_level
        if words == "gpt2"
        else pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated"), byte_level])
    )
    bpe.decoder = decoders.ByteLevel()
    corpus = ["no.\n\nAnswer: yes", "hello?\n\nAnswer: no", "I said so.\n\nQuestion: Is it done?\nAnswer: yes"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    settings = TrainSettings(prompt=prompt)
    task = make_task(
        "done", {"question": "Is it done?"}, ("yes", "no"), ChatTemplate(tokenizer, None, "base"), settings, 256
    )
    assert task.invocation is not None and len(task.invocation) >= 2
    acts_on = "Question: Is it done?\nAnswer:" if prompt == "question" else "Answer:"
    for text in ("I said so.", "is it", "it is 12", "why?!"):
        found = task.template.prompt(text, Conversations())
        active = "".join(map(tokenizer.decode, found.token_ids[found.activation :]))
        assert active.strip("\n") == acts_on


def test_a_template_with_a_question_asks_it() -> None:
    """Whatever --prompt says."""
    with pytest.raises(ConfigurationError, match="has no question, and its prompt asks one"):
        make_task("done", {}, ("yes", "no"), None, TrainSettings(template="{conversation} {question}"), 256)  # type: ignore[arg-type]


def test_a_classifier_with_a_head_needs_no_tokens_of_its_labels(tokenizer: Tokenizer) -> None:
    plain = ChatTemplate(tokenizer, None, "base")
    task = make_task("done", {}, ("ye", "yes", "y"), plain, TrainSettings(kind="score"), 256)
    assert task.contract.labels == ("ye", "yes", "y") and task.label_ids == [(0,), (1,), (2,)]
    assert task.invocation is None


def test_shares_of_votes_sum_to_one() -> None:
    assert label_shares({"b": 0.6, "a": 0.4}, ["a", "b", "c"], "mood") == {1: 0.6, 0: 0.4}
    assert label_shares(False, ["yes", "no"], "done") == {1: 1.0}


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["calm", {"angry": 1.0}, "Bored"], ("angry", "Bored", "calm")),
        ([False, True], ("yes", "no")),
        ([False], ("yes", "no")),
        (["maybe", "No", "Yes"], ("Yes", "maybe", "No")),
        (["false", "true"], ("true", "false")),
        (["0", "1"], ("1", "0")),
        (["negative", "positive"], ("positive", "negative")),
        (["not yet", "yes"], ("yes", "not yet")),
    ],
)
def test_the_order_of_labels_does_not_depend_on_the_order_of_lines(labels: list[Any], order: tuple[str, ...]) -> None:
    rows = [row("", a=label) for label in labels] + [row("")]
    assert seen_labels(rows, "a") == seen_labels(rows[::-1], "a") == order


@pytest.mark.parametrize(
    ("prompt", "active", "prompt_end"),
    [
        ("short", "<|ask|>assistant\n", "<|ask|>user\nhello</s>\n<|ask|>assistant\n"),
        (
            "question",
            "<|ask|>user\nIs it done?</s>\n<|ask|>assistant\n",
            "<|ask|>user\nhello</s>\n<|ask|>user\nIs it done?</s>\n<|ask|>assistant\n",
        ),
    ],
)
def test_prompts_are_the_chat_template_s(
    chat: ChatTemplate, tokenizer: Tokenizer, prompt: Any, active: str, prompt_end: str
) -> None:
    task = make_task("done", {"question": "Is it done?"}, ("yes", "no"), chat, TrainSettings(prompt=prompt), 256)
    [one], too_long = ask(PATH, [row("hello", done=True)], ["done"], [task.template], [("yes", "no")], is_shared=True)
    assert not too_long
    assert tokenizer.decode(*one.prefix, *one.suffix) == prompt_end
    assert tokenizer.decode(*one.suffix) == active


def test_a_base_without_a_chat_template_gets_a_plain_prompt(tokenizer: Tokenizer) -> None:
    plain = ChatTemplate(tokenizer, None, "base")
    task = make_task("done", {}, ("yes", "no"), plain, TrainSettings(kind="lora"), 256)
    assert task.contract.labels == (" yes", " no") and task.contract.template == "{conversation}\n\nAnswer:"


@pytest.mark.parametrize(
    ("settings", "given", "labels", "error", "what"),
    [
        ({"prompt": "question"}, {}, ("yes", "no"), ConfigurationError, "has no question"),
        ({}, {}, ("yes",), ConfigurationError, "only the label 'yes'"),
        ({}, {"labels": ["a", "b"], "lables": 1}, ("yes", "no"), ContractError, "lables"),
        ({"template": "{conversation}"}, {}, ("yes", "no"), ConfigurationError, "not always the same"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(
    chat: ChatTemplate,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    labels: tuple[str, ...],
    error: type[Exception],
    what: str,
) -> None:
    with pytest.raises(error, match=what):
        make_task("done", given, labels, chat, TrainSettings(**settings), 256)


def test_questions_are_texts_or_contracts(tmp_path: Path) -> None:
    path = tmp_path / "questions.yaml"
    path.write_text("a: Is it?\nb: {question: 'Is it not?', labels: [x, y]}\n")
    assert read_questions(path) == {"a": {"question": "Is it?"}, "b": {"question": "Is it not?", "labels": ["x", "y"]}}
    path.write_text("a: 5\n")
    with pytest.raises(ConfigurationError, match="key 'a'"):
        read_questions(path)


def test_conversations_are_shared_and_labels_of_several_tokens_spelled() -> None:
    label_ids: list[list[tuple[int, ...]]] = [[(7,), (8,)], [(9, 10), (9, 11)]]
    rows = [row("x", a=True, b={"p": 0.25, "q": 0.75}), row("y", b="q")]

    class Told:
        """Stands for a template: one token of conversation, two tokens that the adapter changes."""

        def prompt(self, given: str, conversations: object) -> Any:
            from loraplex.text.prompt import Prompt

            return Prompt(text=given, token_ids=(ord(given), 1, 2), num_conversation=1, activation=1)

    template: Any = Told()
    asked, _ = ask(PATH, rows, ["a", "b"], [template, template], [("yes", "no"), ("p", "q")], is_shared=True)
    first, second = to_train(asked, label_ids, [[2.0, 1.0], [1.0, 1.0]])
    assert first.token_ids == (ord("x"),) and second.token_ids == (ord("y"),)
    found = [
        (one.adapter, one.token_ids, [(a.position, a.token_id, a.weight) for a in one.answers])
        for one in first.questions
    ]
    assert found == [
        (0, (1, 2), [(1, 7, 2.0)]),
        (1, (1, 2, 9), [(1, 9, 0.25), (2, 10, 0.25)]),
        (1, (1, 2, 9), [(1, 9, 0.75), (2, 11, 0.75)]),
    ]
    scored, read = to_score(asked, label_ids)
    assert sum(len(question.answers) for one in scored for question in one.questions) == len(read)
    assert read == [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1), (2, 0), (2, 0), (2, 1), (2, 1)]


def test_calibration_finds_the_temperature_and_the_bias_that_were_added() -> None:
    draw = numpy.random.default_rng(0)
    true_logits = draw.normal(size=(4000, 1)) * 2 - 1
    truth = draw.random((4000, 1)) < 1 / (1 + numpy.exp(-true_logits))
    shares = numpy.hstack([truth, ~truth]).astype(float)
    spoiled = numpy.hstack([true_logits * 3 + 1.5, numpy.zeros_like(true_logits)])  # too sure, and leaning to yes
    temperature, bias = fit(spoiled.tolist(), shares.tolist(), [0.0, 0.0])
    assert temperature == pytest.approx(3, rel=0.15)
    assert bias[0] - bias[1] == pytest.approx(-1.5, abs=0.4)


def test_without_conversations_calibration_only_takes_the_weights_off() -> None:
    known = [-math.log(2.0), 0.0]
    assert fit([], [], known) == (1.0, known)
    temperature, bias = fit([[-0.1, -2.0]], [[1.0, 0.0]], known)
    assert 0.5 < temperature < 2 and bias[0] == pytest.approx(known[0], abs=0.5)
