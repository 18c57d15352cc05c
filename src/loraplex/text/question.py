"""Questions that no adapter was trained for, as the bare base reads them: prompts, and the tokens of the answers."""

import functools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

from loraplex.classifier import CONVERSATION, DEFAULT_ROLES, QUESTION, Contract, normalized, valid_unicode
from loraplex.errors import ConfigurationError, ContractError, InputTooLongError, InvalidRequestError, quoted
from loraplex.labelled import YES_NO
from loraplex.questions import check_labels
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.codes import WORDS, Answers, Codes, Kind
from loraplex.text.template import Template
from loraplex.types import Question, QuestionType, Roles

ROLES: Roles = {
    **DEFAULT_ROLES,
    "system": "System",
    "developer": "Developer",
    "tool": "Tool",
}  # no contract says others
PLAIN = f"{CONVERSATION}\n\n{QUESTION}\nAnswer:"  # for a base without a chat template
NO_THINKING = {"enable_thinking": False, "thinking": False}  # for bases that else think before they answer
MAX_CACHED, MAX_CACHED_CHARS = 256, 4096  # questions whose prompts are kept, and how long each may be
ENDS: Mapping[Kind, str] = {
    "names": "Answer with the name of one option.",
    "words": "Answer with one word, {} or {}.",
    "digits": "Answer with the number of one level.",
    "letters": "Answer with the letter of one option.",
    "pairs": "Answer with the letters of one option.",
}
WITHOUT_INSTRUCTIONS: Mapping[QuestionType, str] = {
    "predicate": "Which of the two holds?",
    "choice": "Which option fits best?",
    "score": "Which level fits best?",
}


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """A question with its labels in one order.

    template:  makes the prompt of a text.
    answers:   for each label, in the question's own order, the sequences of tokens that mean this label behind the
               prompt.
    """

    template: Template
    answers: tuple[Answers, ...]

    @functools.cached_property
    def reads(self) -> Mapping[tuple[int, ...], tuple[int, ...]]:
        """Return what is to be read: the tokens that may follow, by the tokens that stand before them behind the
        prompt. The first entry is () where the answers are one token each, and the only one."""
        reads: dict[tuple[int, ...], dict[int, None]] = {}
        for answer in chain.from_iterable(self.answers):
            for at, token_id in enumerate(answer):
                reads.setdefault(answer[:at], {})[token_id] = None
        return {before: tuple(follow) for before, follow in reads.items()}


class QuestionPrompts:
    """Puts questions behind a text, in the base's chat template. All that stands before a question is the same for all
    questions, and for classifiers whose prompt is the chat template's. Any thread may call."""

    def __init__(self, chat: ChatTemplate, max_model_len: int, *, in_both_orders: bool) -> None:
        """in_both_orders: present each question also with its labels in the reverse order. Raises ConfigurationError
        where the chat template writes no prompt with a text and a question behind it."""
        self._chat, self._max_model_len, self._in_both_orders = chat, max_model_len, in_both_orders
        self._template = _template(chat)
        probe = self._bind("Is it done?").parts("Customer: hello")
        adds = not chat.tokenizer.starts_with_bos(self._template)
        self._codes = Codes(chat.tokenizer, "".join(part or "" for part in probe), add_special_tokens=adds)
        self._present = functools.lru_cache(MAX_CACHED)(self._make)

    def present(self, question: Question) -> tuple[Presentation, ...]:
        """Return the question with its labels in each order that is asked. Raises InvalidRequestError where the
        tokenizer does not keep the labels apart, and InputTooLongError where the question leaves no room for a text."""
        described = tuple((label, question.descriptions.get(label, "")) for label in question.labels)
        present = self._present if num_chars(question) <= MAX_CACHED_CHARS else self._make
        return present(question.type, question.instructions, described)

    def _make(
        self, type: QuestionType, instructions: str, described: tuple[tuple[str, str], ...]
    ) -> tuple[Presentation, ...]:
        labels, descriptions = (tuple(map(self._text, texts)) for texts in zip(*described, strict=True))
        coding = self._codes.of(type, labels)
        is_own = tuple(coding.codes) == labels
        says_all = is_own or (coding.kind == "words" and {one.lower() for one in labels} in map(set, YES_NO))
        shown = ("",) * len(labels) if says_all else labels
        texts = [": ".join(filter(None, one)) for one in zip(shown, descriptions, strict=True)]
        asked = self._text(instructions) or WITHOUT_INSTRUCTIONS[type]
        indices = range(len(labels))
        made = []
        for order in (indices, indices[::-1]) if self._in_both_orders else (indices,):
            # A letter belongs to a place in the list, any other code to its label.
            is_placed = coding.kind in ("letters", "pairs")
            number_of = (
                dict(zip(order, indices, strict=True)) if is_placed else dict(zip(indices, indices, strict=True))
            )
            options = [(coding.codes[number_of[index]], texts[index]) for index in order]
            longest = max(map(len, chain.from_iterable(coding.answers)))
            template = self._bind(_written(coding.kind, asked, options, is_own=is_own), num_behind=longest - 1)
            answers = tuple(coding.answers[number_of[index]] for index in indices)
            made.append(Presentation(template=template, answers=answers))
        return tuple(made)

    def _text(self, given: str) -> str:
        """Return a text of the caller's as a prompt holds it: only the chat template writes special tokens."""
        return self._chat.tokenizer.escape(normalized(valid_unicode(given)).strip())[0]

    def _bind(self, question: str, num_behind: int = 0) -> Template:
        """num_behind: tokens that are computed behind the prompt."""
        contract = Contract(question=question, template=self._template, labels=WORDS, roles=dict(ROLES))
        try:
            room = self._max_model_len - num_behind
            return Template(self._chat, contract, room, "the question", reads_labels=False)
        except ContractError:
            raise InputTooLongError(
                f"a question leaves no room for a text: the base takes {self._max_model_len} tokens",
                remedy="shorten the instructions, or ask with fewer labels",
            ) from None


def num_chars(question: Question) -> int:
    """Return how many characters of a question there are to tokenize."""
    return sum(map(len, (question.instructions, *question.labels, *question.descriptions.values())))


def check_question(name: str, question: Question) -> None:
    """Raise InvalidRequestError where nobody could answer the question."""
    where = f"the question {quoted(name)}"
    check_labels(where, question, lambda label: normalized(valid_unicode(label)).strip())
    if not question.instructions.strip() and not any(map(str.strip, question.descriptions.values())):
        if question.type == "predicate":
            raise InvalidRequestError(f"{where} has no instructions", remedy="say in words what is asked")
    for text in (name, question.instructions, *question.descriptions.values()):
        valid_unicode(text)


def _template(chat: ChatTemplate) -> str:
    """Return the text around a conversation and a question."""
    if chat.text is None:
        return PLAIN
    try:
        return chat.around_question(NO_THINKING)
    except ValueError as exc:
        raise ConfigurationError(
            "--adhoc-questions",
            str(exc),
            remedy="leave the option out, or give the base a chat template that takes a message of the user",
        ) from None


def _written(kind: Kind, instructions: str, options: Seq[tuple[str, str]], *, is_own: bool) -> str:
    """Return a question in words. options: (code, text) in the order in which they are shown. is_own: the codes are the
    labels."""
    lines = [f"Question about the text above: {instructions}"]
    if is_own and kind != "words":
        lines += [f"- {code}: {text}" if text else f"- {code}" for code, text in options]
    elif any(text for _, text in options):
        lines += [f"{code}. {text}" if text else f"{code}." for code, text in options]
    return "\n".join([*lines, ENDS[kind].format(*(code for code, _ in options))])
