import json
import math
from pathlib import Path
from typing import Any

import pytest

from loraplex.classifier import Contract, conversation_text, normalized, read_contract
from loraplex.errors import ContractError, InvalidRequestError
from loraplex.types import Message, ToolCall

ROLES = {"user": "Customer", "assistant": "Agent"}


def contract(**values: Any) -> Contract:
    return Contract(**{"labels": ("yes", "no"), **values})


def test_scores_are_the_softmax_of_label_log_probs() -> None:
    decision = contract().decide([math.log(0.3), math.log(0.1)])
    assert decision.scores == pytest.approx({"yes": 0.75, "no": 0.25})
    assert decision.label == "yes"
    assert decision.confidence == pytest.approx(0.75)
    assert decision.label_mass == pytest.approx(0.4)


def test_calibration_divides_by_temperature_after_adding_the_bias() -> None:
    calibrated = contract(calibration={"temperature": 2.0, "bias": {"yes": -1.0}})
    assert calibrated.decide([0.0, 0.0]).scores["yes"] == pytest.approx(1 / (1 + math.exp(0.5)))


@pytest.mark.parametrize(("threshold", "label"), [(None, "yes"), (0.6, "yes"), (0.61, "no"), (0.0, "yes"), (1.0, "no")])
def test_threshold_is_on_the_first_label(threshold: float | None, label: str) -> None:
    decision = contract(threshold=threshold).decide([math.log(0.6), math.log(0.4)])
    assert decision.label == label
    assert decision.confidence == pytest.approx(0.6 if label == "yes" else 0.4)


def test_abstains_below_the_winners_probability() -> None:
    assert contract(abstain_below=0.7).decide([math.log(0.6), math.log(0.4)]).abstained
    assert not contract(abstain_below=0.6).decide([math.log(0.7), math.log(0.3)]).abstained


@pytest.mark.parametrize(
    ("values", "mass", "is_low"),
    [
        ({}, 0.05, False),
        ({}, 0.0499, True),
        ({"min_label_mass": 0.5}, 0.4, True),
        ({"min_label_mass": 0.0}, 1e-9, False),
    ],
)
def test_a_label_mass_below_the_contracts_bound_is_warned_of(values: Any, mass: float, is_low: bool) -> None:
    decision = contract(**values).decide([math.log(mass * 0.9), math.log(mass * 0.1)])
    assert decision.confidence == pytest.approx(0.9)
    assert [warning.partition(":")[0] for warning in decision.warnings] == ["low_label_mass"] * is_low


def test_three_labels_take_the_likeliest() -> None:
    decision = contract(labels=("a", "b", "c")).decide([-3.0, -1.0, -2.0])
    assert decision.label == "b"
    assert sum(decision.scores.values()) == pytest.approx(1)


def test_labels_that_stand_for_numbers_have_an_expected_value() -> None:
    valued = contract(labels=("2", "1", "0"), values={"0": 0.0, "1": 0.5, "2": 1.0})
    assert valued.decide([math.log(0.3), math.log(0.1), math.log(0.1)]).value == pytest.approx(0.7)
    assert contract().decide([0.0, 0.0]).value is None


