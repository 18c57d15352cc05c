"""Reads the package's data files, and refuses names that they do not have."""

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, ConfigDict

from loraplex.config import read_yaml, validate
from loraplex.errors import MAX_QUOTED, ConfigurationError, listed, quoted
from loraplex.problems import NumbersAreNoBooleans

Date = Annotated[str, BeforeValidator(str)]  # YAML reads 2026-11-28 as a date, and 2026-11 as text


class Data(NumbersAreNoBooleans):
    """Base of what a data file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Entry = TypeVar("Entry", bound=Data)


def package_file(name: str) -> Path:
    return Path(__file__).with_name(name)


@functools.cache
def entries(file: str, kind: type[Entry]) -> dict[str, Entry]:
    """Return the entries of one of the package's data files by name. Each gets its name as its field `name`."""
    path = package_file(file)
    found = read_yaml(path, ConfigurationError)
    return {name: validate(kind, {"name": name, **entry}, path, part=name) for name, entry in found.items()}


def unknown(what: str, name: str, known: Iterable[str], otherwise: str) -> ConfigurationError:
    """Return the error for a name that a data file does not have. Its remedy lists the names that are like it, or all.

    what:       "device"; it stands before the name.
    otherwise:  what else the user can do; it ends the remedy.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name[:MAX_QUOTED].lower(), known, 5) or known
    return ConfigurationError(f"{what} {quoted(name)}", "is unknown", remedy=f"use one of {listed(near)}; {otherwise}")
