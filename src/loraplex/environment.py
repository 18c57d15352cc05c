"""Variables named LORAPLEX_…: those that hold settings, those that Kubernetes sets for a service, and those that nobody
reads."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from loraplex.errors import listed

PREFIX = "LORAPLEX_"
# Read by clients, by the server's keys, by the images' entry point, and by this project's tests. The command's options
# name the others.
ELSEWHERE = frozenset(f"{PREFIX}{name}" for name in "API_KEY API_KEYS URL MODEL_DIR GPU_TESTS WRITE_DOCS".split())
# What Kubernetes sets in each container of a namespace with a service named loraplex or loraplex-…:
# LORAPLEX_PORT=tcp://10.43.1.39:8000, LORAPLEX_SERVICE_HOST, LORAPLEX_PORT_8000_TCP_ADDR and others.
LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
LINK_NAME = re.compile(rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP))(_\w+)?")


def variable(setting: str) -> str:
    """Return the name of the variable that holds a setting, such as LORAPLEX_KV_CACHE for `kv_cache`."""
    return f"{PREFIX}{setting.upper()}"


def settings_in(environment: Mapping[str, str], model: type[BaseModel]) -> dict[str, Any]:
    """Return the fields of `model` that the environment sets, as the options of `loraplex serve` read them: a list's
    values stand between spaces, and an empty variable sets nothing."""
    given = {name: value for name in model.model_fields if (value := environment.get(variable(name)))}
    return {
        name: value.split() if get_origin(model.model_fields[name].annotation) is tuple else value
        for name, value in given.items()
    }


def drop_links(settings: dict[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Replace each setting that Kubernetes set by None. Return a warning for each.

    origins:  setting -> what stands before its value where it was given, such as `LORAPLEX_PORT=`."""
    warnings = []
    for name, value in settings.items():
        if isinstance(value, str) and LINK.fullmatch(value) and origins.get(name, "").startswith(PREFIX):
            settings[name] = None
            warnings.append(
                f"{origins[name]}{value} is ignored, because Kubernetes sets it for a service of this name; give "
                f"--{name.replace('_', '-')} instead, or set enableServiceLinks: false in the pod"
            )
    return warnings


def unread(environment: Mapping[str, str], known: Collection[str]) -> str | None:
    """Return a warning that names the variables LORAPLEX_… which nobody reads, or None. known: those that are read."""
    known = {*known, *ELSEWHERE}
    others = [
        name
        for name, value in sorted(environment.items())
        if name.startswith(PREFIX) and name not in known and not LINK.fullmatch(value) and not LINK_NAME.fullmatch(name)
    ]
    if not others:
        return None
    names = [name.removeprefix(PREFIX) for name in known]
    near = {name: difflib.get_close_matches(name.removeprefix(PREFIX), names, 1) for name in others}
    hints = "".join(f"; did you mean {PREFIX}{found[0]} for {name}?" for name, found in near.items() if found)
    return f"the environment has variables that are not read: {listed(others)}{hints}"
