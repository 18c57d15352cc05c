"""Divides labelled conversations into train, dev and calibration, and says what the data holds before it is used."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.labelled import Labelled, label_shares
from loraplex.same_conversation import NO_PROMPTS, Prompts, conversations, copies
from loraplex.training.asked import TooLong

SIDES = ("train", "dev", "calibration")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of the data, by their place in it."""

    train: tuple[int, ...]
    dev: tuple[int, ...]
    calibration: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What is in the data.

    num_unlabelled: conversations that were left out, because they have no label for any of the classifiers.
    counts:        classifier -> label -> conversations (soft labels count by their shares).
    missing:       classifier -> conversations without a label for it.
    num_duplicates: conversations that are there before, word for word or as the same prompt; they stay on one side of
                   the split.
    contradictions: classifier -> conversations that are there twice with different labels.
    num_exported:  conversations from `loraplex routes export`.
    cut, left_out:  lines with a prompt that lost its beginning, and with one that did not fit at all.
    too_long:      such a line -> how many tokens its prompt has, and how many it may have.
    unseen:        (classifier, label, side) where no conversation of this side has the label.
    """

    num_conversations: int
    num_unlabelled: int
    counts: Mapping[str, Mapping[str, float]]
    missing: Mapping[str, int]
    num_duplicates: int
    contradictions: Mapping[str, int]
    num_exported: int
    cut: tuple[int, ...]
    left_out: tuple[int, ...]
    too_long: Mapping[int, str]
    unseen: tuple[tuple[str, str, str], ...]
    split: Mapping[str, int]

    @property
    def num_trained(self) -> Mapping[str, int]:
        """Return classifier -> labels that a conversation to train on has."""
        missing = Counter(name for name, _, side in self.unseen if side == "train")
        return {name: len(counts) - missing[name] for name, counts in self.counts.items()}


def split_rows(
    rows: Seq[Labelled], *, dev: float, calibration: float, seed: int, prompts: Prompts = NO_PROMPTS
) -> Split:
    """Divide the conversations. The same conversation is on one side only, with all of its turns. Each side has its
    share of rare labels: conversations with the same rarest label are dealt out together, the first of them to train
    on.

    dev, calibration: shares of the conversations. prompts: of the rows; see `same_conversation`.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, id in enumerate(conversations(rows, prompts)):
        groups[id].append(index)
    frequency = Counter(one for row in rows for one in _likeliest(row))

    def rarest(group: Seq[int]) -> tuple[int, tuple[str, str]]:
        labels = [one for index in group for one in _likeliest(rows[index])]
        return min(((frequency[one], one) for one in labels), default=(0, ("", "")))

    strata: dict[tuple[int, tuple[str, str]], list[list[int]]] = defaultdict(list)
    for group in groups.values():
        strata[rarest(group)].append(group)
    draw = random.Random(seed)
    found: dict[str, list[int]] = {"train": [], "dev": [], "calibration": []}
    wanted = {"dev": dev, "calibration": calibration, "train": 1 - dev - calibration}
    taken = dict.fromkeys(wanted, 0.0)
    for _, stratum in sorted(strata.items()):
        draw.shuffle(stratum)
        for number, group in enumerate(stratum):
            total = sum(taken.values()) + len(group)
            side = max(wanted, key=lambda one: wanted[one] * total - taken[one]) if number else "train"
            found[side] += group
            taken[side] += len(group)
    return Split(**{side: tuple(sorted(indices)) for side, indices in found.items()})


def _likeliest(row: Labelled) -> list[tuple[str, str]]:
    """Return each classifier with its label; of several shares, the one with the largest."""
    return [
        (name, str(max(label, key=label.__getitem__) if isinstance(label, Mapping) else label))
        for name, label in row.labels.items()
    ]


def report_on(
    rows: Seq[Labelled],
    labels: Mapping[str, Seq[str]],
    split: Split,
    too_long: Seq[TooLong],
    *,
    num_unlabelled: int = 0,
    prompts: Prompts = NO_PROMPTS,
) -> DataReport:
    """Return what the data holds. labels: classifier -> its labels. num_unlabelled: as in the report. prompts: of the
    rows; see `same_conversation`."""
    counts = {name: dict.fromkeys(of, 0.0) for name, of in labels.items()}
    missing, contradictions = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0)
    side_of = {index: side for side in SIDES for index in getattr(split, side)}
    seen_on: set[tuple[str, str, str]] = set()
    num_duplicates = 0
    for number, (row, copied) in enumerate(zip(rows, copies(rows, prompts), strict=True)):
        first = rows[copied]
        num_duplicates += first is not row
        for name, of in labels.items():
            if name not in row.labels:
                missing[name] += 1
                continue
            for index, share in label_shares(row.labels[name], of, name).items():
                counts[name][of[index]] += share
                seen_on.add((name, of[index], side_of[number]))
            contradictions[name] += first is not row and first.labels.get(name, row.labels[name]) != row.labels[name]
    return DataReport(
        num_conversations=len(rows),
        num_unlabelled=num_unlabelled,
        counts=counts,
        missing=missing,
        num_duplicates=num_duplicates,
        contradictions=contradictions,
        num_exported=sum(row.is_exported for row in rows),
        cut=_lines(rows, (one.row for one in too_long if not one.is_left_out)),
        left_out=_lines(rows, (one.row for one in too_long if one.is_left_out)),
        too_long={rows[one.row].line: one.why for one in reversed(too_long)},
        unseen=tuple(
            (name, label, side)
            for name, of in labels.items()
            for label in of
            for side in SIDES
            if getattr(split, side) and (name, label, side) not in seen_on
        ),
        split={side: len(getattr(split, side)) for side in SIDES},
    )


def _lines(rows: Seq[Labelled], indices: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({rows[index].line for index in indices}))
