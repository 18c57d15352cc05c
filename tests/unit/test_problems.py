"""What users read where pydantic refuses a value: our own sentences, with the field, the value and the remedy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core.core_schema import ErrorType

from loraplex import classifier, config, messages
from loraplex.adapters import peft_config
from loraplex.classifier import read_contract
from loraplex.config import EngineConfig, ServerConfig, read_bundle_settings, resolve
from loraplex.errors import BundleError, ConfigurationError, ContractError
from loraplex.problems import NOUNS, SENTENCES, find_problem
from loraplex.server import classification, huggingface, openai_schemas, schemas
from loraplex.server.openai_schemas import ChatBody, CompletionBody, StreamOptions
from loraplex.server.sagemaker import SageMakerBody
from loraplex.server.schemas import ClassifyBody, InvocationBody

MODELS = {
    f"{module.__name__}.{name}": one
    for module in (
        *(config, classifier, messages, peft_config),
        *(schemas, openai_schemas, classification, huggingface),
    )
    for name, one in vars(module).items()
    if isinstance(one, type) and issubclass(one, BaseModel) and one.__module__ == module.__name__
    if not name.endswith(
        ("Result", "List", "Card", "ErrorBody", "Classification", "Data", "Label", "GeneratedText")
    )  # answers
}
# A part of pydantic's schema, or one of its limits -> the types of errors that it produces.
LENGTHS = {"min_length": {"too_short"}, "max_length": {"too_long"}}
NUMBERS = {
    "gt": {"greater_than"},
    "ge": {"greater_than_equal"},
    "lt": {"less_than"},
    "le": {"less_than_equal"},
    "allow_inf_nan": {"finite_number"},
}
PRODUCED: dict[str, tuple[set[str], dict[str, set[str]]]] = {
    "str": (
        {"string_type", "string_unicode"},
        {"min_length": {"string_too_short"}, "max_length": {"string_too_long"}},
    ),
    "int": ({"int_type", "int_parsing", "int_parsing_size", "int_from_float", "finite_number"}, NUMBERS),
    "float": ({"float_type", "float_parsing"}, NUMBERS),
    "bool": ({"bool_type", "bool_parsing"}, {}),
    "list": ({"list_type"}, {**LENGTHS, "fail_fast": set()}),
    "tuple": ({"tuple_type"}, {**LENGTHS, "variadic_item_index": set()}),
    "dict": ({"dict_type"}, LENGTHS),
    "literal": ({"literal_error"}, {"expected": set()}),
    "model": ({"model_type", "model_attributes_type"}, {}),
    "model-fields": ({"missing", "extra_forbidden", "invalid_key", "string_unicode"}, {}),
    # Our validators raise "wrong", and "either" where a union takes no value of the type.
    "function-before": ({"either", "wrong"}, {}),
    "function-after": ({"wrong", "missing", "extra_forbidden"}, {}),
    "tagged-union": ({"either"}, {}),
    # The other members of a union say what is wrong.
    **dict.fromkeys(("none", "nullable", "union", "any", "default", "definitions", "definition-ref"), (set(), {})),
}
INNER = ("schema", "fields", "items_schema", "keys_schema", "values_schema", "choices", "definitions")
ABOUT = ("type", "ref", "metadata", "serialization", "strict", "config", "cls", "custom_init", "root_model")


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that checks a value."""
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from parts(one)
    elif isinstance(schema, dict):
        if isinstance(schema.get("type"), str) and schema["type"] != "model-field":
            yield schema
        for key, inner in schema.items():
            is_named = key in ("fields", "choices") and isinstance(inner, dict)
            if key in INNER or is_named:
                yield from parts(list(inner.values()) if is_named else inner)


@pytest.mark.parametrize("name", MODELS)
def test_every_error_that_a_model_can_produce_has_a_sentence(name: str) -> None:
    told = {*NOUNS, *SENTENCES, "extra_forbidden", "either"}
    for part in parts(MODELS[name].__pydantic_core_schema__):
        assert part["type"] in PRODUCED, f"what does {part['type']} produce? Add it to PRODUCED"
        always, by_limit = PRODUCED[part["type"]]
        produced = always.union(*(types for limit, types in by_limit.items() if limit in part))
        assert produced <= told, produced - told
        if part["type"] in ("str", "int", "float", "list", "dict", "tuple"):
            assert set(part) - set(ABOUT) - set(INNER) <= set(by_limit), "a limit that PRODUCED does not know"


