"""Compares the base that an adapter's config names with the base that is served. Names only: reads no weights."""

import re
from collections.abc import Iterable
from pathlib import Path

from loraplex.bundle import read_json
from loraplex.errors import quoted

IN_CACHE = re.compile(r"(?:^|/)models--(?:[^/]+?--)?([^/]+)")  # the hub's cache: models--org--name/snapshots/…
# How a base is stored or quantized. The adapter was trained on the same base all the same.
STORED = re.compile(r"[-_.](bnb|unsloth|gptq|awq|gguf|hf|bf16|fp16|fp8|int4|int8|nf4|4-?bit|8-?bit)$")
SIZE = re.compile(r"(?<![a-z0-9])\d+([._]\d+)?[bm](?![a-z0-9])", re.IGNORECASE)  # such as 0.6B or 350m
STEP = re.compile(r"checkpoint-\d+")


class ServedBase:
    """The names that the served base is known by."""

    def __init__(self, folder: Path) -> None:
        given = read_json(folder / "config.json").get("_name_or_path")
        named = [name for name in (_model_name(given), _in_cache(folder)) if name is not None]
        folders = [folder.name, folder.resolve().name]
        self._names = _normal([*named, *folders])
        # A folder may have any name. One that says a model's size is taken for the model's name.
        self._surely = [*named, *(name for name in folders if SIZE.search(name))]

    def warn_of(self, given: str | None) -> tuple[str, ...]:
        """Return a warning where an adapter's `base_model_name_or_path` names another base, and both are known."""
        name = _model_name(given)
        if name is None or not self._surely or not _normal([name]).isdisjoint(self._names):
            return ()
        return (
            f"it was trained on {quoted(given)} (base_model_name_or_path), and the base served here is "
            f"{self._surely[0]!r}; if they differ, its answers are wrong",
        )


def _in_cache(path: Path | str) -> str | None:
    found = IN_CACHE.search(str(path))
    return None if found is None else found[1]


def _model_name(given: object) -> str | None:
    """Return the model's name in a path or hub id, without the organisation; None where it says nothing. A path to a
    folder that is not on this machine says nothing, and neither does a name without a digit, such as "base"."""
    if not isinstance(given, str) or not given.isprintable() or len(given) > 4096:
        return None
    text = given.strip().replace("\\", "/").rstrip("/")
    if cached := _in_cache(text):
        return cached
    is_path = text.startswith(("/", "~", ".")) or text.count("/") > 1 or text[1:2] == ":"
    if is_path and not Path(text).is_dir():
        return None
    name = text.rpartition("/")[2].partition("@")[0]
    return name if any(map(str.isdecimal, name)) and not STEP.fullmatch(name) else None


def _normal(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        one = name.lower()
        while STORED.search(one):
            one = STORED.sub("", one)
        found.add(one)
    return found
