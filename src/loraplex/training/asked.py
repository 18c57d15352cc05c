"""Turns labelled conversations into what adapters read: each prompt exactly as the server will write it."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import InputTooLongError, InvalidRequestError
from loraplex.labelled import Labelled, label_shares, refuse_lines
from loraplex.text.template import Template
from loraplex.text.tokenizer import Conversations
from loraplex.training.batch import Answer, Conversation, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One classifier's prompt about one conversation.

    row:         the conversation's place in the data.
    classifier:  its index, which is its adapter's.
    prefix, suffix: the prompt's tokens that the base computes, and those that the adapter changes.
    shares:      label's index -> how much it is the right one; they sum to 1.
    """

    row: int
    classifier: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    shares: Mapping[int, float]

    @property
    def truth(self) -> int:
        """The likeliest label's index."""
        return max(self.shares, key=self.shares.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLong:
    """A row whose prompt was cut, or did not fit at all. why: how many tokens it has, and how many may be."""

    row: int
    classifier: int
    is_left_out: bool
    why: str


def ask(
    path: Path,
    rows: Seq[Labelled],
    names: Seq[str],
    templates: Seq[Template],
    labels: Seq[Seq[str]],
    *,
    is_shared: bool,
) -> tuple[list[Asked], list[TooLong]]:
    """Return the prompts of all rows for the classifiers that they have a label for.

    path:  the file of the rows, for errors. names, templates, labels: of the classifiers.
    is_shared:  whether the base computes the tokens before the activation.
    Raises ConfigurationError, which names all lines that make no prompt, such as those with an unknown role.
    """
    asked, too_long = [], []
    wrong: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        conversations = Conversations()
        prefixes: dict[tuple[int, ...], tuple[int, ...]] = {}  # the classifiers' are equal, and kept once
        for classifier, (name, template) in enumerate(zip(names, templates, strict=True)):
            if name not in row.labels:
                continue
            try:
                prompt = template.prompt(row.input, conversations)
            except InputTooLongError as exc:
                too_long.append(TooLong(row=index, classifier=classifier, is_left_out=True, why=exc.message))
                continue
            except InvalidRequestError as exc:
                lines = wrong.setdefault(f"{exc.message} ({exc.remedy})", [])
                if row.line not in lines[-1:]:
                    lines.append(row.line)
                continue
            for warning in prompt.warnings:
                code, _, why = warning.partition(": ")
                if code == "cut_conversation":
                    too_long.append(TooLong(row=index, classifier=classifier, is_left_out=False, why=why))
            at = prompt.activation if is_shared else 0
            prefix = prompt.token_ids[:at]
            asked.append(
                Asked(
                    row=index,
                    classifier=classifier,
                    prefix=prefixes.setdefault(prefix, prefix),
                    suffix=prompt.token_ids[at:],
                    shares=label_shares(row.labels[name], labels[classifier], name),
                )
            )
    refuse_lines(path, wrong)
    return asked, too_long


def to_train(
    asked: Iterable[Asked], label_ids: Seq[Seq[Seq[int]]], label_weights: Seq[Seq[float]]
) -> list[Conversation]:
    """Return what a training pass computes.

    label_ids:      [classifier][label] the label's tokens.
    label_weights:  [classifier][label] what the label counts in the loss.
    A label of several tokens is read behind the prompt token by token, and each right label has a question of its own.
    """

    def questions(one: Asked) -> Iterable[Question]:
        ids, weights = label_ids[one.classifier], label_weights[one.classifier]
        single = {label: share for label, share in one.shares.items() if len(ids[label]) == 1}
        if single:
            at = len(one.suffix) - 1
            answers = tuple(
                Answer(position=at, token_id=ids[label][0], weight=share * weights[label])
                for label, share in single.items()
            )
            yield Question(adapter=one.classifier, token_ids=one.suffix, answers=answers)
        for label, share in one.shares.items():
            if label not in single:
                yield _spelled(one, ids[label], share * weights[label])

    return _grouped(asked, questions)


def to_score(asked: Iterable[Asked], label_ids: Seq[Seq[Seq[int]]]) -> tuple[list[Conversation], list[tuple[int, int]]]:
    """Return what a pass computes to read every label's log probability, and for each answer, in order, the number of
    the prompt in `asked` and the label's index. The log probabilities of a label's answers are summed."""
    asked = list(asked)
    numbers = {id(one): number for number, one in enumerate(asked)}
    read: dict[int, list[tuple[int, int]]] = {}

    def questions(one: Asked) -> Iterable[Question]:
        ids, number = label_ids[one.classifier], numbers[id(one)]
        single = [label for label, tokens in enumerate(ids) if len(tokens) == 1]
        if single:
            at = len(one.suffix) - 1
            found = Question(
                adapter=one.classifier,
                token_ids=one.suffix,
                answers=tuple(Answer(position=at, token_id=ids[label][0]) for label in single),
            )
            read[id(found)] = [(number, label) for label in single]
            yield found
        for label, tokens in enumerate(ids):
            if len(tokens) > 1:
                found = _spelled(one, tokens, 1.0)
                read[id(found)] = [(number, label)] * len(tokens)
                yield found

    conversations = _grouped(asked, questions)
    return conversations, [pair for one in conversations for question in one.questions for pair in read[id(question)]]


def _spelled(one: Asked, tokens: Seq[int], weight: float) -> Question:
    start = len(one.suffix) - 1
    return Question(
        adapter=one.classifier,
        token_ids=(*one.suffix, *tokens[:-1]),
        answers=tuple(Answer(position=start + i, token_id=token, weight=weight) for i, token in enumerate(tokens)),
    )


def _grouped(asked: Iterable[Asked], questions: Callable[[Asked], Iterable[Question]]) -> list[Conversation]:
    """Put prompts with the same prefix together."""
    groups: dict[tuple[int, tuple[int, ...]], list[Asked]] = {}
    for one in asked:
        groups.setdefault((one.row, one.prefix), []).append(one)
    return [
        Conversation(token_ids=prefix, questions=tuple(question for one in group for question in questions(one)))
        for (_, prefix), group in groups.items()
    ]
