"""IBM's intrinsics: what an `io.yaml` says becomes a contract, or is refused by name."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serving
import tiny
from loraplex.adapters.intrinsics import import_intrinsic
from loraplex.bundle import CONTRACT, open_adapter, open_bundle
from loraplex.classifier import Contract, read_contract
from loraplex.errors import BundleError, ConfigurationError, ContractError
from loraplex.io_yaml import IO_YAML, read_intrinsic

YES_NO = {"type": "string", "enum": ["no", "yes"]}


def likelihood(values: Mapping[Any, Any], *path: Any) -> dict[str, Any]:
    return {"type": "likelihood", "input_path": list(path), "categories_to_values": dict(values)}


def io_yaml(schema: Any = YES_NO, *transformations: Any, **others: Any) -> dict[str, Any]:
    """The keys of an `io.yaml`, as granite-common's own have them."""
    return {"model": None, "response_format": json.dumps(schema), "transformations": list(transformations)} | others


def written(folder: Path, keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / IO_YAML
    path.write_text(keys if isinstance(keys, str) else yaml.safe_dump(keys, sort_keys=False))
    return path


NEST = {"type": "nest", "input_path": [], "field_name": "answerability_likelihood"}
SCORE = {"type": "object", "properties": {"score": {"type": "string", "enum": ["no", "yes"]}}, "required": ["score"]}
REASONED = {
    "type": "object",
    "properties": {"route": {"type": "string", "enum": ["a", "b"]}, "reasoning": {"type": "string"}},
}
DEFINED = {
    "$defs": {"Colour": {"type": "string", "enum": ["red", "blue"]}},
    "properties": {"colour": {"$ref": "#/$defs/Colour"}},
}
SERVED: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "text": (
        io_yaml(YES_NO, likelihood({"no": 0.0, "yes": 1.0}), NEST, parameters={"max_completion_tokens": 6}),
        dict(labels=("yes", "no"), answer_start='"'),
    ),
    "object": (io_yaml(SCORE, likelihood({"yes": 1, "no": 0}, "score")), dict(answer_start='{"score": "')),
    "boolean": (
        io_yaml({"type": "boolean"}, likelihood({False: 0.0, True: 1.0})),
        dict(labels=("true", "false"), answer_start=""),
    ),
    "enum of numbers": (
        io_yaml({"type": "integer", "enum": [0, 1, 2]}, likelihood({0: 0.05, 1: 0.5, 2: 0.95})),
        dict(labels=("2", "1", "0"), answer_start="", values={"0": 0.05, "1": 0.5, "2": 0.95}),
    ),
    "range": (
        io_yaml({"type": "integer", "minimum": 0, "maximum": 2}, likelihood({0: 1.0, 1: 0.5, 2: 0.0})),
        dict(labels=("0", "1", "2")),
    ),
    "digits as text": (
        io_yaml({"type": "string", "enum": ["0", "1"]}, likelihood({"0": 0.1, "1": 0.9})),
        dict(labels=("1", "0"), answer_start='"'),
    ),
    "no likelihood": (io_yaml(SCORE, transformations=None), dict(labels=("no", "yes"), answer_start='{"score": "')),
    "more behind the label": (io_yaml(REASONED), dict(labels=("a", "b"), answer_start='{"route": "')),
    "a definition": (io_yaml(DEFINED), dict(labels=("red", "blue"), answer_start='{"colour": "')),
    "objects in objects": (
        io_yaml({"type": "object", "properties": {"check": SCORE}}, likelihood({"yes": 1, "no": 0}, "check", "score")),
        dict(answer_start='{"check": {"score": "'),
    ),
    "schema as YAML": (io_yaml() | {"response_format": YES_NO}, dict(labels=("no", "yes"))),
    "braces": (io_yaml(instruction="Answer {{yes}} or no.\n"), dict(question="Answer {yes} or no.\n")),
    "documents as a message": (io_yaml(docs_as_message="string", sentence_boundaries=None), {}),
    "mellea's name": (io_yaml(name="answerability", logprobs_workaround=None), {}),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_classifier_becomes_a_contract(tmp_path: Path, case: str) -> None:
    keys, expected = SERVED[case]
    contract = read_intrinsic(written(tmp_path, keys)).contract
    assert {name: getattr(contract, name) for name in expected} == expected
    assert contract.format == "chat" and contract.template is None
    assert set(contract.labels) == set(expected.get("labels", ("yes", "no")))
    assert contract.question is None or "question" in expected


REFUSED: Mapping[str, tuple[Any, str]] = {
    "rewriting": (
        io_yaml({"type": "object", "properties": {"rewritten_question": {"type": "string"}}}),
        r"'response_format': the answer is a free text \('rewritten_question'\)",
    ),
    "citations": (
        io_yaml(
            {"type": "array", "items": {"type": "object", "properties": {"r": {"type": "integer"}}}},
            {"type": "explode", "input_path": [], "target_field": "c"},
            sentence_boundaries={"last_message": "r", "documents": "c"},
        ),
        "'sentence_boundaries': numbers the input's sentences",
    ),
    "spans": (io_yaml(YES_NO, {"type": "decode_sentences", "input_path": []}), "'decode_sentences' makes spans"),
    "a list": (io_yaml({"type": "array", "items": YES_NO}), "the answer is a list"),
    "reasons first": (
        io_yaml(
            {"type": "object", "properties": {"analysis": {"type": "string"}, "judgment": {"type": "boolean"}}},
            likelihood({True: 1.0, False: 0.0}, "judgment"),
        ),
        "the answer has 'analysis' before 'judgment'",
    ),
    "any number": (io_yaml({"type": "integer"}), "the answer is any whole number"),
    "a fraction": (io_yaml({"type": "number"}), "the answer is any number"),
    "a wide range": (io_yaml({"type": "integer", "minimum": 0, "maximum": 1000}), "1001 numbers"),
    "one choice": (io_yaml({"const": "yes"}), "'labels' needs at least two"),
    "mixed": (io_yaml({"enum": ["yes", 1]}), r'\["yes", 1\] are not of one kind'),
    "null": (io_yaml({"enum": ["yes", None]}), "are not of one kind"),
    "escaped": (io_yaml({"enum": ["yes", 'the "no"']}), "has to be escaped in JSON"),
    "nothing": (io_yaml({}), "the answer is any JSON"),
    "no format": (io_yaml() | {"response_format": None}, "'response_format' is empty"),
    "no JSON": (io_yaml() | {"response_format": "{"}, "'response_format' is no JSON"),
    "no schema": (io_yaml() | {"response_format": "[]"}, "'response_format' is no JSON schema"),
    "a definition in itself": (
        io_yaml({"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}}}}),
        r"the answer is any JSON \('a'\)",
    ),
    "a lost definition": (io_yaml({"$ref": "#/$defs/X"}), "the answer is any JSON"),
    "other path": (io_yaml(SCORE, likelihood({"yes": 1, "no": 0}, "label")), "'label', which the answer lacks"),
    "path into text": (io_yaml(YES_NO, likelihood({"yes": 1, "no": 0}, "score")), "'score', which the answer lacks"),
    "path too short": (io_yaml(SCORE, likelihood({"yes": 1, "no": 0})), r"'input_path' \[\] is an object"),
    "wildcard": (io_yaml(YES_NO, likelihood({"yes": 1, "no": 0}, None)), r"'input_path' \[null\]"),
    "other categories": (io_yaml(YES_NO, likelihood({"yes": 1, "maybe": 0})), "'yes', 'maybe', and .*'no', 'yes'"),
    "unquoted": ("model: ~\nresponse_format: {enum: ['yes', 'no']}\ntransformations:\n- {type: likelihood, "
                 "input_path: [], categories_to_values: {yes: 1, no: 0}}\n", "quotes around yes and no"),
    "no values": (io_yaml(YES_NO, likelihood({"yes": "high", "no": 0})), "the value of 'yes' is 'high'"),
    "no categories": (io_yaml(YES_NO, {"type": "likelihood", "input_path": []}), "'categories_to_values' is missing"),
    "two likelihoods": (io_yaml(YES_NO, *[likelihood({"yes": 1, "no": 0})] * 2), "holds 2 of type 'likelihood'"),
    "unknown rule": (io_yaml(YES_NO, {"type": "average", "input_path": []}), "'average' is not known"),
    "no rule": (io_yaml(YES_NO, "likelihood"), "'transformations' is no list of rules"),
    "an argument": (io_yaml(instruction="Check: {requirement}"), "'requirement', which has no value"),
    "the last message": (io_yaml(instruction="Is {last_message} fish?"), "repeats the conversation's last message"),
    "a place": (io_yaml(instruction="Is {} fish?"), "'{}' is no name"),
    "an attribute": (io_yaml(instruction="Is {x.y} fish?"), "'{x.y}' is no name"),
    "a format": (io_yaml(instruction="Is {x:>99} fish?"), "'{x}' is no name"),
    "half a brace": (io_yaml(instruction="Is { fish?"), "'instruction' has a brace"),
    "no text": (io_yaml(instruction=["a"]), "'instruction' is no text"),
    "harmony": (io_yaml(logprobs_workaround=True), "'logprobs_workaround'"),
    "roles": (io_yaml(docs_as_message="roles"), "'docs_as_message': 'roles'"),
    "template variables": (
        io_yaml(parameters={"extra_body": {"chat_template_kwargs": {"thinking": True}}}),
        "'parameters.extra_body.chat_template_kwargs'",
    ),
    "unknown parameter": (io_yaml(parameters={"reasoning_effort": "high"}), "'parameters.reasoning_effort'"),
    "no extra body": (io_yaml(parameters={"extra_body": "x"}), "'parameters.extra_body"),
    "no parameters": (io_yaml(parameters=[1]), "'parameters' is no mapping"),
    "unknown key": (io_yaml(system_prompt="You are"), "'system_prompt' is not known"),
    "missing key": ({"model": None, "response_format": "{}"}, "'transformations' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_classifier_is_refused_by_name(tmp_path: Path, case: str) -> None:
    keys, message = REFUSED[case]
    with pytest.raises(ContractError, match=message) as raised:
        read_intrinsic(written(tmp_path, keys))
    assert str(tmp_path / IO_YAML) in raised.value.message
    assert raised.value.remedy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["yes", "no", "score", "string", "a{b}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "enum", "properties", "score", "$ref", "yes", "no"]), inner, max_size=3
        )
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    key=st.sampled_from([*io_yaml(), "instruction", "parameters", "docs_as_message", "sentence_boundaries"]),
    rule=st.sampled_from([*likelihood({})]),
    value=JSON,
)
def test_any_value_is_read_or_refused(tmp_path: Path, key: str, rule: str, value: Any) -> None:
    keys = io_yaml(SCORE, likelihood({"yes": 1, "no": 0}, "score")) | {key: value}
    with contextlib.suppress(ContractError):
        read_intrinsic(written(tmp_path, keys))
    with contextlib.suppress(ContractError):
        read_intrinsic(written(tmp_path, io_yaml(SCORE, likelihood({"yes": 1, "no": 0}, "score") | {rule: value})))


CHECKED = io_yaml({"type": "boolean"}, likelihood({True: 1.0, False: 0.0}), instruction="Check {requirement}: {{ok}}\n")


def test_arguments_fill_the_instruction(tmp_path: Path) -> None:
    path = written(tmp_path, CHECKED)
    intrinsic = read_intrinsic(path, {"requirement": "it is {polite}"})
    assert intrinsic.contract.question == "Check it is {polite}: {ok}\n"
    with pytest.raises(ContractError, match=r"loraplex adapters import .*--argument requirement=…"):
        read_intrinsic(path)
    with pytest.raises(ContractError, match=r"'instruction' lacks \{colour\}"):
        read_intrinsic(path, {"requirement": "x", "colour": "red"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("io_yaml")
    tiny.save_base(folder, tiny.FAMILIES["llama"])
    tiny.save_adapter(folder, folder / "answerable")
    written(folder / "answerable", SERVED["text"][0])
    return folder


def test_an_adapter_with_an_io_yaml_has_its_contract(base: Path) -> None:
    [source] = open_bundle(base).adapters
    assert source.contract is not None and source.contract.labels == ("yes", "no")
    assert source.contract_path == base / "answerable" / IO_YAML


def test_a_classifier_yaml_wins(base: Path, tmp_path: Path) -> None:
    for path in (base / "answerable").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / CONTRACT).write_text("labels: [a, b]")
    source = open_adapter("x", tmp_path)
    assert source.contract == Contract(labels=("a", "b")) and source.contract_path == tmp_path / CONTRACT


def test_an_intrinsic_that_is_no_classifier_is_named_and_the_others_are_served(base: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    tiny.save_base(bundle, tiny.FAMILIES["llama"])
    for name, case in (("rewriting", REFUSED["rewriting"][0]), ("good", SERVED["text"][0])):
        tiny.save_adapter(bundle, bundle / name)
        written(bundle / name, case)
    sources = {source.name: source for source in open_bundle(bundle, require_all=False).adapters}
    assert sources["good"].error is None
    assert "rewritten_question" in str(sources["rewriting"].error)
    with pytest.raises(ContractError, match="rewritten_question"):
        open_bundle(bundle)


@pytest.mark.parametrize("case", SERVED)
def test_what_is_written_reads_as_the_same_contract(base: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "from"
    tiny_files(base, folder)
    path = written(folder, SERVED[case][0])
    made = import_intrinsic(folder, "x")
    assert made == folder / CONTRACT
    assert read_contract(made) == read_intrinsic(path).contract
    for key in ("format", "labels"):
        [line] = [line for line in made.read_text().splitlines() if line.startswith(f"{key}:")]
        assert "  # " in line, "no comment says where it comes from"


@pytest.mark.parametrize("text", ["\x85\u2028\xa0", "\U0001f600 ü", "# not: a comment", "a\tb\\\"'", "\ufeff\x7f"])
def test_any_text_survives_the_writing(base: Path, tmp_path: Path, text: str) -> None:
    tiny_files(base, tmp_path / "from")
    written(tmp_path / "from", CHECKED)
    made = import_intrinsic(tmp_path / "from", "x", {"requirement": text})
    assert read_contract(made).question == f"Check {text}: {{ok}}\n"


def test_one_adapter_becomes_several_classifiers(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "lora"
    tiny_files(base, folder)
    written(folder, CHECKED)
    for name, requirement in (("isPolite", "it is polite"), ("isShort", "it is short")):
        made = import_intrinsic(folder, name, {"requirement": requirement}, out=tmp_path / "bundle")
        assert made == tmp_path / "bundle" / name / CONTRACT
        assert open_adapter(name, made.parent).contract == read_contract(made)
    assert not (folder / CONTRACT).exists(), "the source was changed"
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["isPolite", "isShort"], "left over"


def test_an_import_writes_over_nothing(base: Path, tmp_path: Path) -> None:
    tiny_files(base, tmp_path / "from")
    written(tmp_path / "from", SERVED["text"][0])
    import_intrinsic(tmp_path / "from", "x", out=tmp_path / "out")
    import_intrinsic(tmp_path / "from", "x")
    for out in (None, tmp_path / "out"):
        with pytest.raises(BundleError, match="exists already"):
            import_intrinsic(tmp_path / "from", "x", out=out)
    with pytest.raises(BundleError, match="/proc/nowhere/x: cannot be written"):
        import_intrinsic(tmp_path / "from", "x", out=Path("/proc/nowhere"))


def test_what_cannot_be_imported_is_named(base: Path, tmp_path: Path) -> None:
    tiny_files(base, tmp_path / "plain")
    with pytest.raises(BundleError, match=r"no io\.yaml in it"):
        import_intrinsic(tmp_path / "plain", "x")
    written(tmp_path / "plain", SERVED["text"][0])
    with pytest.raises(BundleError, match="'a b' cannot name a classifier"):
        import_intrinsic(tmp_path / "plain", "a b")
    written(tmp_path / "empty", SERVED["text"][0])
    with pytest.raises(ConfigurationError, match=r"no adapter_config\.json in it"):
        import_intrinsic(tmp_path / "empty", "x", out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_import_command(base: Path, tmp_path: Path) -> None:
    tiny_files(base, tmp_path / "lora")
    written(tmp_path / "lora", CHECKED)
    command = ("adapters", "import", tmp_path / "lora", "--name", "isPolite", "--out", tmp_path / "bundle")
    run = serving.loraplex(*command)
    assert run.returncode == 1 and "--argument requirement=…" in run.stderr
    run = serving.loraplex(*command, "--argument", "requirement=it is polite")
    assert run.returncode == 0, run.stderr
    made = tmp_path / "bundle" / "isPolite" / CONTRACT
    assert run.stdout == (
        f"{made}: written; the labels are true, false\nserve it: loraplex serve BASE --adapter isPolite={made.parent}\n"
    )
    assert read_contract(made).question == "Check it is polite: {ok}\n"
    for argument, message in (("requirement", "'requirement' is not NAME=TEXT"), ("a=b", "'a' is given twice")):
        run = serving.loraplex(*command, "--argument", argument, "--argument", argument)
        assert run.returncode == 2 and message in run.stderr


def tiny_files(base: Path, folder: Path) -> None:
    """Copy the adapter's files, without an io.yaml."""
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((base / "answerable" / name).read_bytes())
