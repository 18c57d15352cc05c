"""A run, checked before any weights are read: data, classifiers, prompts and the base against each other."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loraplex.bundle import check_name, open_base
from loraplex.errors import ConfigurationError, UnsupportedModelError, listed, quoted
from loraplex.labelled import Labelled, read_labelled
from loraplex.measuring.files import sha256
from loraplex.model.loader import max_positions, read_config, read_layers
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer
from loraplex.training.asked import Asked, ask
from loraplex.training.contracts import Task, check_names, make_task, seen_labels
from loraplex.training.settings import TrainSettings
from loraplex.training.split import DataReport, Split, report_on, split_rows
from loraplex.training.trainee import check_trainable

MAX_WEIGHT = 5.0  # of a rare label in the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run, checked: everything that needs no weights."""

    base: Path
    base_name: str
    config: Any
    layers: Any
    tasks: tuple[Task, ...]
    asked: tuple[Asked, ...]
    rows: tuple[Labelled, ...]
    split: Split
    report: DataReport
    weights: tuple[tuple[float, ...], ...]
    data: Path
    data_sha256: str

    @property
    def label_weights(self) -> Mapping[str, Mapping[str, float]]:
        """Return classifier -> label -> what it counts in the loss."""
        return {
            task.name: dict(zip(task.contract.labels, weights, strict=True))
            for task, weights in zip(self.tasks, self.weights, strict=True)
        }

    def of(self, side: Literal["train", "dev", "calibration"]) -> list[Asked]:
        """Return the prompts on one side of the split."""
        rows = set(getattr(self.split, side))
        return [one for one in self.asked if one.row in rows]


def prepare(
    base: str,
    data: Path,
    settings: TrainSettings,
    classifiers: Seq[str] = (),
    questions: Mapping[str, Mapping[str, Any]] | None = None,
) -> Prepared:
    """Read the data and the base's files but its weights, and check them against each other.

    base:         a folder, or an id on the hub.
    classifiers:  those to train; all that the data has labels for by default.
    questions:    classifier -> keys of its contract; see `contracts.read_questions`.
    Raises ConfigurationError for what is wrong in data, settings or base.
    """
    questions = questions or {}
    known = {
        name: [str(label).strip() for label in given["labels"]]
        for name, given in questions.items()
        if isinstance(given.get("labels"), list)
    }
    rows = read_labelled(
        data, known, classifiers[0] if len(classifiers) == 1 else None, option="--classifier", new=classifiers
    )
    names = check_names(classifiers, rows)
    for name in names:
        check_name(name, f"classifier {name!r}")
    labelled = dict.fromkeys(name for row in rows for name in row.labels)
    if unknown := [name for name in questions if name not in labelled]:
        raise ConfigurationError(
            "--questions",
            f"names {listed(unknown)}, which no conversation has a label for",
            remedy=f"the data has: {listed(list(labelled))}",
        )
    num_rows = len(rows)
    of_names = (
        replace(row, labels={name: label for name, label in row.labels.items() if name in names}) for row in rows
    )
    rows = tuple(row for row in of_names if row.labels)
    opened = open_base(base)
    config = read_config(opened.base)
    layers, num_embeddings = read_layers(config, opened.base)
    check_trainable(config, opened.base)
    if settings.kind == "score":
        _check_head(config, opened.base)
    targets_of(layers, settings.targets)
    chat = ChatTemplate.of(Tokenizer(opened.base, num_embeddings))
    tasks = tuple(
        make_task(name, questions.get(name, {}), seen_labels(rows, name), chat, settings, max_positions(config))
        for name in names
    )
    plain = {task.name: [label.strip() for label in task.contract.labels] for task in tasks}
    asked, too_long = ask(
        data, rows, names, [task.template for task in tasks], list(plain.values()), is_shared=settings.kind == "alora"
    )
    fit = {(one.row, one.classifier) for one in asked}
    rows = tuple(
        replace(row, labels={name: row.labels[name] for index, name in enumerate(names) if (number, index) in fit})
        for number, row in enumerate(rows)
    )
    prompts: dict[int, list[Hashable]] = defaultdict(list)
    for one in asked:
        prompts[one.row].append((one.classifier, one.prefix, one.suffix))
    split = split_rows(rows, dev=settings.dev, calibration=settings.calibration, seed=settings.seed, prompts=prompts)
    report = report_on(rows, plain, split, too_long, num_unlabelled=num_rows - len(rows), prompts=prompts)
    for name, num_labels in report.num_trained.items():
        if num_labels < 2:
            raise ConfigurationError(
                f"classifier {name!r}",
                f"fewer than two of its labels are among the {report.split['train']} conversations to train on: "
                + ", ".join(f"{label} {count:g}" for label, count in report.counts[name].items()),
                remedy="label more conversations; two of each label are the least, and hundreds are wanted",
            )
    return Prepared(
        base=opened.base,
        base_name=opened.base_name,
        config=config,
        layers=layers,
        tasks=tasks,
        asked=tuple(asked),
        rows=rows,
        split=split,
        report=report,
        weights=tuple(_weights(report.counts[task.name], settings.balance) for task in tasks),
        data=data,
        data_sha256=sha256(data),
    )


def _check_head(config: Any, base: Path) -> None:
    """Raise UnsupportedModelError where transformers has no model with a score head, so that PEFT reads no adapter."""
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedModelError(
            base / "config.json",
            f"transformers has no sequence classification for {quoted(config.model_type)}",
            remedy="use --kind alora or lora",
        )


def _weights(counts: Mapping[str, float], balance: str) -> tuple[float, ...]:
    """Return what each label counts in the loss: the rarer, the more, by the square root of how much rarer it is than
    an even share."""
    total, even = sum(counts.values()), 1 / len(counts)
    if balance == "none" or not total:
        return (1.0,) * len(counts)
    shares = [max(count, 1) / total for count in counts.values()]
    return tuple(min(MAX_WEIGHT, math.sqrt(even / share)) for share in shares)


def targets_of(layers: Any, targets: str) -> set[str]:
    """Return the ends of the names of the layers to train. Raises ConfigurationError for one that the base lacks."""
    known = {path.rpartition(".")[2] for path in layers.linear if path not in layers.beside_text}
    if targets == "all-linear":
        return known
    wanted = {one.strip() for one in targets.split(",") if one.strip()}
    if not wanted or not wanted <= known:
        raise ConfigurationError(
            f"--targets {targets}",
            f"the base has no layers {listed(sorted(wanted - known))}",
            remedy=f"it has: {', '.join(sorted(known))}",
        )
    return wanted
