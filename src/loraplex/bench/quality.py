"""Compares a system's verdicts with the right labels, and with another system's verdicts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from loraplex.bench.call import Answer
from loraplex.evaluation.quality import confusion_of, f1, mean_of, positives

Answers = Mapping[tuple[int, int], Mapping[str, Answer]]  # (conversation, turn) -> classifier -> verdict
Truth = Mapping[int, Mapping[str, str]]  # conversation -> classifier -> right label


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """n: verdicts whose right label is known; positives: those whose right label is the positive one.

    f1: of the positive label, or the mean over the labels where there are more than two. A label that is right nowhere
    has no F1, and None is where no label has one."""

    n: int
    positives: int
    accuracy: float
    f1: float | None


def qualities(answers: Answers, truth: Truth, labels: Mapping[str, Sequence[str]]) -> dict[str, Quality]:
    """Return the quality of each classifier whose right label is known of some conversation. The last turn counts.

    labels:  classifier -> its contract's labels, the positive one first."""
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)  # classifier -> (right, said)
    last = {conversation: turn for conversation, turn in sorted(answers)}
    for conversation, turn in last.items():
        said = answers[conversation, turn]
        for name, right in truth.get(conversation, {}).items():
            if name in said:
                pairs[name].append((right, said[name].label))
    return {name: _quality(found, labels[name]) for name, found in sorted(pairs.items())}


def mean(of: Mapping[str, Quality]) -> dict[str, Any] | None:
    """Return the mean over classifiers; None where there are none. F1 is the mean over those that have one."""
    if not of:
        return None
    return {
        "n": sum(one.n for one in of.values()),
        "accuracy": fmean(one.accuracy for one in of.values()),
        "positives": sum(one.positives for one in of.values()),
        "f1": mean_of(one.f1 for one in of.values()),
    }


def _quality(pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> Quality:
    # A server that runs already may have other labels: an answer that is none of ours is wrong.
    known = list(dict.fromkeys([*labels, *(said for _, said in pairs)]))
    truth, answered = ([known.index(label) for label in one] for one in zip(*pairs, strict=True))
    confusion = confusion_of(truth, answered, len(known))
    return Quality(
        n=len(pairs),
        accuracy=float(confusion.trace() / len(pairs)),
        positives=int(confusion[0].sum()),
        f1=mean_of(f1(confusion, label) for label in positives(len(labels))),
    )


def agreement(answers: Answers, others: Answers) -> dict[str, Any]:
    """Return how the verdicts differ that both systems gave. A difference is the largest of a verdict's scores and its
    label mass; verdicts without scores have none."""
    num, num_equal, differences = 0, 0, []
    for key in answers.keys() & others.keys():
        for name in answers[key].keys() & others[key].keys():
            one, other = answers[key][name], others[key][name]
            num += 1
            num_equal += one.label == other.label
            if one.scores and other.scores:
                apart = [abs(one.scores[label] - other.scores.get(label, 0.0)) for label in one.scores]
                if one.label_mass is not None and other.label_mass is not None:
                    apart.append(abs(one.label_mass - other.label_mass))
                differences.append(max(apart))
    return {
        "verdicts": num,
        "labels_equal": num_equal,
        "difference_mean": fmean(differences) if differences else None,
        "difference_max": max(differences, default=None),
    }