def test_extreme_log_probs_neither_overflow_nor_divide_by_zero() -> None:
    assert contract().decide([-2000.0, -1.0]).scores == pytest.approx({"yes": 0.0, "no": 1.0})
    extreme = {"temperature": 0.001, "bias": {"yes": -1000, "no": 1000}}
    assert contract(calibration=extreme).decide([-1.0, -90000.0]).scores == pytest.approx({"yes": 1.0, "no": 0.0})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("labels: [yes]", "yes"),  # YAML reads a bare yes as true
        ("labels: ['yes']", "labels"),
        ("labels: ['yes', 'yes']", "labels"),
        ("labels: ['yes', '']", "labels"),
        ("labels: [a, b]\nlables: [a, b]", "lables"),
        ("labels: [a, b]\nthreshold: 1.5", "threshold"),
        ("labels: [a, b, c]\nthreshold: 0.5", "threshold"),
        ("labels: [a, b]\nvalues: {a: 1}", "values"),
        ("labels: [a, b]\nvalues: {a: 1, c: 0}", "values"),
        ("labels: [a, b]\nvalues: {a: 1, b: .nan}", "values"),
        ("labels: [a, b]\ntemplate: 'no place'", "{conversation}"),
        ("labels: [a, b]\ntemplate: '{conversation}{conversation}'", "exactly once"),
        ("labels: [a, b]\ntemplate: '{conversation}{question}'", "question"),
        ("labels: [a, b]\ncalibration: {bias: {c: 1}}", "'c'"),
        ("labels: [a, b]\ncalibration: {temperature: 0}", "temperature"),
        ("labels: [a, b]\ncalibration: {temperature: .nan}", "temperature"),
        ("labels: [a, b]\ngolden: [{text: x, label: c}]", "golden"),
        ("labels: [a, b]\nlabels: [c, d]", "given twice"),
        ("question: only", "labels"),
        ("[1, 2]", "not keys and values"),
        ("labels: [a", "YAML"),
        ("labels: [a, 2024-13-45]", "YAML"),
        ("labels: [a, !!int foo]", "YAML"),
        ("labels: " + "[" * 5000, "YAML"),
        ("labels: !!python/object:os.system [a]", "YAML"),
        ('labels: [a, b]\ntemplate: "{conversation}\\ud800"', "not valid Unicode"),
        ("labels: [a, b]\ncalibration: {temperature: 1e-310}", "temperature"),
        ("labels: [a, b]\ncalibration: {temperature: .inf}", "temperature"),
        ("labels: [a, b]\ncalibration: {bias: {a: 1.0e+308}}", "calibration.bias.a"),
    ],
)
def test_a_wrong_contract_names_the_file_and_the_key(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "classifier.yaml"
    path.write_text(text)
    with pytest.raises(ContractError) as caught:
        read_contract(path)
    assert str(path) in caught.value.message
    assert key in caught.value.message or key == "yes"
    assert caught.value.remedy


def test_messages_become_lines() -> None:
    messages = [Message(role="user", content="hi"), Message(role="Agent", content="yes?")]
    assert conversation_text(messages, ROLES) == "Customer: hi\nAgent: yes?"


@pytest.mark.parametrize("empty", ["", " \n", [], [Message(role="user", content=" ")]])
def test_nothing_to_judge_is_an_error(empty: Any) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        conversation_text(empty, ROLES)


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="system"):
        conversation_text([Message(role="system", content="x")], ROLES)


