"""A whole training run: from a file of labelled conversations to a bundle that can be served."""

import json
import math
import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from loraplex.bundle import SETTINGS, check_name, open_base
from loraplex.classifier import Calibration, Golden
from loraplex.errors import ConfigurationError, listed
from loraplex.labelled import Labelled, read_labelled
from loraplex.machine import choose_threads
from loraplex.measuring.about import about
from loraplex.measuring.files import write_text
from loraplex.model.loader import max_positions, read_config, read_layers, resolve_device, resolve_dtype
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer
from loraplex.training.asked import Asked, ask
from loraplex.training.calibration import fit
from loraplex.training.contracts import Task, check_names, make_task, seen_labels
from loraplex.training.fit import Fit, Told
from loraplex.training.output import write_adapter
from loraplex.training.scores import Quality, quality
from loraplex.training.settings import TrainSettings
from loraplex.training.split import DataReport, Split, report_on, split_rows
from loraplex.training.trainee import Trainee

MAX_WEIGHT = 5.0  # of a rare label in the loss
LEAST_CONFIDENCE = 0.8  # of a golden example


class Watcher(Protocol):
    """Is told what happens in a run, as it happens."""

    def data(self, report: DataReport, weights: Mapping[str, Mapping[str, float]]) -> None: ...
    def started(self, names: Seq[str], num_parameters: int, num_steps: int, first_step: int) -> None: ...
    def step(self, told: Told) -> None: ...
    def finished(self, name: str, before: Quality | None, after: Quality | None, folder: Path) -> None: ...


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
    data_sha256: str

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
    rows = read_labelled(data)
    names = check_names(classifiers, rows)
    for name in names:
        check_name(name, f"classifier {name!r}")
    unknown = [name for name in questions if name not in names]
    if unknown:
        raise ConfigurationError(
            "--questions",
            f"names {listed(unknown)}, which no conversation has a label for",
            remedy=f"the data has: {listed(names)}",
        )
    opened = open_base(base)
    config = read_config(opened.base)
    layers, num_embeddings = read_layers(config, opened.base)
    chat = ChatTemplate.of(Tokenizer(opened.base, num_embeddings))
    tasks = tuple(
        make_task(name, questions.get(name, {}), seen_labels(rows, name), chat, settings, max_positions(config))
        for name in names
    )
    plain = {task.name: [label.strip() for label in task.contract.labels] for task in tasks}
    asked, too_long = ask(
        rows, names, [task.template for task in tasks], list(plain.values()), is_shared=settings.kind == "alora"
    )
    split = split_rows(rows, dev=settings.dev, calibration=settings.calibration, seed=settings.seed)
    report = report_on(rows, plain, split, too_long)
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
        data_sha256=sha256(data.read_bytes()).hexdigest(),
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


def train(prepared: Prepared, out: Path, settings: TrainSettings, watcher: Watcher, *, resume: bool = False) -> None:
    """Train, calibrate and write the adapters into the bundle `out`. A KeyboardInterrupt ends the training early, and
    writes the best weights so far."""
    choose_threads()
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    torch.manual_seed(settings.seed)
    tasks = prepared.tasks
    trainee = Trainee.load(
        prepared.base,
        prepared.config,
        prepared.layers,
        dtype,
        device,
        num_adapters=len(tasks),
        rank=settings.rank,
        alpha=settings.scale,
        targets=targets_of(prepared.layers, settings.targets),
    )
    label_ids = [task.label_ids for task in tasks]
    loop = Fit(trainee, settings, prepared.of("train"), prepared.of("dev"), label_ids, prepared.weights)
    state, identity = out / ".training" / "state.pt", _identity(prepared, settings)
    first = _resume(loop, state, identity) if resume else 0
    watcher.started(
        [task.name for task in tasks], sum(one.numel() for one in trainee.parameters()), loop.num_steps, first
    )
    watcher.data(
        prepared.report,
        {
            task.name: dict(zip(task.contract.labels, weights, strict=True))
            for task, weights in zip(tasks, prepared.weights, strict=True)
        },
    )
    try:
        loop.run(watcher.step, lambda found: _save(state, {"identity": identity, "loop": found}))
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    best = loop.restore_best()
    finish(prepared, out, settings, loop, trainee, best, watcher, device, dtype)
    if interrupted:
        raise KeyboardInterrupt
    state.unlink(missing_ok=True)
    if state.parent.is_dir():
        state.parent.rmdir()


