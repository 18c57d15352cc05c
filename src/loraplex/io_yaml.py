"""Reads an `io.yaml`, by which IBM's granite-common and mellea ask an adapter, as a contract. Knows no tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NoReturn

from loraplex.classifier import Contract
from loraplex.config import read_yaml, validate
from loraplex.errors import ContractError, listed, quoted

IO_YAML = "io.yaml"
MAX_LABELS = 100  # of a range of whole numbers
MAX_DEPTH = 32  # of objects in the answer; a definition may hold itself
MAX_VALUE = 1e9  # of a label's number
# granite-common's keys; `name` is mellea's. The first three must be there.
REQUIRED = ("model", "response_format", "transformations")
OPTIONAL = ("docs_as_message", "instruction", "logprobs_workaround", "name", "parameters", "sentence_boundaries")
# Parameters of generation, which do not matter where a label's probability is read.
PARAMETERS = frozenset(
    "frequency_penalty logprobs max_completion_tokens max_tokens min_p model n presence_penalty seed stop temperature "
    "top_k top_logprobs top_p extra_body".split()
)
SPANS = frozenset(("decode_sentences", "drop_duplicates", "explode", "merge_spans", "project"))
KINDS = {
    "string": "a free text",
    "integer": "any whole number",
    "number": "any number",
    "array": "a list",
    "object": "an object",
}
OWN = "if it is a classifier all the same, write a classifier.yaml beside it; to complete texts only, remove io.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intrinsic:
    """An adapter that an `io.yaml` describes. arguments: what was put into the instruction."""

    contract: Contract
    arguments: Mapping[str, str]

    def to_yaml(self, name: str) -> str:
        """Return the contract as the text of a `classifier.yaml`, with comments on where each line comes from."""
        contract = self.contract
        filled = f"; {{{'}, {'.join(self.arguments)}}} filled in" if self.arguments else ""
        lines = [
            f"# How {name} is asked and read. Written by `loraplex adapters import` from {IO_YAML}.",
            "format: chat  # as granite-common asks: each message is a message of the base's chat template",
        ]
        if contract.question is not None:
            lines += [f"# instruction, a last message of the user{filled}", f"question: {_scalar(contract.question)}"]
        if contract.answer_start:
            lines += [
                "# response_format: the JSON in front of the label",
                f"answer_start: {_scalar(contract.answer_start)}",
            ]
        lines.append(f"labels: [{', '.join(map(_scalar, contract.labels))}]  # the choices of response_format")
        if contract.values is not None:
            values = ", ".join(f"{_scalar(label)}: {value!r}" for label, value in contract.values.items())
            lines.append(f"values: {{{values}}}  # categories_to_values")
        return "\n".join(lines) + "\n"


def read_intrinsic(path: Path, arguments: Mapping[str, str] | None = None) -> Intrinsic:
    """Read the `io.yaml` of an adapter that chooses between labels. Raises ContractError, which names the key and what
    it means, where the adapter does something else, or asks in a way that a contract cannot.

    arguments:  values of the placeholders in the instruction."""
    given = read_yaml(path, ContractError, text_keys=False)  # true and false name labels
    reader = _Reader(path, arguments or {})
    reader.check_keys(given)
    path_to_label, categories = reader.likelihood(given["transformations"])
    answer_start, labels = reader.choices(given["response_format"], path_to_label)
    values = None if categories is None else reader.values(categories, labels)
    contract = {
        "format": "chat",
        "question": reader.question(given.get("instruction")),
        "answer_start": answer_start,
        "labels": labels if values is None else sorted(labels, key=lambda label: -values[label]),  # the positive first
        "values": values,
    }
    return Intrinsic(contract=validate(Contract, contract, path, ContractError), arguments=arguments or {})


class _Reader:
    """Reads the keys of one file. Each method raises ContractError."""

    def __init__(self, path: Path, arguments: Mapping[str, str]) -> None:
        self._path, self._arguments = path, arguments

    def _refuse(self, message: str, remedy: str = OWN) -> NoReturn:
        raise ContractError(self._path, message, remedy=remedy)

    def check_keys(self, given: Mapping[str, Any]) -> None:
        for key in REQUIRED:
            if key not in given:
                self._refuse(f"{key!r} is missing", f"add it, as granite-common asks for it: {', '.join(REQUIRED)}")
        for key in given:
            if key not in (*REQUIRED, *OPTIONAL):
                self._refuse(f"{quoted(key)} is not known, and may change how it is asked")
        if given.get("sentence_boundaries"):
            self._refuse("'sentence_boundaries': numbers the input's sentences, to answer with spans of them")
        if given.get("logprobs_workaround"):
            self._refuse("'logprobs_workaround': the model writes channels of thought before its answer")
        if given.get("docs_as_message") not in (None, "string", "json"):
            self._refuse(f"'docs_as_message': {quoted(given['docs_as_message'])} makes roles that chat templates lack")
        parameters = given.get("parameters") or {}
        if not isinstance(parameters, dict):
            self._refuse("'parameters' is no mapping", "write `parameters:` with a line for each parameter")
        for key in parameters:
            if key not in PARAMETERS:
                self._refuse(f"'parameters.{key}' may change how it is asked")
        extra = parameters.get("extra_body") or {}
        for key, value in extra.items() if isinstance(extra, dict) else (("", extra),):
            if value is not None and key != "structured_outputs":
                self._refuse(f"'parameters.extra_body.{key}' may change how it is asked")

    def question(self, instruction: Any) -> str | None:
        """Return the instruction with its placeholders filled in, as Python's `str.format` does."""
        if instruction is None:
            return None
        if not isinstance(instruction, str):
            self._refuse("'instruction' is no text", "write a text, or ~ for none")
        try:
            parts = [part for part in Formatter().parse(instruction) if part[1] is not None]
        except ValueError as exc:
            self._refuse(f"'instruction' has a brace that does not fit: {exc}", "write braces of the text twice: {{ }}")
        fields = {field: bool(spec or conversion) for _, field, spec, conversion in parts if field is not None}
        for field, is_formatted in fields.items():
            if field == "last_message":
                self._refuse("'instruction' repeats the conversation's last message ({last_message})")
            if is_formatted or not field.isidentifier():
                self._refuse(
                    f"'instruction': {quoted(f'{{{field}}}')} is no name", "write braces of the text twice: {{ }}"
                )
            if field not in self._arguments:
                self._refuse(
                    f"'instruction' asks for {quoted(field)}, which has no value",
                    "give one, which makes a classifier: loraplex adapters import "
                    f"{self._path.parent} --name NAME --argument {field}=…",
                )
        for name in self._arguments:
            if name not in fields:
                self._refuse(f"'instruction' lacks {{{name}}}", f"leave --argument {name} out")
        return instruction.format(**self._arguments)

    def likelihood(self, transformations: Any) -> tuple[list[str] | None, Mapping[Any, Any] | None]:
        """Return the path of the label in the answer, and what each category is worth; None where nothing says so."""
        rules = transformations or []
        if not isinstance(rules, list) or not all(
            isinstance(rule, dict) and isinstance(rule.get("type"), str) for rule in rules
        ):
            self._refuse(
                "'transformations' is no list of rules", "write a list of mappings with a 'type', or ~ for none"
            )
        for rule in rules:
            if rule["type"] in SPANS:
                self._refuse(f"'transformations': {quoted(rule['type'])} makes spans or records of the answer")
            if rule["type"] not in ("likelihood", "nest"):
                self._refuse(f"'transformations': {quoted(rule['type'])} is not known")
        found = [rule for rule in rules if rule["type"] == "likelihood"]
        if len(found) > 1:
            self._refuse(f"'transformations' holds {len(found)} of type 'likelihood', and one label is read")
        if not found:
            return None, None
        [rule] = found
        path, categories = rule.get("input_path"), rule.get("categories_to_values")
        if not isinstance(path, list) or not all(isinstance(key, str) for key in path):
            self._refuse(f"'transformations': 'input_path' {quoted(path)} does not lead to one value of the answer")
        if not isinstance(categories, dict):
            self._refuse("'transformations': 'categories_to_values' is missing", "give each label a number")
        return path, categories

    def choices(self, response_format: Any, path: list[str] | None) -> tuple[str, list[str]]:
        """Return the JSON that stands before the label, and the labels as they are written in JSON.

        path:  the keys that lead to the label. By default the answer begins with the label."""
        schema = self._schema(response_format)
        start, place, rest, last = "", self._resolved(schema, schema), path, ""
        for _ in range(MAX_DEPTH):
            properties = place.get("properties")
            if not isinstance(properties, dict) or not properties or rest == []:
                break
            last = str(next(iter(properties)))
            if rest is not None:
                if rest[0] not in properties:
                    break
                if rest[0] != last:
                    self._refuse(f"the answer has {quoted(last)} before {quoted(rest[0])}, which has to be generated")
                rest = rest[1:]
            start += f"{{{json.dumps(last, ensure_ascii=False)}: "
            place = self._resolved(next(iter(properties.values())), schema)
        if rest:
            self._refuse(f"'input_path' leads to {quoted(rest[0])}, which the answer lacks", "correct the path")
        if path is not None and "properties" in place:
            self._refuse(f"'input_path' {quoted(path)} is an object of the answer and no label", "correct the path")
        values = self._values(place)
        if values is None:
            kind, inside = KINDS.get(str(place.get("type")), "any JSON"), f" ({quoted(last)})" if last else ""
            self._refuse(f"'response_format': the answer is {kind}{inside} and no choice between labels")
        if {type(value) for value in values} not in ({str}, {bool}, {int}):
            self._refuse(
                f"'response_format': {quoted(values)} are not of one kind (text, true and false, whole numbers)"
            )
        if isinstance(values[0], str):
            start += '"'
            for value in values:
                if json.dumps(value, ensure_ascii=False) != f'"{value}"':
                    self._refuse(f"'response_format': {quoted(value)} has to be escaped in JSON")
        return start, [_label(value) for value in values]

    def _schema(self, response_format: Any) -> Mapping[str, Any]:
        if response_format is None:
            self._refuse("'response_format' is empty: the answer is a free text and no choice between labels")
        schema = response_format
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as exc:
                self._refuse(f"'response_format' is no JSON: {exc}", "correct it")
        if not isinstance(schema, dict):
            self._refuse("'response_format' is no JSON schema", "write a mapping")
        return schema

    def _resolved(self, place: Any, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the definition that a place of the schema refers to, or the place itself."""
        reference = str(place.get("$ref", "")) if isinstance(place, dict) else ""
        if reference.startswith("#/$defs/"):
            definitions = schema.get("$defs")
            place = definitions.get(reference.removeprefix("#/$defs/")) if isinstance(definitions, dict) else None
        return place if isinstance(place, dict) else {}

    def _values(self, place: Mapping[str, Any]) -> list[Any] | None:
        """Return the values between which the answer chooses; None where it is no choice."""
        if isinstance(enum := place.get("enum"), list) and enum:
            return enum
        if "const" in place:
            return [place["const"]]
        if place.get("type") == "boolean":
            return [True, False]
        low, high = place.get("minimum"), place.get("maximum")
        if place.get("type") != "integer" or type(low) is not int or type(high) is not int:
            return None
        if high - low >= MAX_LABELS:
            self._refuse(f"'response_format': the answer is one of {high - low + 1} numbers, {MAX_LABELS} at most")
        return list(range(low, high + 1)) or None

    def values(self, categories: Mapping[Any, Any], labels: list[str]) -> dict[str, float]:
        """Return what each label is worth."""
        values = {_label(category): value for category, value in categories.items()}
        if values.keys() != set(labels):
            self._refuse(
                f"'categories_to_values' names {listed(list(values))}, and 'response_format' {listed(labels)}",
                "name the same labels in both; YAML needs quotes around yes and no",
            )
        for label, value in values.items():
            if type(value) not in (int, float) or not -MAX_VALUE <= value <= MAX_VALUE:
                self._refuse(
                    f"'categories_to_values': the value of {quoted(label)} is {quoted(value)}", "give a number"
                )
        return {label: float(values[label]) for label in labels}


def _label(value: Any) -> str:
    """Return a value as it is written in JSON, without the quotes of a text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _scalar(text: str) -> str:
    """Return `text` as YAML, in double quotes. Characters that YAML forbids or folds are escaped."""
    return "".join(
        char if char.isprintable() else f"\\U{ord(char):08x}" for char in json.dumps(text, ensure_ascii=False)
    )