@pytest.mark.parametrize("line_end", ["\r\n", "\r\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_line_ends_and_whitespace_at_the_end_are_normalized(line_end: str) -> None:
    assert normalized(f"a {line_end}{line_end} b\n{line_end} \u00a0\t") == "a \n\n b"
    messages = [Message(role="user", content=f"a{line_end}b {line_end}"), Message(role="assistant", content="")]
    assert conversation_text(messages, ROLES) == "Customer: a\nb\nAgent:"


def test_an_unknown_role_hears_how_to_name_it() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        conversation_text([Message(role="system", content="x")], {"user": "Customer", "assistant": "Agent"})
    assert caught.value.message == "unknown role 'system'"
    assert caught.value.remedy == (
        "use one of: user, assistant; or say what becomes of its turns, in the adapter's classifier.yaml "
        "(`roles: {user: Customer, assistant: Agent, system: System}` writes them, `system: null` leaves them out) "
        'or in the request (`"roles": {"system": null}`)'
    )


def test_a_role_without_a_name_is_left_out(tmp_path: Path) -> None:
    roles = {"user": "Customer", "system": None, "tool": "System"}
    said = [("system", "be kind"), ("user", "hi"), ("tool", "{}"), ("System", "late")]
    messages = [Message(role=role, content=content) for role, content in said]
    assert conversation_text(messages, roles) == "Customer: hi\nSystem: {}"  # a role's key counts before its name
    with pytest.raises(InvalidRequestError, match="empty"):
        conversation_text(messages[:1], roles)
    (path := tmp_path / "classifier.yaml").write_text("labels: ['a', 'b']\nroles: {user: null}")
    with pytest.raises(ContractError, match="'roles' leaves every message out"):
        read_contract(path)


def test_a_message_that_only_calls_tools_has_no_line() -> None:
    calls = (ToolCall(name="find", arguments="{}"),)
    messages = [
        Message(role="user", content="where?"),
        Message(role="assistant", content="", tool_calls=calls),
        Message(role="assistant", content="here", tool_calls=calls),
    ]
    assert conversation_text(messages, ROLES) == "Customer: where?\nAgent: here"


def test_half_a_surrogate_pair_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="ud800"):
        conversation_text("a\ud800", ROLES)


def test_a_byte_order_mark_and_two_line_ends() -> None:
    assert normalized("\ufeffa\n\r\nb") == "a\n\nb"


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("{conversation}{questoin}", "holds '{questoin}' (write {question})"),
        ("{conversation}{{question}}", "holds '{{question}}' (write {question})"),
        ("{conversation} { question }", "holds '{ question }' (write {question})"),
        ("{conversation}", "'question' is given, but 'template' does not hold {question}"),
    ],
)
def test_a_template_that_would_drop_the_question_is_refused(tmp_path: Path, template: str, wrong: str) -> None:
    path = tmp_path / "classifier.yaml"
    path.write_text(json.dumps({"question": "Done?", "template": template, "labels": ["yes", "no"]}))
    with pytest.raises(ContractError) as caught:
        read_contract(path)
    assert wrong in str(caught.value)


def test_other_braces_are_text(tmp_path: Path) -> None:
    path = tmp_path / "classifier.yaml"
    template = '{"input": {conversation}, "task": {question}} {answer}'
    path.write_text(json.dumps({"question": "Done?", "template": template, "labels": ["yes", "no"]}))
    assert read_contract(path).template == template


@pytest.mark.parametrize(
    "key", ["threshold: yes", "min_label_mass: true", "max_length: on", "calibration: {temperature: true}"]
)
def test_a_boolean_is_no_number(tmp_path: Path, key: str) -> None:
    path = tmp_path / "classifier.yaml"
    path.write_text(f"labels: ['yes', 'no']\n{key}\n")
    with pytest.raises(ContractError, match=r"key '[a-z_.]+': true is not a number"):
        read_contract(path)


@pytest.mark.parametrize(
    ("values", "type", "score"),
    [
        ({}, "predicate", None),
        ({"labels": ("a", "b", "c")}, "choice", None),
        ({"type": "choice"}, "choice", None),
        ({"type": "score"}, "score", 0.25),
        ({"type": "score", "labels": ("calm", "annoyed", "furious")}, "score", 1.0),
    ],
)
def test_labels_say_the_type_and_only_a_score_has_an_expected_level(values: Any, type: str, score: Any) -> None:
    made = contract(**values)
    assert made.question_type == type
    masses = [0.3, 0.1] if len(made.labels) == 2 else [0.1, 0.2, 0.1]
    assert made.decide(list(map(math.log, masses))).score == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    ("values", "mentions"),
    [
        ("type: predicate\nlabels: [a, b, c]", "'type' is 'predicate', which has two labels, and there are 3"),
        ("type: boolean\nlabels: [a, b]", "type"),
        ("labels: [a, b]\ndescriptions: {c: x}", "'descriptions' names 'c', which is not among the labels"),
    ],
)
def test_a_wrong_type_or_description_is_named(tmp_path: Path, values: str, mentions: str) -> None:
    (path := tmp_path / "classifier.yaml").write_text(values)
    with pytest.raises(ContractError) as caught:
        read_contract(path)
    assert mentions in str(caught.value)


def test_a_contract_without_type_and_descriptions_has_the_id_that_it_had_before() -> None:
    assert contract().model_dump_json(exclude_defaults=True) == '{"labels":["yes","no"]}'
