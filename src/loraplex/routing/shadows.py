"""Shadow requests: they run when no other request waits, and are dropped first."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex.errors import LoraplexError
from loraplex.types import ClassifyRequest, ClassifyResult

if TYPE_CHECKING:  # the service imports torch
    from loraplex.service.service import Service

logger = logging.getLogger(__name__)
MAX_WAITING = 256  # each holds a whole conversation
LOOK_EVERY_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """One request to shadow adapters.

    of:  adapter -> (verdict id, route) of each verdict that the adapter shadows.
    """

    request: ClassifyRequest
    of: dict[str, tuple[tuple[str, str], ...]]


class Shadows:
    """A bounded queue of shadow requests. A full queue drops its oldest request; this happens when the service is
    always busy. Shadows run one at a time, so that they hardly fill the service's own queue."""

    def __init__(self, service: "Service", answered: Callable[[Shadow, ClassifyResult | LoraplexError], None]) -> None:
        self._service, self._answered = service, answered
        self._waiting: deque[Shadow] = deque()
        self._come = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self.num_shed = 0

    def start(self) -> None:
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Drop all waiting shadows, and cancel the one that runs."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})

    def add(self, shadow: Shadow) -> None:
        if len(self._waiting) == MAX_WAITING:
            self._waiting.popleft()
            self.num_shed += 1
        self._waiting.append(shadow)
        self._come.set()

    async def _work(self) -> None:
        while True:
            await self._come.wait()
            if self._service.num_waiting:
                await asyncio.sleep(LOOK_EVERY_S)
                continue
            if not self._waiting:
                self._come.clear()
                continue
            shadow = self._waiting.popleft()
            try:
                self._answered(shadow, await self._service.classify(shadow.request))
            except LoraplexError as exc:
                self._answered(shadow, exc)
            except Exception:  # later shadows must still run
                logger.exception("a shadow request failed")