def test_the_sentences_are_for_errors_that_pydantic_has() -> None:
    assert {*NOUNS, *SENTENCES} - set(get_args(ErrorType)) == {"wrong"}


VALUES: list[Any] = [
    *(None, True, "", "x", "\ud800", "9" * 5000, "1.5", 0, -1, 3, 10**400, 1.5, float("inf"), float("nan")),
    *([], {}, [[]], [{}], [None], [True], ["x"], [""], ["("], [1], ["x"] * 20_000, {"x": 1}, {"x": None}, {"x": "x"}),
    *({"(": 1}, {"1": 1e9}, [{"role": 1, "content": []}], [{"text": 1}], {"targets": {}}, {"targets": {"a": -1}}),
]


@pytest.mark.parametrize("name", MODELS)
def test_no_sentence_is_pydantics(name: str) -> None:
    model, found = MODELS[name], 0
    for field in (*model.model_fields, "unheard_of"):
        for value in VALUES:
            values = {field: value}
            try:
                model.model_validate(values)
            except ValidationError as exc:
                found += 1
                problem = find_problem(exc.errors(), values, model)
                said = f"{problem.sentence} {problem.remedy}"
                theirs = [one["msg"] for one in exc.errors() if one["type"] not in ("wrong", "either")]
                assert "Input should" not in said and not any(one in said for one in theirs), said
                assert "is not a value that this can have" not in said, exc
                assert problem.what and problem.remedy and len(said) < 600 and "{" not in problem.what.split("{conv")[0]
    assert found


PEFT = {"peft_type": "LORA", "r": 1, "lora_alpha": 1.0, "target_modules": ["x"]}


