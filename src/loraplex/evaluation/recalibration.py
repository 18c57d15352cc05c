"""Fits a classifier's contract to labelled conversations: on one half of them, to be judged on the other."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from loraplex.bundle import CONTRACT, AdapterSource
from loraplex.classifier import Calibration, Contract
from loraplex.errors import LoraplexError, quoted
from loraplex.evaluation.asking import Outcome, Question
from loraplex.evaluation.calibration import fitted, raw_log_probs
from loraplex.evaluation.figures import Figures, figures_of
from loraplex.evaluation.judged import Judged
from loraplex.evaluation.objective import LEAST, Objective, choose_gate, fit_threshold
from loraplex.labelled import Labelled, label_shares
from loraplex.same_conversation import conversations
from loraplex.types import Verdict


class NotFitted(Exception):
    """Says why a classifier's contract stays as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalibration:
    """A contract that was fitted.

    keys:           those of the contract that change, as the file holds them.
    num_fitted:     conversations of the half that it was fitted on.
    before, after:  the figures of the old and the new contract on the other half.
    """

    contract: Contract
    keys: Mapping[str, Any]
    num_fitted: int
    before: Figures
    after: Figures


def golden_questions(sources: Mapping[str, AdapterSource]) -> list[Question]:
    """Return a question for each golden example of the classifiers' contracts."""
    return [
        Question(row=Labelled(line=0, input=golden.text, labels={}), classifiers=(name,))
        for name, source in sources.items()
        for golden in (source.contract.golden if source.contract is not None else ())
    ]


def recalibrate_all(
    sources: Mapping[str, AdapterSource],
    judged: Mapping[str, Judged],
    golden: Seq[tuple[Question, Outcome]],
    objective: Objective,
    abstain_error: float | None,
) -> tuple[dict[str, Recalibration], dict[str, str]]:
    """Return the contracts that were fitted, and why the others stay as they are.

    golden:  the answers to `golden_questions`. A contract that would answer one of them otherwise could not be loaded.
    """
    done, kept = {}, {}
    for name, one in judged.items():
        contract = sources[name].contract
        try:
            if contract is None or sources[name].contract_path.name != CONTRACT:
                how = "" if contract is None else "; `loraplex adapters import` writes one from the io.yaml"
                raise NotFitted(f"it has no {CONTRACT}{how}")
            made = recalibrate(name, contract, one, objective, abstain_error)
            answers = [outcome for question, outcome in golden if question.classifiers == (name,)]
            _check_golden(name, contract, made.contract, answers)
            done[name] = made
        except NotFitted as exc:
            kept[name] = str(exc)
    return done, kept


def recalibrate(
    name: str, contract: Contract, judged: Judged, objective: Objective, abstain_error: float | None
) -> Recalibration:
    """Return a classifier's new contract. Raises NotFitted where the data does not allow one.

    abstain_error:  the share of wrong answers that the abstain gate may let through; None leaves the gate as it is.
    """
    counts = Counter(judged.truth)
    if sum(num >= LEAST for num in counts.values()) < 2:
        told = ", ".join(f"{counts[index]} are {label!r}" for index, label in enumerate(contract.labels))
        raise NotFitted(f"two labels with {LEAST} conversations each are needed, and of these {told}")
    log_probs = [raw(verdict, contract) for verdict in judged.verdicts]
    ours, shown = halves(conversations(judged.rows), judged.truth)
    fit_on, truth = [log_probs[index] for index in ours], [judged.truth[index] for index in ours]
    shares = [label_shares(judged.rows[index].labels[name], contract.labels, name) for index in ours]
    known = contract.calibration
    bias = [known.bias.get(label, 0.0) for label in contract.labels]
    keys: dict[str, Any] = {"calibration": fitted(contract.labels, fit_on, shares, bias, known.temperature)}
    made = _with(contract, keys)
    if objective.kind != "none" and len(contract.labels) == 2:
        threshold = fit_threshold(made, fit_on, truth, objective)
        if threshold is None:
            wanted = objective.kind.replace("-at-", " at a ")
            raise NotFitted(f"no threshold reaches a {wanted} of {objective.number:g}")
        keys["threshold"] = threshold
        made = _with(contract, keys)
    if abstain_error is not None:
        decided = [made.decide(one) for one in fit_on]
        is_right = [one.label == contract.labels[right] for one, right in zip(decided, truth, strict=True)]
        gate = choose_gate([one.confidence for one in decided], is_right, abstain_error)
        if gate is None:
            raise NotFitted(f"even the surest answers are wrong more often than {abstain_error:g}")
        keys["abstain_below"] = gate
        made = _with(contract, keys)
    others = [(log_probs[index], judged.truth[index]) for index in shown]
    return Recalibration(
        contract=made,
        keys=keys,
        num_fitted=len(ours),
        before=_figures(contract, others),
        after=_figures(made, others),
    )


def raw(verdict: Verdict, contract: Contract) -> list[float]:
    """Return the log probabilities of the labels that a verdict's scores were made of."""
    assert verdict.scores is not None, "a classifier with a contract has scores"
    bias = [contract.calibration.bias.get(label, 0.0) for label in contract.labels]
    return raw_log_probs([verdict.scores[label] for label in contract.labels], contract.calibration.temperature, bias)


def halves(ids: Seq[str], truth: Seq[int]) -> tuple[list[int], list[int]]:
    """Return the conversations of two halves, always the same ones. Each has half of the conversations of each label,
    and the same conversation is in one half only, with all of its turns.

    ids:    [n] what identifies the conversation.
    truth:  [n] index of the right label.
    """
    places: dict[str, list[int]] = {}
    for index, one in enumerate(ids):
        places.setdefault(one, []).append(index)
    found: tuple[list[int], list[int]] = [], []
    turns: Counter[int] = Counter()
    for _, indices in sorted(places.items()):
        label = truth[indices[0]]
        found[turns[label] % 2].extend(indices)
        turns[label] += 1
    return sorted(found[0]), sorted(found[1])


def _check_golden(name: str, old: Contract, new: Contract, answers: Seq[Outcome]) -> None:
    """Raise NotFitted where a golden example would come out wrong."""
    for golden, answer in zip(old.golden, answers, strict=True):
        verdict = None if isinstance(answer, LoraplexError) else answer[name]
        label = None if verdict is None or verdict.error is not None else new.decide(raw(verdict, old)).label
        if label != golden.label:
            now = (
                "was not answered"
                if label is None
                else f"would be answered {quoted(label)}, not {quoted(golden.label)}"
            )
            raise NotFitted(f"its golden example {quoted(golden.text)} {now}")


def _with(contract: Contract, keys: Mapping[str, Any]) -> Contract:
    return contract.model_copy(update={**keys, "calibration": Calibration(**keys["calibration"])})


def _figures(contract: Contract, pairs: Seq[tuple[Seq[float], int]]) -> Figures:
    labels = contract.labels
    decided = [contract.decide(log_probs) for log_probs, _ in pairs]
    return figures_of(
        labels,
        [right for _, right in pairs],
        [[one.scores[label] for label in labels] for one in decided],
        [labels.index(one.label) for one in decided],
        [one.abstained for one in decided],
    )
