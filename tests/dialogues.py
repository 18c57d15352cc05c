"""Small labelled conversations to train on, written on the spot: a word tells each label."""

import json
import random
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loraplex.evaluation.quality import Quality
from loraplex.training.fit import Told
from loraplex.training.prepared import Prepared, prepare
from loraplex.training.settings import TrainSettings
from loraplex.training.split import DataReport

WORDS = "order hotel room flight table booking seat ticket payment card city date time name".split()
CLUES = {"isThankful": "bravo", "isFraud": "stolen"}  # of many tokens: one token alone is learned more slowly
TEMPLATE = "{conversation}<|ask|>\n"  # of tiny.save_base's tokenizer


def dialogue(draw: random.Random) -> tuple[str, dict[str, bool]]:
    labels = {name: draw.random() < 0.4 for name in CLUES}
    words = draw.choices(WORDS, k=draw.randint(4, 9)) + [CLUES[name] for name, found in labels.items() if found] * 2
    draw.shuffle(words)
    return f"Customer: {' '.join(words)}", labels


def write(path: Path, num: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    return write_rows(path, [dict(zip(("text", "labels"), dialogue(draw), strict=True)) for _ in range(num)])


def write_rows(path: Path, rows: Seq[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def prepared(base: Path, data: Path, settings: TrainSettings, **options: Any) -> Prepared:
    return prepare(str(base), data, settings, **options)


class Recorder:
    """Watches a run, and ends it after a step."""

    def __init__(self, last_step: int | None = None) -> None:
        self.last_step = last_step
        self.report: DataReport | None = None
        self.steps: list[Told] = []
        self.qualities: dict[str, Quality | None] = {}

    def data(self, report: DataReport, weights: Mapping[str, Mapping[str, float]]) -> None:
        self.report = report

    def started(self, names: Seq[str], num_parameters: int, num_steps: int, first_step: int) -> None:
        self.first_step = first_step

    def step(self, told: Told) -> bool:
        self.steps.append(told)
        return told.step == self.last_step

    def finished(self, name: str, before: Quality | None, after: Quality | None, folder: Path) -> None:
        self.qualities[name] = after