def problem_of(model: Any, values: Any) -> str:
    try:
        TypeAdapter(model).validate_python(values)
    except ValidationError as exc:
        problem = find_problem(exc.errors(), values, model, noun="field")
        return f"{problem.place}: {problem.sentence} ({problem.remedy})"
    raise AssertionError("nothing is wrong")


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        (ClassifyBody, {"input": "x", "deadline_ms": -1}, "deadline_ms: -1 is not above 0 (give a number above 0)"),
        (ClassifyBody, {"input": "x", "deadline_ms": "soon"}, "deadline_ms: 'soon' is not a number (give a number)"),
        (ClassifyBody, {"input": 3}, "input: 3 is not text or a list of messages (give text or a list of messages)"),
        (ClassifyBody, {"input": [{"role": "user"}]}, "input.0.content: is missing (add it)"),
        (
            ClassifyBody,
            {"input": [{"role": "user", "content": 3}]},
            "input.0.content: 3 is not text or a list of text parts",
        ),
        (
            ClassifyBody,
            {"text": "x"},
            ": unknown field 'text'; did you mean input? (use: input, inputs, classifiers, conversation_id, "
            "deadline_ms, roles, questions, cascade)",
        ),
        (ClassifyBody, {"input": "x", "clasifiers": "a"}, "unknown field 'clasifiers'; did you mean classifiers?"),
        (ClassifyBody, {"input": "x", "timeout_ms": 5}, "unknown field 'timeout_ms'; did you mean deadline_ms?"),
        (ClassifyBody, {"input": "x", "zzz": 5}, ": unknown field 'zzz' (use: input, inputs"),
        (ClassifyBody, {"inputs": [{"text": "x"}]}, "unknown field 'inputs.0.text'; did you mean input?"),
        (ClassifyBody, {"input": [{"role": "user", "text": "x"}]}, "'input.0.text'; did you mean content? (use: role,"),
        (ClassifyBody, {"input": "x", "\ud800": 1}, ": '\\ud800' is not valid Unicode (send valid UTF-8"),
        (ClassifyBody, {}, ": give either `input` or `inputs` (give `input` one conversation, or `inputs` several)"),
        (InvocationBody, {"input_txt": "x"}, "unknown field 'input_txt'; did you mean input_text?"),
        (SageMakerBody, {"text": "x"}, "unknown field 'text'; did you mean input"),
        (CompletionBody, {"model": "m", "prompt": "x", "n": 0}, "n: 0 is below 1 (give 1 or more)"),
        (CompletionBody, {"model": "m", "prompt": "x", "top_p": 1.1}, "top_p: 1.1 is above 1 (give 1 or less)"),
        (CompletionBody, {"model": "m", "prompt": [1, "a"]}, "prompt.1: 'a' is not a whole number"),
        (CompletionBody, {"model": "m", "prompt": "x" * 9, "stop": ["a"] * 17}, "has too many items (give 16 at most)"),
        (CompletionBody, {"model": "m", "prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a: 'a' is not a whole"),
        (
            ChatBody,
            {"model": "m", "messages": "x" * 999},
            f"messages: '{'x' * 200}'… (999 characters) is not a list (give a list)",
        ),
        (
            ChatBody,
            {"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": [1]}},
            "chat_template_kwargs.a: [1] is not true or false, a whole number or text",
        ),
        (
            StreamOptions,
            {"include_obfuscation": True},
            "include_obfuscation: true is not false (give false)",
        ),
        (
            peft_config.PeftConfig,
            PEFT | {"layers_to_transform": [0, "a"]},
            "layers_to_transform.1: 'a' is not a whole number",
        ),
        (peft_config.PeftConfig, PEFT | {"target_modules": 5}, "target_modules: 5 is not text or a list (give"),
    ],
)
def test_a_request_is_told_field_value_and_remedy(model: Any, values: Any, said: str) -> None:
    assert said in problem_of(model, values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("labels: [yes, no]", "key 'labels': the first is the YAML boolean true, not text (quote it: ['yes', 'no'])"),
        ("labels: [on, Off]", "key 'labels': the first is the YAML boolean true, not text (quote it: ['on', 'Off'])"),
        ("labels: [a, No]", "key 'labels': the second is the YAML boolean false, not text (quote it: ['a', 'No'])"),
        ("labels: [0, 1]", "key 'labels': the first is the YAML number 0, not text (quote it: ['0', '1'])"),
        ("labels: [1.50, b]", "key 'labels': the first is the YAML number 1.5, not text (quote it: ['1.50', 'b'])"),
        ("labels: [a, 2024-01-01]", "the YAML date \"2024-01-01\", not text (quote it: ['a', '2024-01-01'])"),
        ("labels: [a, b, c, d, e, f, g, h, i, j, 0]", "number 11 is the YAML number 0, not text (quote it: ['a',"),
        ("labels: yes", "key 'labels': true is not a list (give a list)"),
        ("labels: [a, b]\nquestion: no", "key 'question': is the YAML boolean false, not text (quote it: 'no')"),
        ("labels: [a, b]\ngolden: [{text: x, label: yes}]", "key 'golden.0.label': is the YAML boolean true, not"),
        ("labels: [a, [b]]", "key 'labels.1': [\"b\"] is not text (give text)"),
        ("labels: [a, b]\nthreshold: 1.5", "key 'threshold': 1.5 is above 1 (give 1 or less)"),
        ("labels: [a, b]\ncalibration: 5", "key 'calibration': 5 is not keys and values (give keys and values)"),
        ("labels: [a, b]\nlables: [a, b]", "unknown key 'lables'; did you mean labels?"),
        ("labels: [a, b]\ntemperature: 2", "'temperature'; did you mean calibration: {temperature: …}?"),
        ("labels: [a, b]\nbias: {a: 1}", "unknown key 'bias'; did you mean calibration: {bias: …}?"),
        ("labels: [a, b]\ncalibration: {temp: 1}", "unknown key 'calibration.temp'"),
        ("question: x", "key 'labels': is missing (add it)"),
        ("labels: [a]", "'labels' needs at least two, got [\"a\"] (name them: labels: ['yes', 'no'])"),
    ],
)
def test_a_contract_is_told_key_value_and_remedy(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "classifier.yaml"
    path.write_text(text)
    with pytest.raises(ContractError) as caught:
        read_contract(path)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {kv_cache: 2GB}", ", engine, key 'kv_cache': '2GB' is no size (write 2GiB, 512MiB, 20% or 0)"),
        ("engine: {adapter_memory: 500%}", ", key 'adapter_memory': '500%' is more than all of the free memory"),
        ("engine: {preload: no}", ", engine, key 'preload': is the YAML boolean false, not text (quote it: 'no')"),
        ("engine: {kv_chache: 0}", ", engine: unknown key 'kv_chache'; did you mean kv_cache?"),
        ("engine: 5", ", key 'engine': 5 is not keys and values"),
        ("server: {port: 99999}", ", server, key 'port': 99999 is above 65535 (give 65535 or less)"),
        ("server: {log_format: xml}", "key 'log_format': 'xml' is not 'text' or 'json' (give 'text' or 'json')"),
        ("routes: {a: {targets: {b: -1}}}", "key 'routes.a.targets.b': -1 is below 0"),
        ("routes: {a: {targets: {b: 0}}}", "key 'routes.a.targets': {\"b\": 0} has weights whose sum is 0 or infinite"),
        ("routes: {a: {target: {b: 1}}}", "unknown key 'routes.a.target'; did you mean targets?"),
        ("base: 3", "key 'base': is the YAML number 3, not text (quote it: '3')"),
    ],
)
def test_a_bundles_settings_are_told_file_key_value_and_remedy(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "loraplex.yaml"
    path.write_text(text)
    with pytest.raises(BundleError) as caught:
        read_bundle_settings(path)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"kv_cache": "--kv-cache "}, "--kv-cache 2GB: is no size (write 2GiB, 512MiB, 20% or 0)"),
        ({"kv_cache": "LORAPLEX_KV_CACHE="}, "LORAPLEX_KV_CACHE=2GB: is no size (write 2GiB, 512MiB, 20% or 0)"),
        (None, "kv_cache=2GB: is no size (write 2GiB, 512MiB, 20% or 0)"),
    ],
)
def test_an_option_is_named_as_it_was_given(origin: dict[str, str] | None, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(EngineConfig, {}, {"kv_cache": "2GB"}, origin)
    assert str(caught.value) == said


@pytest.mark.parametrize("size", ["200%", "100.1%", "-1GiB", "1e3%", "9" * 400 + "GiB", "9" * 400 + "%", "", "1 GiB"])
def test_a_size_that_no_machine_has_is_refused(size: str) -> None:
    for key in ("kv_cache", "adapter_memory", "host_memory"):
        with pytest.raises(ConfigurationError, match=key):
            resolve(EngineConfig, {}, {key: size})
    with pytest.raises(ConfigurationError, match="kv_cache"):
        resolve(EngineConfig, {}, {"kv_cache": False})


def test_either_case_of_a_choice_is_taken() -> None:
    engine = {"backend": "Native", "dtype": "BFLOAT16", "device": "CUDA:1", "peft_batching": "MIXED", "kv_cache": 0}
    found = resolve(EngineConfig, {}, engine)
    assert (found.backend, found.dtype, found.device, found.kv_cache) == ("native", "bfloat16", "cuda:1", "0")
    served = resolve(ServerConfig, {"public": ["Metrics"]}, {"log_format": "JSON"})
    assert (served.log_format, served.public) == ("json", ("metrics",))


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        (ClassifyBody, {"input": "x", "deadline_ms": True}, "deadline_ms: true"),
        (CompletionBody, {"model": "x", "prompt": "x", "max_tokens": True}, "max_tokens: true"),
        (CompletionBody, {"model": "x", "prompt": [1, True]}, "prompt.1: true"),
        (CompletionBody, {"model": "x", "prompt": [[1], [2, False]]}, "prompt.1.1: false"),
        (CompletionBody, {"model": "x", "prompt": "x", "allowed_token_ids": [3, True]}, "allowed_token_ids.1: true"),
        (ChatBody, {"model": "x", "messages": [], "logit_bias": {"7": True}}, "logit_bias.7: true"),
        (ChatBody, {"model": "x", "messages": [], "temperature": False}, "temperature: false"),
    ],
)
def test_a_boolean_in_a_body_is_no_number(model: type[BaseModel], values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    problem = find_problem(caught.value.errors(), values, model, noun="field")
    assert f"{problem.place}: {problem.sentence}" == f"{said} is not a number"
    assert problem.remedy == "give a number"
