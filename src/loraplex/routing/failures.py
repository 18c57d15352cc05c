"""Failures that must not cost an answer: a log line says when they begin, and when they are over."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from loraplex.errors import StateError


class Failures:
    """Failures of one kind. The same failure is logged once."""

    def __init__(self, logger: logging.Logger, failing: str, over: str) -> None:
        """failing: what is wrong while it fails. over: what is true again."""
        self._logger: Final = logger
        self._failing, self._over = failing, over
        self._last = ""

    @contextmanager
    def only_logged(self) -> Iterator[None]:
        """Run the block. A StateError ends the block, and is logged and not raised."""
        before, self._last = self._last, ""
        try:
            yield
        except StateError as exc:
            self._last = str(exc)
            if self._last != before:
                self._logger.error("%s: %s", self._failing, exc)
        else:
            if before:
                self._logger.warning(self._over)
