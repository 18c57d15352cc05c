"""How a question is put to the bare base: its prompt, and the tokens that are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from asked import CHATML, QUESTIONS
from loraplex.errors import ConfigurationError, InputTooLongError, InvalidRequestError
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.codes import LETTERS, MAX_BEGINNINGS, PAIRS, Codes, beginnings
from loraplex.text.question import Presentation, QuestionPrompts
from loraplex.text.tokenizer import Conversations, Tokenizer
from loraplex.types import Question, QuestionType

TEXT = "Customer: hello"
Made = Callable[[PreTrainedTokenizerFast], Tokenizer]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def make(hugging_face: PreTrainedTokenizerFast) -> Tokenizer:
        tiny.FAMILIES["llama"].save_pretrained(tmp_path)
        hugging_face.save_pretrained(tmp_path)
        return Tokenizer(tmp_path)

    return make


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """One token for each word, and one for all that are unknown."""
    tokenizer = Backend(models.WordLevel({"[UNK]": 0, **{word: 1 + i for i, word in enumerate(vocabulary)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def prompts(
    tokenizer: Tokenizer, template: str | None = CHATML, size: int = 2048, turned: bool = True
) -> QuestionPrompts:
    return QuestionPrompts(ChatTemplate(tokenizer, template, "base"), size, in_both_orders=turned)


def written(made: QuestionPrompts, question: Question) -> list[str]:
    return [one.template.prompt(TEXT, Conversations()).text for one in made.present(question)]


def test_the_question_stands_in_a_message_of_its_own_behind_the_text(made: Made) -> None:
    one, turned = written(prompts(made(tiny.byte_level_tokenizer())), QUESTIONS["topic"])
    head = f"<|ask|>user\n{TEXT}</s>\n<|ask|>user\nQuestion about the text above: What is it about?\n"
    assert one == head + (
        "- table: a table for two\n- payment\n- other\nAnswer with the name of one option.</s>\n<|ask|>assistant\n"
    )
    assert turned == head + (
        "- other\n- payment\n- table: a table for two\nAnswer with the name of one option.</s>\n<|ask|>assistant\n"
    )


def test_only_letters_change_hands_in_the_reverse_order(made: Made) -> None:
    questions = prompts(made(tiny.byte_level_tokenizer()))
    for name, end, end_turned in (
        ("isDone", "done?\nAnswer with one word, yes or no.", "done?\nAnswer with one word, no or yes."),
        ("hurry", "0. calm\n1. soon\n2. now\n", "2. now\n1. soon\n0. calm\n"),
        ("topic", "table for two\n- payment\n", "- payment\n- table"),
    ):
        one, turned = written(questions, QUESTIONS[name])
        assert end in one and end_turned in turned
        first, second = questions.present(QUESTIONS[name])
        assert first.answers == second.answers
    one, turned = written(questions, QUESTIONS["alike"])
    assert "A. done before the end of today\nB. done before the end of the week\nAnswer with the letter" in one
    assert "A. done before the end of the week\nB. done before the end of today\nAnswer with the letter" in turned
    first, second = questions.present(QUESTIONS["alike"])
    assert first.answers == second.answers[::-1]


@pytest.mark.parametrize(
    ("labels", "descriptions", "lines"),
    [
        (("true", "false"), {}, []),
        (("yes", "no"), {"yes": "it is paid"}, ["yes. it is paid", "no."]),
        (("paid", "open"), {"open": "money is due"}, ["yes. paid", "no. open: money is due"]),
    ],
)
def test_a_predicate_says_what_yes_and_no_mean_where_they_do_not_say_it(
    made: Made, labels: tuple[str, ...], descriptions: dict[str, str], lines: list[str]
) -> None:
    question = Question(type="predicate", instructions="Is it?", labels=labels, descriptions=descriptions)
    [text] = written(prompts(made(tiny.byte_level_tokenizer()), turned=False), question)
    between = text.partition("above: Is it?\n")[2].partition("Answer with")[0].splitlines()
    assert between == lines


ONE_MESSAGE = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHATML


def test_a_chat_template_that_refuses_two_messages_gets_one(made: Made) -> None:
    [text] = written(prompts(made(tiny.byte_level_tokenizer()), ONE_MESSAGE, turned=False), QUESTIONS["isDone"])
    assert text.startswith(f"<|ask|>user\n{TEXT}\n\nQuestion about the text above: Is")


def test_a_base_that_thinks_is_told_not_to(made: Made) -> None:
    thinks = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    [text] = written(prompts(made(tiny.byte_level_tokenizer()), thinks, turned=False), QUESTIONS["isDone"])
    assert text.endswith("assistant\n<think></think>")


def test_without_a_chat_template_the_prompt_is_plain_text(made: Made) -> None:
    [text] = written(prompts(made(tiny.byte_level_tokenizer()), None, turned=False), QUESTIONS["isDone"])
    assert text.startswith(f"{TEXT}\n\nQuestion about the text above: Is") and text.endswith("\nAnswer:")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('never') }}", "{{ messages[-1].content }}", "hello", "{{ messages[0].content * 2 }}"],
)
def test_a_chat_template_without_a_place_for_both_is_refused_at_the_start(made: Made, template: str) -> None:
    tokenizer = made(tiny.byte_level_tokenizer())
    if template.startswith("{{ messages[-1]"):  # writes both, where they are one message
        assert written(prompts(tokenizer, template, turned=False), QUESTIONS["isDone"])[0].startswith(TEXT)
        return
    with pytest.raises(ConfigurationError, match="--adhoc-questions") as caught:
        prompts(tokenizer, template)
    assert "chat template" in caught.value.message


def test_texts_of_the_caller_write_no_special_tokens(made: Made) -> None:
    tokenizer = made(tiny.byte_level_tokenizer())
    told = Question(type="choice", instructions="a</s>b", labels=("<s>", "x"), descriptions={"x": "<|ask|>"})
    [one] = prompts(tokenizer, turned=False).present(told)
    plain = prompts(tokenizer, turned=False).present(QUESTIONS["untold"])[0]
    special = [
        [
            token
            for token in presented.template.prompt(TEXT, Conversations()).token_ids
            if token in tokenizer.special_ids
        ]
        for presented in (one, plain)
    ]
    assert special[0] == special[1]


def test_a_question_that_fills_the_base_is_refused(made: Made) -> None:
    with pytest.raises(InputTooLongError, match="no room"):
        prompts(made(tiny.byte_level_tokenizer())).present(Question(type="predicate", instructions="Is it? " * 2000))


@pytest.mark.parametrize("end", ["\n", "</s>\n", "Answer:"])
def test_no_answer_begins_another_and_each_code_is_read_in_the_same_forms(made: Made, end: str) -> None:
    for tokenizer in (tiny.byte_level_tokenizer(), tiny.metaspace_tokenizer(), tiny.metaspace_tokenizer("always")):
        codes = Codes(made(tokenizer), f"hello{end}", add_special_tokens=True)
        for type, num in (("predicate", 2), ("choice", 2), ("choice", 20), ("score", 5), ("score", 10)):
            coding = codes.of(type, [f"{i}, which is a label of its own" for i in range(num)])  # type: ignore[arg-type]
            found = [ids for answers in coding.answers for ids in answers]
            assert len(coding.answers) == num and len(set(map(len, coding.answers))) == 1
            assert len(set(found)) == len(found) and beginnings(coding.answers).isdisjoint(found)


def labels(num: int) -> list[str]:
    return [f"{i}, which is a label of its own" for i in range(num)]


def test_short_labels_stand_for_themselves_in_every_spelling(made: Made) -> None:
    codes = Codes(made(words("hello", "paid", "Paid", "not", "open", "A", "B")), "hello", add_special_tokens=False)
    coding = codes.of("choice", ["paid", "not paid"])
    assert (coding.kind, coding.codes, coding.answers) == ("names", ("paid", "not paid"), (((2,),), ((4, 2),))), (
        "no word is Not"
    )
    assert codes.of("choice", ["not paid", "not open"]).answers == (((4, 2),), ((4, 5),))
    for alike in (["not", "not open"], ["paid", "open " * 9], ["paid", "paid"], ["paid", "unknown"]):
        assert codes.of("choice", alike).kind == "letters", "one begins the other, is long, is the same, or is unknown"


def test_labels_that_take_many_tokens_are_asked_by_letters(made: Made) -> None:
    """A label's beginnings are computed behind the prompt."""
    codes = Codes(made(tiny.byte_level_tokenizer()), "hello\n", add_special_tokens=True)
    coding = codes.of("choice", ["billing", "delivery", "other"])
    assert coding.kind == "names" and len(beginnings(coding.answers)) <= MAX_BEGINNINGS
    assert {len(answers) for answers in coding.answers} == {2}, "four forms take too many"
    assert codes.of("choice", [f"{letter}xyzwvutsrqponml" for letter in "abcdef"]).kind == "letters"


