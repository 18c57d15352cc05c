"""How a classifier that is to be trained will ask: its contract, and the tokens from which on its adapter acts."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.classifier import CONVERSATION, QUESTION, Contract
from loraplex.config import read_yaml, validate
from loraplex.errors import ConfigurationError, ContractError, listed, quoted
from loraplex.labelled import Label, Labelled
from loraplex.problems import similar
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.template import Template
from loraplex.training.settings import TrainSettings

POSITIVE = ("yes", "true", "1", "positive")
LEAST_ACTIVE = 2  # tokens that an adapter acts on at least, before the label
PROBE_ENDS = ("hello", "no.", "is it done?", "yes!", "room 12", '(a "quote")')  # ends that may merge with what follows
PLAIN = f"{CONVERSATION}\n\nAnswer:"  # for a base without a chat template
PLAIN_QUESTION = f"{CONVERSATION}\n\nQuestion: {QUESTION}\nAnswer:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A classifier that is to be trained. invocation: the tokens from which on the adapter acts; None for all."""

    name: str
    contract: Contract
    template: Template
    invocation: tuple[int, ...] | None

    @property
    def label_ids(self) -> list[tuple[int, ...]]:
        """Each label's tokens; where a head of the adapter's own answers, its number."""
        of_template = self.template.label_ids
        return [of_template.get(label, (number,)) for number, label in enumerate(self.contract.labels)]


def read_questions(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return classifier -> keys of its contract, from a YAML file with a question or a mapping for each classifier."""
    found = {}
    for name, given in read_yaml(path, ConfigurationError).items():
        if not isinstance(given, str | dict):
            raise ConfigurationError(
                f"{path}, key {name!r}",
                f"is {quoted(given)}, not a question or keys of a contract",
                remedy="write `name: the question`, or `name: {question: …, labels: [yes, no]}`",
            )
        found[name] = {"question": given} if isinstance(given, str) else given
    return found


def seen_labels(rows: Seq[Labelled], name: str) -> tuple[str, ...]:
    """Return the labels that a classifier has in the data: yes and no for booleans. The order of the lines does not
    matter: words that say yes come first, which makes them the positive label, and others follow by alphabet."""
    found: set[str] = set()
    for row in rows:
        label: Label | None = row.labels.get(name)
        if isinstance(label, bool):
            found.update(("yes", "no"))
        elif label is not None:
            found.update([label] if isinstance(label, str) else label)
    return tuple(sorted(found, key=lambda one: (one.strip().casefold() not in POSITIVE, one.casefold(), one)))


def make_task(
    name: str,
    given: Mapping[str, Any],
    labels: Seq[str],
    chat: ChatTemplate,
    settings: TrainSettings,
    max_model_len: int,
) -> Task:
    """Return a classifier's task.

    given:   keys of its contract that the user wrote; they win.
    labels:  those that the data has.
    Raises ConfigurationError or ContractError, which say what is missing.
    """
    asks = settings.prompt == "question" or QUESTION in str(given.get("template", settings.template or ""))
    if asks and not given.get("question"):
        raise ConfigurationError(
            f"classifier {name!r}",
            "has no question, and its prompt asks one",
            remedy="give --questions FILE with `name: the question`, or --prompt short without {question}",
        )
    values: dict[str, Any] = {key: value for key, value in given.items() if key != "question" or asks}
    if settings.template is not None:
        values.setdefault("template", settings.template)
    if settings.max_length is not None:
        values.setdefault("max_length", settings.max_length)
    if values.get("format", "lines") == "lines" and "template" not in values:
        if chat.text is None:
            values["template"] = PLAIN_QUESTION if asks else PLAIN
        elif asks:
            try:
                values["template"] = chat.around_question()
            except ValueError as exc:
                raise ConfigurationError("--prompt question", str(exc), remedy="give a --template") from None
    if "labels" not in values:
        if len(labels) < 2:
            raise ConfigurationError(
                f"classifier {name!r}",
                f"has {f'only the label {quoted(labels[0])}' if labels else 'no label'} in the data",
                remedy="add conversations with another label, or leave the classifier out",
            )
        ends_in_text = settings.kind != "score" and str(values.get("template", "")).endswith((":", "?"))
        values["labels"] = [f" {label}" if ends_in_text else label for label in labels]
    contract = validate(Contract, values, f"classifier {name}", ContractError)
    invocation = _invocation(name, contract, chat, settings, max_model_len) if settings.kind == "alora" else None
    template = Template(
        chat, contract, max_model_len, f"classifier {name}", invocation, reads_labels=settings.kind != "score"
    )
    return Task(name=name, contract=contract, template=template, invocation=invocation)


def _invocation(
    name: str, contract: Contract, chat: ChatTemplate, settings: TrainSettings, max_model_len: int
) -> tuple[int, ...]:
    """Return the tokens from which on the adapter acts: those of `settings.invocation`, or the last ones before the
    question, or before the label where there is no question, from a special token on if there is one."""
    tokenizer = chat.tokenizer
    if settings.invocation is not None:
        return tuple(tokenizer.encode(settings.invocation, add_special_tokens=False))
    probe = Template(chat, contract, max_model_len, f"classifier {name}")
    parts = [probe.parts(f"Customer: {end}") for end in PROBE_ENDS]
    tails = {tail for _, tail in parts}
    [tail] = tails if len(tails) == 1 else [None]
    if not tail:
        raise ConfigurationError(
            f"classifier {name!r}",
            "the tokens between the conversation and the label are not always the same",
            remedy="give a --template with {conversation} and, behind it, a special token",
        )
    # In the prompt, not by itself: a line break merges with a full stop before it, a space with the word behind it.
    always = _common_end([tokenizer.encode(head + tail, add_special_tokens=False) for head, _ in parts])
    before_question = tokenizer.encode(tail.partition(contract.question or tail)[0], add_special_tokens=False)
    is_apart = contract.question and always[: len(before_question)] == before_question
    ids = before_question if is_apart else always
    least = 1 if contract.question else LEAST_ACTIVE
    if not ids:
        raise ConfigurationError(
            f"classifier {name!r}",
            f"what stands between the conversation and the label ({quoted(tail)}) merges with the conversation's end",
            remedy="write a special token or a line there, in --template",
        )
    starts = [at for at, token in enumerate(ids) if token in tokenizer.special_ids]
    start = next((at for at in reversed(starts) if len(ids) - at >= least), 0)
    return tuple(ids[start:])


def _common_end(rows: Seq[Seq[int]]) -> list[int]:
    """Return the tokens that all rows end with."""
    length = 0
    while length < min(map(len, rows)) and len({row[-1 - length] for row in rows}) == 1:
        length += 1
    return list(rows[0][len(rows[0]) - length :])


def check_names(names: Seq[str], rows: Seq[Labelled]) -> tuple[str, ...]:
    """Return the classifiers to train: those that were asked for, or all that the data has labels for."""
    known = dict.fromkeys(name for row in rows for name in row.labels)
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"--classifier {name}",
                "no conversation has a label for it",
                remedy=f"{similar([name], known)} The data has: {listed(list(known)) or 'none'}".strip(),
            )
    if not known:
        raise ConfigurationError(
            "the data",
            "no conversation has a label",
            remedy='write lines such as {"text": "…", "labels": {"isDone": true}}, or {"text": "…", "label": true} and '
            "give one --classifier",
        )
    return tuple(names) or tuple(known)
