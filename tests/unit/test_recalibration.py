"""Thresholds, gates and contracts that are fitted to labels, and what is left of a `classifier.yaml`."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from loraplex.bundle import AdapterSource
from loraplex.classifier import Calibration, Contract, Golden, read_contract
from loraplex.errors import ConfigurationError, ContractError, QueueFullError
from loraplex.evaluation.asking import Question
from loraplex.evaluation.contract_file import changed, write
from loraplex.evaluation.judged import Judged, judge
from loraplex.evaluation.objective import Objective, believed, choose_gate, choose_threshold, read_objective
from loraplex.evaluation.recalibration import NotFitted, golden_questions, halves, raw, recalibrate, recalibrate_all
from loraplex.labelled import Labelled
from loraplex.same_conversation import conversations
from loraplex.types import ClassifyResult, Timings, Usage, Verdict

DATA = Path("data.jsonl")
CONTRACT = Contract(labels=("yes", "no"), calibration=Calibration(temperature=2.0, bias={"yes": -0.7}))
F1 = Objective(kind="f1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("f1", F1),
        ("none", Objective(kind="none")),
        ("cost=5", Objective(kind="cost", number=5.0)),
        ("precision-at-recall=0.9", Objective(kind="precision-at-recall", number=0.9)),
    ],
)
def test_objectives_are_read(given: str, expected: Objective) -> None:
    assert read_objective(given) == expected


@pytest.mark.parametrize("given", ["", "F2", "f1=1", "cost", "cost=0", "cost=nan", "recall-at-precision=1.1"])
def test_other_objectives_are_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match="--objective"):
        read_objective(given)


def figures(scores: Any, positive: Any, threshold: float) -> tuple[float, float, float, float]:
    """F1, precision, recall, and what errors cost where a miss costs 3 false alarms."""
    said = scores >= threshold
    both = (said & positive).sum()
    return (
        2 * both / (said.sum() + positive.sum()),
        both / max(said.sum(), 1),
        both / positive.sum(),
        (said & ~positive).sum() + 3 * (~said & positive).sum(),
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_than_the_chosen_one(seed: int) -> None:
    draw = numpy.random.default_rng(seed)
    positive = draw.random(60) < 0.4
    positive[0] = True
    scores = numpy.clip(0.3 + 0.3 * positive + draw.normal(size=60) * 0.25, 0, 1).round(draw.integers(1, 4))
    every = [figures(scores, positive, one) for one in [*numpy.unique(scores), 1.0]]

    def at(objective: Objective) -> tuple[float, float, float, float]:
        threshold = choose_threshold(scores.tolist(), positive.tolist(), objective)
        assert threshold is not None
        return figures(scores, positive, threshold)

    assert at(F1)[0] == pytest.approx(max(one[0] for one in every))
    assert at(Objective(kind="cost", number=3.0))[3] == min(one[3] for one in every)
    found = at(Objective(kind="precision-at-recall", number=0.8))
    assert found[2] >= 0.8 and found[1] == pytest.approx(max(one[1] for one in every if one[2] >= 0.8))
    found = at(Objective(kind="recall-at-precision", number=0.5))
    assert found[1] >= 0.5 and found[2] == pytest.approx(max(one[2] for one in every if one[1] >= 0.5))


def test_a_threshold_lies_in_the_middle_and_near_a_half() -> None:
    assert choose_threshold([0.1, 0.3, 0.7, 0.9], [False, False, True, True], F1) == 0.5
    assert choose_threshold([0.1, 0.2, 0.3], [False, False, False], Objective(kind="cost", number=1.0)) == 0.65
    assert choose_threshold([0.9, 0.1], [False, True], Objective(kind="recall-at-precision", number=0.9)) is None
    assert choose_threshold([1.0, 1.0], [False, True], F1) == 0.5
    everything = Objective(kind="precision-at-recall", number=1.0)
    assert choose_threshold([0.9, 0.7, 0.3], [0.7, 0.1, 0.1], everything) == pytest.approx(0.15)


def test_a_gate_lets_through_as_much_as_the_wanted_error_allows() -> None:
    sure, right = [0.9, 0.8, 0.7, 0.6], [True, True, False, True]
    assert choose_gate(sure, right, 0.25) == 0.0
    assert choose_gate(sure, right, 0.2) == 0.75
    assert choose_gate(sure, [False, True, True, True], 0.2) is None
    assert choose_gate([0.9, 0.9, 0.5], [True, False, True], 0.4) == 0.0
    assert choose_gate([1.0, 1.0, 0.6], [True, True, False], 0.1) == 0.8
    assert choose_gate([1.0, 1.0], [True, True], 0.1) == 0.0


def test_few_labels_are_believed_less_than_scores() -> None:
    few = believed([True] * 3 + [False] * 300, [0.8] * 303)
    assert few[0] == pytest.approx(0.8 + 0.2 * 3 / 103) and few[-1] == pytest.approx(0.8 * 100 / 103)
    many = believed([True] * 9900 + [False] * 9900, [0.5] * 19800)
    assert many[0] == pytest.approx(0.995) and many[-1] == pytest.approx(0.005)


def test_halves_share_no_conversation_and_each_has_every_label() -> None:
    ids = [str(index % 50) for index in range(100)]  # each conversation twice
    truth = [int(index % 50 < 10) for index in range(100)]
    one, other = halves(ids, truth)
    assert sorted(one + other) == list(range(100)) and (one, other) == halves(ids, truth)
    assert not {ids[index] for index in one} & {ids[index] for index in other}
    assert sum(truth[index] for index in one) == sum(truth[index] for index in other) == 10


def verdict(log_probs: list[float], contract: Contract = CONTRACT) -> Verdict:
    return contract.decide(log_probs).verdict("done")


def test_a_verdict_gives_back_what_its_scores_were_made_of() -> None:
    for log_probs in ([-0.1, -5.0], [-30.0, -0.001], [-2.0, -2.0], [-1e-9, -400.0]):
        yes, no = raw(verdict(log_probs), CONTRACT)
        assert yes - no == pytest.approx(log_probs[0] - log_probs[1], rel=1e-9)


def answer(one: Verdict) -> ClassifyResult:
    return ClassifyResult(id="1", verdicts=(one,), usage=Usage(), timings=Timings())


def judged(num: int, contract: Contract = CONTRACT, *, sign: int = 1) -> Judged:
    """Log probabilities that are three times too sure, and lean to "yes". sign: -1 for scores that tell the
    opposite."""
    draw = numpy.random.default_rng(0)
    questions, outcomes = [], []
    for line in range(num):
        logit = draw.normal() * 1.5
        truth = draw.random() < 1 / (1 + math.exp(-2 * sign * logit))
        row = Labelled(line=line + 1, input=f"Customer: {line}", labels={"done": bool(truth)})
        questions.append(Question(row=row, classifiers=("done",)))
        shown = 6 * logit + 1.0
        outcomes.append(answer(verdict([-math.log1p(math.exp(-shown)), -math.log1p(math.exp(shown))], contract)))
    found, _ = judge(questions, outcomes, {}, DATA)
    return found["done"]


def test_temperature_and_bias_are_found_again_whatever_the_contract_was() -> None:
    for contract in (CONTRACT, Contract(labels=("yes", "no")), CONTRACT.model_copy(update={"threshold": 0.9})):
        found = recalibrate("done", contract, judged(3000, contract), Objective(kind="none"), None)
        calibration = found.contract.calibration
        assert calibration.temperature == pytest.approx(3.0, rel=0.2)
        assert calibration.bias["yes"] / calibration.temperature == pytest.approx(-1 / 3, abs=0.12)
        assert found.after.log_loss is not None and found.before.log_loss is not None
        assert found.after.log_loss < found.before.log_loss
        assert found.contract.threshold == contract.threshold and "threshold" not in found.keys
        assert found.num_fitted + found.after.n == 3000 and found.after.n == found.before.n


def test_a_good_temperature_is_not_spoiled_by_few_conversations() -> None:
    """As after a training whose own slice was large."""
    good = Contract(labels=("yes", "no"), calibration=Calibration(temperature=8.0))
    draw = numpy.random.default_rng(0)
    questions, outcomes = [], []
    for line in range(44):
        logit = draw.normal()
        truth = bool(draw.random() < 1 / (1 + math.exp(-logit)))
        row = Labelled(line=line + 1, input=f"Customer: {line}", labels={"done": truth})
        questions.append(Question(row=row, classifiers=("done",)))
        shown = 8 * logit
        outcomes.append(answer(verdict([-math.log1p(math.exp(-shown)), -math.log1p(math.exp(shown))], good)))
    found, _ = judge(questions, outcomes, {}, DATA)
    made = recalibrate("done", good, found["done"], Objective(kind="none"), None).contract.calibration
    assert made.temperature == pytest.approx(8.0, rel=0.2)


def test_the_turns_of_a_chat_are_in_one_half() -> None:
    one = judged(40)
    rows = tuple(
        Labelled(line=row.line, input=f"chat {place % 20}" + "\nmore" * (place // 20), labels=row.labels)
        for place, row in enumerate(one.rows)
    )
    for half in halves(conversations(rows), one.truth):
        assert {place % 20 for place in half if place < 20} == {place % 20 for place in half if place >= 20}


def test_threshold_and_gate_do_what_was_asked() -> None:
    plain = Contract(labels=("yes", "no"))
    found = recalibrate("done", plain, judged(2000, plain), Objective(kind="precision-at-recall", number=0.9), 0.05)
    assert found.keys.keys() == {"calibration", "threshold", "abstain_below"}
    assert found.after.recall.value is not None and found.after.recall.value == pytest.approx(0.9, abs=0.05)
    assert found.after.wrong_above_gate.value == pytest.approx(0.05, abs=0.03)
    assert found.before.coverage.value == 1.0 > (found.after.coverage.value or 1.0) > 0.1
    cheap = recalibrate("done", plain, judged(2000, plain), Objective(kind="cost", number=9.0), None)
    assert cheap.contract.threshold == pytest.approx(0.1, abs=0.08), "as calibrated probabilities say"


def test_what_cannot_be_fitted_is_left_with_a_reason() -> None:
    with pytest.raises(NotFitted, match="10 conversations each"):
        recalibrate("done", CONTRACT, judged(12), F1, None)
    with pytest.raises(NotFitted, match="no threshold reaches a recall at a precision of 1"):
        recalibrate("done", CONTRACT, judged(400, sign=-1), Objective(kind="recall-at-precision", number=1.0), None)
    with pytest.raises(NotFitted, match="even the surest answers"):
        recalibrate("done", CONTRACT, judged(400, sign=-1), Objective(kind="none"), 0.0)
    assert "threshold" not in _three_labels().keys


def _three_labels() -> Any:
    contract = Contract(labels=("a", "b", "c"))
    draw = numpy.random.default_rng(0)
    rows, verdicts, truth = [], [], []
    for line in range(90):
        shares = draw.dirichlet([1.0, 1.0, 1.0])
        found = contract.decide(numpy.log(shares).tolist())
        truth.append(int(draw.choice(3, p=shares)))
        rows.append(Labelled(line=line, input=str(line), labels={"kind": "abc"[truth[-1]]}))
        verdicts.append(Verdict(classifier="kind", label=found.label, confidence=0.5, scores=found.scores))
    one = Judged(labels=contract.labels, rows=tuple(rows), verdicts=tuple(verdicts), truth=tuple(truth), failed=())
    return recalibrate("kind", contract, one, F1, 0.2)


def source(contract: Contract | None, folder: Path = Path("done")) -> AdapterSource:
    return AdapterSource(name="done", path=folder, contract=contract)


def test_a_contract_that_breaks_a_golden_example_is_not_taken(tmp_path: Path) -> None:
    one = judged(400)
    contract = CONTRACT.model_copy(update={"golden": (Golden(text="Customer: bye", label="yes"),)})
    sources = {"done": source(contract, tmp_path)}
    [question] = golden_questions(sources)
    for outcome, why in (
        (answer(verdict([-5.0, -0.1])), "'Customer: bye' would be answered 'no', not 'yes'"),
        (QueueFullError("full", remedy="later"), "was not answered"),
        (answer(verdict([-0.001, -9.0])), ""),
    ):
        done, kept = recalibrate_all(sources, {"done": one}, [(question, outcome)], F1, None)
        assert (why in kept["done"]) if why else done.keys() == {"done"} and not kept


def test_without_a_classifier_yaml_nothing_is_fitted(tmp_path: Path) -> None:
    one = judged(400)
    (tmp_path / "io.yaml").write_text("model: x\n")
    for contract, why in ((None, "it has no classifier.yaml"), (CONTRACT, "loraplex adapters import")):
        done, kept = recalibrate_all({"done": source(contract, tmp_path)}, {"done": one}, [], F1, None)
        assert not done and why in kept["done"]


FILE = """\
# How done is asked.
question: Is it done?   # the question
template: |
  {conversation}
  {question}
