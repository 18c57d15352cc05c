"""How well a bare base answers questions in words, asked once and in both orders of their labels.

    python -m benchmarks.questions BASE --data FILE --questions FILE [--conversations 48]

The questions are a YAML file with `name: the question`, which is a yes/no question, or with `name: {type, instructions,
labels, descriptions}`. The data is that of `loraplex eval`. A question that does well needs no adapter yet.
"""

import argparse
from pathlib import Path

from loraplex import Loraplex, Question
from loraplex.config import read_yaml
from loraplex.errors import ConfigurationError
from loraplex.evaluation.figures import figures_of
from loraplex.labelled import hard_label, read_labelled
from loraplex.types import ClassifyRequest


def read_questions(path: Path) -> dict[str, Question]:
    given = read_yaml(path, ConfigurationError)
    as_predicate = {
        name: {"type": "predicate", "instructions": one} for name, one in given.items() if isinstance(one, str)
    }
    values = {**given, **as_predicate}
    return {
        name: Question(**one | ({"labels": tuple(one["labels"])} if "labels" in one else {}))
        for name, one in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=48, help="the first of the file")
    args = parser.parse_args()
    questions = read_questions(args.questions)
    rows = read_labelled(args.data)[: args.conversations]
    print("| question | asked in | n | accuracy | AUC | log loss | label mass | answered first label |")
    print("|---|---|---|---|---|---|---|---|")
    for correction in ("none", "orders"):
        with Loraplex.load(args.base, dtype="float32", adhoc_questions=True, adhoc_correction=correction) as loraplex:
            requests = [ClassifyRequest(input=row.input, classifiers=(), questions=questions) for row in rows]
            results = [loraplex.run(loraplex.router.classify(one)) for one in requests]
        for name, question in questions.items():
            labels = question.labels
            known = [(row, result[name]) for row, result in zip(rows, results, strict=True) if name in row.labels]
            known = [(row, verdict) for row, verdict in known if verdict.error is None]
            truth = [labels.index(hard_label(row.labels[name], labels, name)) for row, _ in known]
            said = [labels.index(verdict.label or "") for _, verdict in known]
            scores = [list((verdict.scores or {}).values()) for _, verdict in known]
            found = figures_of(labels, truth, scores, said, [False] * len(known), num_failed=len(rows) - len(known))
            mass = sum(verdict.label_mass or 0.0 for _, verdict in known) / max(1, len(known))
            numbers = (found.accuracy.value, found.auc.value, found.log_loss, mass, said.count(0) / max(1, len(known)))
            shown = " | ".join("-" if number is None else f"{number:.3f}" for number in numbers)
            print(f"| {name} | {'both orders' if correction == 'orders' else 'one order'} | {found.n} | {shown} |")


if __name__ == "__main__":
    main()