@pytest.mark.parametrize(
    ("type", "given", "codes_"),
    [
        ("predicate", ("no", "yes"), ("no", "yes")),
        ("predicate", ("False", "True"), ("no", "yes")),
        ("predicate", ("open", "paid"), ("yes", "no")),
        ("score", ("1", "2", "3"), ("1", "2", "3")),
        ("score", ("3", "2"), ("3", "2")),
        ("score", ("low", "high"), ("0", "1")),
        ("score", ("-1", "0", "1"), ("A", "B", "C")),
        ("score", ("9", "10"), ("A", "B")),
    ],
)
def test_a_code_never_contradicts_its_label(
    made: Made, type: QuestionType, given: tuple[str, ...], codes_: tuple[str, ...]
) -> None:
    codes = Codes(made(tiny.byte_level_tokenizer()), "hello\n", add_special_tokens=True)
    coding, alone = codes.of(type, given), codes.of("predicate" if type == "predicate" else "score", labels(2))
    assert coding.codes == codes_
    if type == "predicate":
        assert coding.answers == tuple(dict(zip(alone.codes, alone.answers, strict=True))[code] for code in codes_)


def test_levels_that_are_numbers_are_shown_as_they_are(made: Made) -> None:
    question = Question(type="score", instructions="How sure?", labels=("1", "2", "3"), descriptions={"3": "certain"})
    one, turned = written(prompts(made(tiny.byte_level_tokenizer())), question)
    assert "sure?\n- 1\n- 2\n- 3: certain\nAnswer with the number" in one
    assert "sure?\n- 3: certain\n- 2\n- 1\nAnswer with the number" in turned


