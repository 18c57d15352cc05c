"""Writes a `classifier.yaml`, or changes keys of one and leaves the rest of the file as it was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loraplex.classifier import Contract
from loraplex.config import read_yaml, validate
from loraplex.errors import ContractError
from loraplex.measuring.files import write_text

WIDTH = 110  # of lines in a new file


def text_of(keys: Mapping[str, Any]) -> str:
    """Return a contract's keys as the text of a file."""
    return yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True, width=WIDTH)


def changed(path: Path, keys: Mapping[str, Any]) -> str:
    """Return the file's text with other values for some keys. All other lines stay as they are, with their comments;
    only comments within a value that changes are lost. A file that is written in an unusual way, such as with anchors,
    is written anew without comments. Raises ContractError where the file cannot be read."""
    before = read_yaml(path, ContractError)
    after = {**before, **keys}
    validate(Contract, after, path, ContractError)
    text = path.read_bytes().decode()
    try:
        for key, value in keys.items():
            text = _with(text, key, value)
        is_same = yaml.safe_load(text) == after
    except yaml.YAMLError:
        is_same = False
    return text if is_same else text_of(after)


def write(path: Path, text: str) -> None:
    """Write a contract in one piece. Raises ContractError where that is not possible."""
    try:
        write_text(path, text)
    except OSError as exc:
        raise ContractError(
            path, f"cannot be written: {exc.strerror or exc}", remedy="make the folder writable"
        ) from None


def _with(text: str, key: str, value: Any) -> str:
    """Return the text with one key's value replaced, or with the key behind `labels`, which every contract has."""
    root = yaml.compose(text, yaml.SafeLoader)
    nodes = {name.value: (name, of) for name, of in root.value} if isinstance(root, yaml.MappingNode) else {}
    line = f"{key}: {_written(value)}"
    if key in nodes:
        name, of = nodes[key]
        return text[: name.start_mark.index] + line + text[_end(of) :]
    if "labels" not in nodes:
        return text
    name, of = nodes["labels"]
    at = text.find("\n", _end(of))
    at = len(text) if at < 0 else at
    return f"{text[:at]}\n{' ' * name.start_mark.column}{line}{text[at:]}"


def _end(node: yaml.Node) -> int:
    """Return where a value ends, without the comments and empty lines that follow a block."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _written(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()
