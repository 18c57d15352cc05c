"""The paths of the HTTP API as they are declared, such as `/v1/adapters/{name}`, with their methods."""

import difflib
from collections.abc import Iterable

from starlette.routing import BaseRoute, Route, compile_path

UNKNOWN = "(unknown)"
LONGEST = 200  # characters of a path that are compared with the declared ones


class Paths:
    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._methods: dict[str, set[str]] = {}
        for route in routes:
            if isinstance(route, Route):
                self._methods.setdefault(route.path, set()).update(route.methods or ())
        self._patterns = [(compile_path(path)[0], path) for path in sorted(self._methods) if "{" in path]

    def declared(self, path: str) -> str:
        """Return the path as it is declared, so that the log does not show what a client put into it."""
        if path in self._methods:
            return path
        return next((declared for pattern, declared in self._patterns if pattern.match(path)), UNKNOWN)

    def methods(self, path: str) -> list[str]:
        """Return the methods that a path takes."""
        return sorted(self._methods.get(self.declared(path), ()))

    def similar(self, path: str) -> list[str]:
        """Return the declared paths that look like an unknown one."""
        return difflib.get_close_matches(path[:LONGEST].lower(), self._methods, cutoff=0.7)