def finish(
    prepared: Prepared,
    out: Path,
    settings: TrainSettings,
    loop: Fit,
    trainee: Trainee,
    best: Seq[Quality | None],
    watcher: Watcher,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Calibrate each adapter, choose its golden examples, and write its folder."""
    calibration, dev = prepared.of("calibration"), prepared.of("dev")
    of_calibration, of_dev = loop.log_probs(calibration), loop.log_probs(dev)
    head = about(device, dtype)
    for index, (task, weights) in enumerate(zip(prepared.tasks, prepared.weights, strict=True)):
        labels = task.contract.labels
        rows = [(one, found) for one, found in zip(calibration, of_calibration, strict=True) if one.classifier == index]
        temperature, bias = fit(
            [found for _, found in rows],
            [[one.shares.get(label, 0.0) for label in range(len(labels))] for one, _ in rows],
            [-math.log(weight) for weight in weights],
        )
        contract = task.contract.model_copy(
            update={
                "calibration": Calibration(
                    temperature=round(temperature, 4),
                    bias={label: round(by, 4) for label, by in zip(labels, bias, strict=True) if round(by, 4)},
                )
            }
        )
        decided = [
            (one, contract.decide(found)) for one, found in zip(dev, of_dev, strict=True) if one.classifier == index
        ]
        after = None
        if decided:
            after = quality(
                [[one.scores[label] for label in labels] for _, one in decided],
                [one.truth for one, _ in decided],
                [labels.index(one.label) for _, one in decided],
            )
        contract = contract.model_copy(update={"golden": _golden(prepared.rows, decided, labels, settings.golden)})
        record = {
            "about": head,
            "settings": settings.model_dump(),
            "data": {"sha256": prepared.data_sha256, **prepared.report.split},
            "label_weights": dict(zip(labels, weights, strict=True)),
            "best_on_dev": None if best[index] is None else asdict(best[index]),  # type: ignore[arg-type]
            "calibrated_on_dev": None if after is None else asdict(after),
        }
        folder = out / task.name
        write_adapter(
            folder,
            trainee,
            index,
            contract,
            rank=settings.rank,
            alpha=settings.scale,
            invocation=task.invocation,
            base_name=prepared.base_name,
            dtype=torch.bfloat16,
            record=record,
        )
        watcher.finished(task.name, best[index], after, folder)
    if not (out / "config.json").exists() and not (out / SETTINGS).exists():
        base = os.path.relpath(prepared.base, out) if prepared.base.exists() else prepared.base_name
        write_text(out / SETTINGS, f"base: {json.dumps(base)}\n")


def _golden(rows: Seq[Labelled], decided: Seq[tuple[Asked, Any]], labels: Seq[str], num: int) -> tuple[Golden, ...]:
    """Return the shortest conversations of dev that are answered rightly and surely, `num` of each label."""
    found: list[Golden] = []
    for index, label in enumerate(labels):
        right = [
            text
            for one, decision in decided
            if isinstance(text := rows[one.row].input, str)
            and one.truth == index
            and decision.label == label
            and decision.confidence >= LEAST_CONFIDENCE
        ]
        found += [Golden(text=text, label=label) for text in sorted(dict.fromkeys(right), key=len)[:num]]
    return tuple(found)


def _identity(prepared: Prepared, settings: TrainSettings) -> str:
    """Identify what a state belongs to: the same data, classifiers, prompts and settings."""
    parts = [
        prepared.data_sha256,
        settings.model_dump_json(),
        *(f"{task.name} {task.contract}" for task in prepared.tasks),
    ]
    return sha256("\n".join(parts).encode()).hexdigest()


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def _resume(loop: Fit, path: Path, identity: str) -> int:
    if not path.is_file():
        raise ConfigurationError(
            "--resume", f"there is no state in {path.parent}", remedy="leave out --resume to begin anew"
        )
    state = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise ConfigurationError(
            "--resume",
            f"{path} belongs to other data or other settings",
            remedy="give the same data and options as before, or leave out --resume",
        )
    loop.load_state(state["loop"])
    return int(state["loop"]["step"])
