"""Divides labelled conversations into train, dev and calibration, and says what the data holds before it is used."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.labelled import Labelled
from loraplex.training.asked import TooLong, conversation_id, label_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of the data, by their place in it."""

    train: tuple[int, ...]
    dev: tuple[int, ...]
    calibration: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What is in the data.

    counts:        classifier -> label -> conversations (soft labels count by their shares).
    missing:       classifier -> conversations without a label for it.
    num_duplicates: conversations that are there before, word for word; they stay on one side of the split.
    contradictions: classifier -> conversations that are there twice with different labels.
    num_cut, num_left_out: prompts that lost their oldest turns, and prompts that did not fit at all.
    """

    num_conversations: int
    counts: Mapping[str, Mapping[str, float]]
    missing: Mapping[str, int]
    num_duplicates: int
    contradictions: Mapping[str, int]
    num_cut: int
    num_left_out: int
    split: Mapping[str, int]


def split_rows(rows: Seq[Labelled], *, dev: float, calibration: float, seed: int) -> Split:
    """Divide the conversations. The same conversation is on one side only. Each side has its share of rare labels:
    conversations with the same rarest label are dealt out together.

    dev, calibration: shares of the conversations.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[conversation_id(row)].append(index)
    frequency = Counter((name, str(label)) for row in rows for name, label in row.labels.items())

    def rarest(group: Seq[int]) -> tuple[int, str]:
        labels = [(name, str(label)) for index in group for name, label in rows[index].labels.items()]
        return min(((frequency[one], repr(one)) for one in labels), default=(0, ""))

    strata: dict[tuple[int, str], list[list[int]]] = defaultdict(list)
    for group in groups.values():
        strata[rarest(group)].append(group)
    draw = random.Random(seed)
    found: dict[str, list[int]] = {"train": [], "dev": [], "calibration": []}
    wanted = {"dev": dev, "calibration": calibration, "train": 1 - dev - calibration}
    taken = dict.fromkeys(wanted, 0.0)
    for _, stratum in sorted(strata.items()):
        draw.shuffle(stratum)
        for group in stratum:
            total = sum(taken.values()) + len(group)
            side = max(wanted, key=lambda one: wanted[one] * total - taken[one])
            found[side] += group
            taken[side] += len(group)
    return Split(**{side: tuple(sorted(indices)) for side, indices in found.items()})


def report_on(rows: Seq[Labelled], labels: Mapping[str, Seq[str]], split: Split, too_long: Seq[TooLong]) -> DataReport:
    """Return what the data holds. labels: classifier -> its labels."""
    counts = {name: dict.fromkeys(of, 0.0) for name, of in labels.items()}
    missing, contradictions = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0)
    seen: dict[str, Labelled] = {}
    num_duplicates = 0
    for row in rows:
        first = seen.setdefault(conversation_id(row), row)
        num_duplicates += first is not row
        for name, of in labels.items():
            if name not in row.labels:
                missing[name] += 1
                continue
            for index, share in label_shares(row.labels[name], of, name).items():
                counts[name][of[index]] += share
            contradictions[name] += first is not row and first.labels.get(name, row.labels[name]) != row.labels[name]
    return DataReport(
        num_conversations=len(rows),
        counts=counts,
        missing=missing,
        num_duplicates=num_duplicates,
        contradictions=contradictions,
        num_cut=sum(not one.is_left_out for one in too_long),
        num_left_out=sum(one.is_left_out for one in too_long),
        split={side: len(getattr(split, side)) for side in ("train", "dev", "calibration")},
    )