labels: ['yes', 'no']  # the positive one first
calibration:   # of last year
  temperature: 1.0
  bias:
    'yes': -0.3  # rare

# The rest.
threshold: 0.5  # a half
golden:
- {text: "Customer: Thanks, bye!", label: 'yes'}
"""
KEYS = {"calibration": {"temperature": 1.25, "bias": {"yes": -0.5}}, "threshold": 0.000012, "abstain_below": 0.75}


def test_other_lines_and_their_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "classifier.yaml"
    path.write_text(FILE)
    text = changed(path, KEYS)
    for line in FILE.splitlines():
        if not any(word in line for word in ("calibration", "temperature", "bias", "'yes': -0.3", "threshold")):
            assert line in text.splitlines(), line
    assert "threshold: 1.2e-05  # a half" in text and "}  # rare\n\n# The rest." in text
    assert yaml.safe_load(text) == {**yaml.safe_load(FILE), **KEYS}
    write(path, text)
    contract = read_contract(path)
    assert contract.calibration.bias == {"yes": -0.5} and contract.abstain_below == 0.75
    assert [one.name for one in tmp_path.iterdir()] == ["classifier.yaml"]
    assert changed(path, KEYS) == text, "twice changes nothing"


@pytest.mark.parametrize(
    "text",
    [
        "labels: ['yes', 'no']",
        "labels:\n- 'yes'\n- 'no'\nthreshold:\n",
        "---\nlabels:\n  - 'yes'\n  - 'no'   # the other\n",
        "{labels: ['yes', 'no'], threshold: 0.4}\n",
        "  labels: ['yes', 'no']\n  calibration: {bias: {'yes': 1}}\n",
        "roles: &r {user: Customer}\nlabels: &l ['yes', 'no']\n",
        "\ufefflabels: ['yes', 'no']\r\nthreshold: 0.3\r\n",
        "labels: [\n  'yes',\n  'no',  # the other\n]\n# end\n",
        'labels: ["yes", "no"]\nquestion: "Is it\n  done?"\ncalibration: {temperature: 2}  # hot',
        "labels: ['yes', 'n\u00f6']\nquestion: \u00bfhecho?\ncalibration: {}\n...\n",
    ],
)
def test_files_of_any_form_get_the_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classifier.yaml"
    path.write_bytes(text.encode())
    before = read_contract(path)
    write(path, changed(path, KEYS))
    after = read_contract(path)
    assert after.threshold == 0.000012 and after.calibration == Calibration(**KEYS["calibration"])  # type: ignore[arg-type]
    kept = {"calibration", "threshold", "abstain_below"}
    assert after.model_dump(exclude=kept) == before.model_dump(exclude=kept)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"file/classifier\.yaml: cannot be written"):
        (tmp_path / "file").write_text("")
        write(tmp_path / "file" / "classifier.yaml", "x")
