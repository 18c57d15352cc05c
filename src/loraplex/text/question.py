"""Questions that no adapter was trained for, as the bare base reads them: prompts, and the tokens of the answers."""

import functools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.classifier import CONVERSATION, QUESTION, Contract, normalized, valid_unicode
from loraplex.errors import ConfigurationError, ContractError, InputTooLongError, InvalidRequestError, quoted, shortened
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.codes import DIGITS, WORDS, Codes
from loraplex.text.template import Template
from loraplex.types import Message, Question, QuestionType

MAX_LABELS = 255
PLAIN = f"{CONVERSATION}\n\n{QUESTION}\nAnswer:"  # for a base without a chat template
NO_THINKING = {"enable_thinking": False, "thinking": False}  # for bases that else think before they answer
MAX_CACHED = 256  # questions
TRUTHS = ({"yes", "no"}, {"true", "false"})
WITHOUT_INSTRUCTIONS: Mapping[QuestionType, str] = {
    "predicate": "Which of the two holds?",
    "choice": "Which option fits best?",
    "score": "Which level fits best?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """A question with its labels in one order.

    template:  makes the prompt of a text.
    ids:       for each label, in the question's own order, the first tokens of answers that mean this label.
    """

    template: Template
    ids: tuple[tuple[int, ...], ...]


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
        return self._present(question.type, question.instructions, described)

    def _make(
        self, type: QuestionType, instructions: str, described: tuple[tuple[str, str], ...]
    ) -> tuple[Presentation, ...]:
        tokens = self._codes.of(type, len(described))
        codes = list(tokens)
        texts = self._texts(described, is_predicate=codes == list(WORDS))
        orders = [list(range(len(described)))]
        if self._in_both_orders:
            orders.append(orders[0][::-1])
        made = []
        for order in orders:
            # A word or a digit belongs to what it means, a letter to a place in the list.
            is_fixed = codes[0] in (WORDS[0], DIGITS[0])
            code_of = dict(enumerate(codes)) if is_fixed else dict(zip(order, codes, strict=True))
            asked = self._text(instructions) or WITHOUT_INSTRUCTIONS[type]
            written = _written(asked, [(code_of[index], texts[index]) for index in order])
            ids = tuple(tokens[code_of[index]] for index in sorted(order))
            made.append(Presentation(template=self._bind(written), ids=ids))
        return tuple(made)

    def _texts(self, described: Seq[tuple[str, str]], *, is_predicate: bool) -> list[str]:
        """Return what stands behind each label's code. "yes" and "true" say nothing that the code does not say."""
        says_nothing = is_predicate and {label.lower() for label, _ in described} in TRUTHS
        both = [("" if says_nothing else label, description) for label, description in described]
        return [": ".join(filter(None, map(self._text, one))) for one in both]

    def _text(self, given: str) -> str:
        """Return a text of the caller's as a prompt holds it: only the chat template writes special tokens."""
        return self._chat.tokenizer.escape(normalized(valid_unicode(given)).strip())[0]

    def _bind(self, question: str) -> Template:
        contract = Contract(question=question, template=self._template, labels=WORDS)
        try:
            return Template(self._chat, contract, self._max_model_len, "the question", reads_labels=False)
        except ContractError:
            raise InputTooLongError(
                f"a question leaves no room for a text: the base takes {self._max_model_len} tokens",
                remedy="shorten the instructions, or ask with fewer labels",
            ) from None


def check_question(name: str, question: Question) -> None:
    """Raise InvalidRequestError where nobody could answer the question."""
    labels, where = question.labels, f"the question {quoted(name)}"
    least, most = (2, 2) if question.type == "predicate" else (2, MAX_LABELS)
    if not least <= len(labels) <= most:
        wanted = "two labels" if most == least else f"{least} to {most} labels"
        raise InvalidRequestError(f"{where} has {len(labels)} labels", remedy=f"give a {question.type} {wanted}")
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise InvalidRequestError(
            f"{where} has labels that are empty or the same: {quoted(labels)}", remedy="name each label once"
        )
    if unknown := [one for one in question.descriptions if one not in labels]:
        raise InvalidRequestError(
            f"{where} describes {quoted(unknown[0])}, which is none of its labels {quoted(labels)}",
            remedy="use a label's text",
        )
    if not question.instructions.strip() and not any(map(str.strip, question.descriptions.values())):
        if question.type == "predicate":
            raise InvalidRequestError(f"{where} has no instructions", remedy="say in words what is asked")
    for text in (name, question.instructions, *labels, *question.descriptions.values()):
        valid_unicode(text)


def _template(chat: ChatTemplate) -> str:
    """Return the text around a conversation and a question: each is a message of the user, or both are one where the
    chat template refuses two."""
    if chat.text is None:
        return PLAIN
    tries = [(CONVERSATION, QUESTION), (f"{CONVERSATION}\n\n{QUESTION}",)]
    problem = ""
    for contents in tries:
        try:
            text = chat.render([Message(role="user", content=content) for content in contents], NO_THINKING)
        except Exception as exc:  # a template may refuse two messages of the user, with any error
            problem = shortened(str(exc))
            continue
        if text.count(CONVERSATION) == text.count(QUESTION) == 1 and text.index(CONVERSATION) < text.index(QUESTION):
            return text
        problem = "it does not write each message once, in their order"
    raise ConfigurationError(
        "--adhoc-questions",
        f"the base's chat template makes no prompt of a text and a question: {problem}",
        remedy="leave the option out, or give the base a chat template that takes a message of the user",
    )


def _written(instructions: str, options: Seq[tuple[str, str]]) -> str:
    """Return a question in words. options: (code, text) in the order in which they are shown."""
    codes = [code for code, _ in options]
    lines = [f"Question about the text above: {instructions}"]
    if any(text for _, text in options):
        lines += [f"{code}. {text}" if text else f"{code}." for code, text in options]
    if set(codes) == set(WORDS):
        return "\n".join([*lines, f"Answer with one word, {codes[0]} or {codes[1]}."])
    what = "number of one level" if set(codes) <= set(DIGITS) else f"letter{'s' * (len(codes[0]) - 1)} of one option"
    return "\n".join([*lines, f"Answer with the {what}."])
