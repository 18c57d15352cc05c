"""Sorts verdicts by classifier, beside the labels that they should have had."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import ConfigurationError, LoraplexError
from loraplex.evaluation.asking import Outcome, Question
from loraplex.evaluation.figures import Figures, figures_of
from loraplex.labelled import Labelled, hard_label
from loraplex.types import ErrorInfo, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Holds what one classifier said of the conversations that have a label for it.

    labels:   the contract's, in order.
    rows:     [n] the conversations that it answered; verdicts: [n] its answers; truth: [n] the right labels' indices.
    failed:   the conversations that it did not answer, with the reasons.
    """

    labels: tuple[str, ...]
    rows: tuple[Labelled, ...]
    verdicts: tuple[Verdict, ...]
    truth: tuple[int, ...]
    failed: tuple[tuple[Labelled, ErrorInfo], ...]

    @property
    def scores(self) -> list[list[float]]:
        """[n, labels] probabilities."""
        return [[(one.scores or {})[label] for label in self.labels] for one in self.verdicts]

    @property
    def answered(self) -> list[int]:
        """[n] index of the label that it answered."""
        return [self.labels.index(one.label or "") for one in self.verdicts]

    def figures(self) -> Figures:
        abstained = [one.abstained for one in self.verdicts]
        return figures_of(self.labels, self.truth, self.scores, self.answered, abstained, num_failed=len(self.failed))


def judge(
    questions: Seq[Question], outcomes: Seq[Outcome], known: Mapping[str, Seq[str]], data: Path
) -> tuple[dict[str, Judged], list[str]]:
    """Return what each classifier said, and the classifiers whose verdicts have no scores.

    outcomes:  the answer to each question, or why there is none.
    known:     classifier -> its contract's labels. A classifier's labels that are not known yet are those of its first
               verdict.
    Raises ConfigurationError where the data has labels that the classifier does not know."""
    said: dict[str, list[tuple[Labelled, Verdict]]] = {}
    for question, outcome in zip(questions, outcomes, strict=True):
        for name in question.classifiers:
            verdict = _failed(name, outcome) if isinstance(outcome, LoraplexError) else outcome[name]
            said.setdefault(name, []).append((question.row, verdict))
    found, without = {}, []
    for name, pairs in said.items():
        answers = [(row, verdict) for row, verdict in pairs if verdict.error is None]
        if answers and not answers[0][1].scores:
            without.append(name)
            continue
        labels = tuple(known.get(name) or (answers[0][1].scores or () if answers else ()))
        found[name] = Judged(
            labels=labels,
            rows=tuple(row for row, _ in answers),
            verdicts=tuple(_same(name, verdict, labels) for _, verdict in answers),
            truth=tuple(_truth(row, name, labels, data) for row, _ in answers),
            failed=tuple((row, verdict.error) for row, verdict in pairs if verdict.error is not None),
        )
    return found, without


def _failed(name: str, error: LoraplexError) -> Verdict:
    return Verdict(classifier=name, error=ErrorInfo.of(error))


def _truth(row: Labelled, name: str, labels: Seq[str], data: Path) -> int:
    try:
        return labels.index(hard_label(row.labels[name], labels, name))
    except ValueError as exc:
        raise ConfigurationError(f"{data}, line {row.line}", str(exc), remedy="correct the labels") from None


def _same(name: str, verdict: Verdict, labels: Seq[str]) -> Verdict:
    if set(verdict.scores or ()) != set(labels):
        raise ConfigurationError(
            name, "changed its labels while it was asked", remedy="ask a version that is not replaced meanwhile"
        )
    return verdict