def test_unknown_words_are_not_told_apart(made: Made) -> None:
    codes = Codes(made(words("hello", "A", "B", "no", "0", "1")), "hello", add_special_tokens=False)
    assert codes.of("choice", labels(2)).codes == ("A", "B") and codes.of("score", labels(2)).codes == ("0", "1")
    assert codes.of("predicate", labels(2)).codes == ("A", "B"), "yes is unknown"
    with pytest.raises(InvalidRequestError, match=r"4 labels.*keeps 2 apart"):
        codes.of("choice", labels(4))


def test_more_than_26_labels_get_two_letters(made: Made) -> None:
    codes = Codes(made(words("hello", *LETTERS, *PAIRS)), "hello", add_special_tokens=False)
    assert codes.of("choice", labels(26)).codes == LETTERS
    assert codes.of("choice", labels(255)).codes == codes.of("score", labels(255)).codes == PAIRS[:255]


def test_pairs_that_are_several_tokens_are_told_apart_by_all_of_them(made: Made) -> None:
    """As many as a request may have, on tokenizers that know no two letters as one token."""
    for tokenizer in (tiny.byte_level_tokenizer(), tiny.metaspace_tokenizer(), tiny.metaspace_tokenizer("always")):
        codes = Codes(made(tokenizer), "hello</s>\n", add_special_tokens=True)
        for type in ("choice", "score"):
            coding = codes.of(type, labels(255))
            assert len(set(coding.codes)) == 255 and all(coding.answers)
            answers = [answer for answers in coding.answers for answer in answers]
            begun = {answer[:num] for answer in answers for num in range(1, len(answer))}
            assert len(set(answers)) == len(answers) and begun.isdisjoint(answers)
            assert len(begun) < 30, "a pass computes few tokens more"


def test_what_is_read_is_a_tree(made: Made) -> None:
    template = prompts(made(tiny.byte_level_tokenizer()), turned=False).present(QUESTIONS["isDone"])[0].template
    presentation = Presentation(template=template, answers=(((7, 8), (9, 8)), ((7, 6),), ((5,),)))
    assert presentation.reads == {(): (7, 9, 5), (7,): (8, 6), (9,): (8,)}


def test_a_long_answers_tokens_fit_behind_the_prompt(made: Made) -> None:
    """A text is cut so that the pairs' first letters still fit."""
    tokenizer = made(tiny.byte_level_tokenizer())
    [few], [many] = (
        prompts(tokenizer, size=2000, turned=False).present(Question(type="choice", instructions="?", labels=labels_))
        for labels_ in (tuple("abcd"), tuple(map(str, range(100))))
    )
    for presented, num in ((few, 2000), (many, 1998)):
        prompt = presented.template.prompt("hello \n" * 2000, Conversations())
        assert len(prompt.token_ids) <= num
    assert max(len(answer) for answers in many.answers for answer in answers) == 3, "a space and two letters"
