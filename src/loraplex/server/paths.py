"""The paths of the HTTP API as they are declared, such as `/v1/adapters/{name}`, with their methods."""

import difflib
import re
from collections.abc import Iterable

from starlette.routing import BaseRoute, Route

from loraplex.errors import LoraplexError, MethodNotAllowedError, NotFoundError, quoted

UNKNOWN = "(unknown)"
LONGEST = 200  # characters of a path that are compared with the declared ones


class Paths:
    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._methods: dict[str, set[str]] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}
        for route in routes:
            if isinstance(route, Route):
                self._methods.setdefault(route.path_format, set()).update(route.methods or ())
                if "{" in route.path:
                    self._patterns[route.path_format] = route.path_regex

    def declared(self, path: str) -> str:
        """Return the path as it is declared, so that the log does not show what a client put into it."""
        if path in self._methods:
            return path
        return next((declared for declared, pattern in self._patterns.items() if pattern.match(path)), UNKNOWN)

    def methods(self, path: str) -> list[str]:
        """Return the methods that a path takes."""
        return sorted(self._methods.get(self.declared(path), ()))

    def refusal(self, method: str, path: str) -> LoraplexError | None:
        """Return the error for a path that does not exist, or that does not take the method; else None."""
        remedy, methods = "see /docs for the paths", self.methods(path)
        if not methods:
            if similar := self.similar(path):
                remedy = f"did you mean {' or '.join(similar)}? See /docs for all paths"
            return NotFoundError(f"there is no path {quoted(path)}", remedy=remedy)
        if method in methods:
            return None
        message = f"{method} is not allowed for {quoted(path)}; use {', '.join(methods)}"
        return MethodNotAllowedError(message, remedy=remedy)

    def begin_with(self, prefix: str) -> bool:
        """Return whether one of the declared paths is below `prefix`, which would then mean two things."""
        return any(path == prefix or path.startswith(f"{prefix}/") for path in self._methods)

    def similar(self, path: str) -> list[str]:
        """Return the declared paths that look like an unknown one."""
        return difflib.get_close_matches(path[:LONGEST].lower(), self._methods, cutoff=0.7)
