"""Shapes of well-known bases, so that a base can be planned for without its files."""

import functools
from collections.abc import Mapping
from typing import Any

from loraplex.hardware.data import Data, entries, unknown


class KnownBase(Data):
    """A base of `bases.yaml`.

    hub:         ids of models of this shape on huggingface.co.
    parameters:  how many numbers its weights are; tied heads count once.
    config:      keys of its config.json; `AutoConfig.for_model(**config)` makes the model's config of them.
    """

    name: str
    hub: tuple[str, ...]
    parameters: int
    config: Mapping[str, Any]


def known_bases() -> Mapping[str, KnownBase]:
    """Return all known bases by their short names."""
    return entries("bases.yaml", KnownBase)


def known_base(name: str) -> KnownBase:
    """Return the base of a short name or of a hub id. Raises ConfigurationError for an unknown one."""
    if found := _by_alias().get(name.lower()):
        return found
    raise unknown("base", name, known_bases(), "give any other base's config.json with --config")


@functools.cache
def _by_alias() -> dict[str, KnownBase]:
    """Return the bases by all names in lower case: the short one, the hub's id, and this id without its owner."""
    return {
        alias.lower(): base
        for name, base in known_bases().items()
        for alias in (name, *base.hub, *(one.partition("/")[2] for one in base.hub))
    }
