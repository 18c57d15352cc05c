"""What becomes of trained weights: calibrated, proven by golden examples, written as a bundle."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict
from pathlib import Path

import torch

from loraplex.classifier import Calibration, Contract, Decision, Golden, conversation_text
from loraplex.evaluation.calibration import fitted
from loraplex.evaluation.objective import LEAST, Objective, fit_threshold
from loraplex.evaluation.quality import Quality, quality
from loraplex.labelled import Labelled
from loraplex.measuring.about import about
from loraplex.training.asked import Asked
from loraplex.training.fit import Fit
from loraplex.training.output import write_adapter, write_bundle_settings
from loraplex.training.prepared import Prepared
from loraplex.training.settings import TrainSettings
from loraplex.training.trainee import Trainee

LEAST_CONFIDENCE, LEAST_MARGIN = 0.8, 0.1  # of a golden example; the margin is to the threshold


def finish(
    prepared: Prepared,
    out: Path,
    settings: TrainSettings,
    loop: Fit,
    trainee: Trainee,
    tell: Callable[[str, Quality | None, Quality | None, Path], None],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Calibrate each adapter's best weights, choose its golden examples, and write its folder.

    tell:  takes the classifier, its figures on dev before and after the calibration, and the folder.
    """
    best = loop.restore_best()
    calibration, dev = prepared.of("calibration"), prepared.of("dev")
    of_calibration, of_dev = loop.log_probs(calibration), loop.log_probs(dev)
    head = about(device, dtype)
    for index, (task, weights) in enumerate(zip(prepared.tasks, prepared.weights, strict=True)):
        if loop.is_lost(index):
            continue
        labels = task.contract.labels
        rows = [(one, found) for one, found in zip(calibration, of_calibration, strict=True) if one.classifier == index]
        log_probs = [found for _, found in rows]
        known_bias = [-math.log(weight) for weight in weights]
        keys = fitted(labels, log_probs, [one.shares for one, _ in rows], known_bias)
        contract = task.contract.model_copy(update={"calibration": Calibration(**keys)})
        if settings.threshold == "f1" and contract.threshold is None and len(labels) == 2:
            contract = _with_threshold(contract, log_probs, [one.truth for one, _ in rows])
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
        contract = contract.model_copy(update={"golden": _golden(prepared.rows, decided, contract, settings.golden)})
        record = {
            "about": head,
            "settings": settings.model_dump(),
            "base": prepared.base_name,
            "data": {
                "file": str(prepared.data),
                "sha256": prepared.data_sha256,
                "conversations": prepared.report.num_conversations,
                "split": prepared.report.split,
                "labels": prepared.report.counts[task.name],
            },
            "trained_together": [one.name for one in prepared.tasks],
            "steps": loop.step,
            "best_step": loop.best_step(index),
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
        tell(task.name, best[index], after, folder)
    write_bundle_settings(out, prepared.base, prepared.base_name)


def _with_threshold(contract: Contract, log_probs: Seq[Seq[float]], truth: Seq[int]) -> Contract:
    """Return the contract with the threshold that has the highest F1, as `loraplex calibrate` chooses it. It stays as
    it is where there are too few conversations of one label."""
    if min(truth.count(0), truth.count(1)) < LEAST:
        return contract
    return contract.model_copy(update={"threshold": fit_threshold(contract, log_probs, truth, Objective(kind="f1"))})


def _golden(
    rows: Seq[Labelled], decided: Seq[tuple[Asked, Decision]], contract: Contract, num: int
) -> tuple[Golden, ...]:
    """Return the shortest conversations of dev that are answered rightly and surely, `num` of each label. Messages are
    written as text, where the contract writes them so, too. None is from an export: a server keeps such texts for a
    bounded time, and a contract keeps them for ever."""
    found: list[Golden] = []
    for index, label in enumerate(contract.labels):
        right = [
            said if isinstance(said := rows[one.row].input, str) else conversation_text(said, contract.roles)
            for one, decision in decided
            if (contract.format == "lines" or isinstance(rows[one.row].input, str))
            and not rows[one.row].is_exported
            and one.truth == index
            and decision.label == label
            and decision.confidence >= LEAST_CONFIDENCE
            and abs(decision.scores[contract.labels[0]] - (contract.threshold or 0.5)) >= LEAST_MARGIN
        ]
        found += [Golden(text=text, label=label) for text in sorted(dict.fromkeys(right), key=len)[:num]]
    return tuple(found)
