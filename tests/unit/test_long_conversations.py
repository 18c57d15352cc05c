"""A long conversation is cut to what the tokenizer makes of its end, and little more than the end is tokenized."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from tokenizers import Regex, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from checks import prompt_text, tail
from loraplex.classifier import Contract, normalized
from loraplex.text import template as template_module
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.template import Template
from loraplex.text.tokenizer import Conversations, Tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def llama_3_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with the split of Llama 3."""
    hugging_face = tiny.byte_level_tokenizer()
    backend: Any = hugging_face.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return hugging_face


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As T5 has it: pieces by probability. A run of unknown characters is one token, however long."""
    hugging_face = tiny.metaspace_tokenizer()
    backend: Any = hugging_face.backend_tokenizer
    backend.model = models.Unigram()
    trainer = trainers.UnigramTrainer(
        vocab_size=tiny.VOCAB_SIZE,
        special_tokens=[*tiny.SPECIAL_TOKENS, "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(tiny.CORPUS, trainer)
    return hugging_face


KINDS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": tiny.byte_level_tokenizer,
    "llama-3": llama_3_tokenizer,
    "metaspace": tiny.metaspace_tokenizer,
    "metaspace-always": functools.partial(tiny.metaspace_tokenizer, "always"),
    "unigram": unigram_tokenizer,
}
BYTE_LEVEL = ("byte-level", "llama-3")
TEMPLATE = "{conversation}<|ask|>Is it done?\n"
MAX_LENGTH = 40
PIECES = strategies.one_of(
    strategies.text(max_size=12),
    strategies.sampled_from(["\r\n", "\nCustomer: ", "\nAgent: yes, it is done", " ", "\n\n", "<|ask|>", "</s>"]),
    strategies.sampled_from(["x", " ", "\u00e9", "e\u0301", "\u0301", "👩‍👩‍👧‍👦", "字", "hello ", "0", "\t"]).flatmap(
        lambda piece: strategies.integers(1, 300).map(lambda times: piece * times)
    ),
)
TEXTS = strategies.lists(PIECES, min_size=1, max_size=12).map("".join)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hugging_face(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@pytest.fixture(scope="module")
def tokenizer(hugging_face: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.FAMILIES["llama"].save_pretrained(folder)
    hugging_face.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def bound(tokenizer: Tokenizer) -> Template:
    return bind(tokenizer, MAX_LENGTH)


def bind(tokenizer: Tokenizer, max_length: int) -> Template:
    contract = Contract(labels=("yes", "no"), template=TEMPLATE, max_length=max_length)
    return Template(ChatTemplate.of(tokenizer), contract, 4096, "classifier.yaml", reads_labels=False)


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text.strip())


class Counted(Conversations):
    """Counts the characters that are tokenized."""

    def __init__(self) -> None:
        super().__init__()
        self.num_chars = 0
        self.encode, self.offsets = self._counted(Tokenizer.encode), self._counted(Tokenizer.offsets)  # type: ignore[assignment]

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tokenizer: Tokenizer, text: str, **options: Any) -> Any:
            self.num_chars += len(text)
            return call(tokenizer, text, **options)

        return counted


@contextmanager
def all_tokenized() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_module, "_CHARS_PER_TOKEN", 1 << 40)
        yield


def dialogue(num_turns: int) -> str:
    return "\n".join(f"{'Agent' if i % 2 else 'Customer'}: turn {i} says hello" for i in range(num_turns))


@QUICK
@given(text=TEXTS)
def test_a_prompt_is_what_the_tokenizer_makes_of_the_texts_end(
    kind: str, hugging_face: PreTrainedTokenizerFast, tokenizer: Tokenizer, bound: Template, text: str
) -> None:
    if not is_text(text):
        return
    prompt = bound.prompt(text, Conversations())
    escaped, kept = (
        tokenizer.escape(normalized(text))[0],
        prompt.text.removesuffix(tail(bound)),
    )
    encoded: Any = hugging_face(prompt.text)
    assert list(prompt.token_ids) == encoded["input_ids"] and len(prompt.token_ids) <= MAX_LENGTH
    assert escaped.endswith(kept)
    if kind in BYTE_LEVEL and escaped.removesuffix(kept).endswith("\n") and kept.startswith(("Customer:", "Agent:")):
        whole = tokenizer.encode(prompt_text(bound, escaped))
        assert tuple(whole[-len(prompt.token_ids) :]) == prompt.token_ids, "not the tokens of the whole"


@QUICK
@given(text=TEXTS)
def test_the_same_texts_are_cut_as_with_everything_tokenized(tokenizer: Tokenizer, bound: Template, text: str) -> None:
    if not is_text(text):
        return
    prompt = bound.prompt(text, Conversations())
    with all_tokenized():
        by_whole = bound.prompt(text, Conversations())
    assert any("cut_" in one for one in prompt.warnings) == any("cut_" in one for one in by_whole.warnings)
    if len(text) < 16 * MAX_LENGTH or not prompt.warnings:
        assert prompt == by_whole


def test_a_megabyte_is_not_tokenized_for_its_end(tokenizer: Tokenizer, bound: Template) -> None:
    counted = Counted()
    prompt = bound.prompt(dialogue(50_000), counted)
    assert MAX_LENGTH / 2 <= len(prompt.token_ids) <= MAX_LENGTH
    assert counted.num_chars < 100 * MAX_LENGTH
    assert "has more than" in prompt.warnings[0] and prompt.text.endswith("turn 49999 says hello" + tail(bound))


def test_an_end_of_few_tokens_is_made_longer(tokenizer: Tokenizer, bound: Template) -> None:
    """A run of spaces, or of characters that the tokenizer does not know, may be one token."""
    text = dialogue(300) + "\nCustomer: " + " " * 3000 + "the end"
    prompt = bound.prompt(text, Conversations())
    assert "cut_conversation" in prompt.warnings[0] and MAX_LENGTH / 4 <= len(prompt.token_ids) <= MAX_LENGTH


def test_the_start_moves_about_as_rarely_as_with_everything_tokenized(tokenizer: Tokenizer) -> None:
    bound = bind(tokenizer, 320)

    def num_moves() -> int:
        starts = []
        for num_turns in range(120, 170):
            prompt = bound.prompt(dialogue(num_turns), Conversations())
            assert 160 <= len(prompt.token_ids) <= 320
            assert prompt.text.startswith(("Customer: turn", "Agent: turn")), "cut inside a turn"
            starts.append(prompt.text.partition(" says")[0])
        return sum(one != other for one, other in pairwise(starts))

    moves = num_moves()
    with all_tokenized():
        assert moves <= 1.3 * num_moves() and moves < 30
