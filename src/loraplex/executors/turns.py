"""Takes turns between requests of different kinds that must not be computed together. No vLLM, no torch."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class Turns:
    """Admits any number of one kind at once. Another kind waits until all of them have left. While anyone waits,
    newcomers of every kind wait too, so that nobody waits for ever. For one event loop."""

    def __init__(self) -> None:
        self._kind: Hashable = None
        self._num_in = 0
        self._waiting: deque[tuple[Hashable, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def turn(self, kind: Hashable) -> AsyncIterator[None]:
        if self._waiting or (self._num_in and kind != self._kind):
            await self._wait(kind)
        else:
            self._kind, self._num_in = kind, self._num_in + 1
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, kind: Hashable) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((kind, admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            if not admitted.cancelled():  # admitted, and cancelled before it resumed
                self._leave()
            raise

    def _leave(self) -> None:
        self._num_in -= 1
        if self._num_in:
            return
        waiting = [(kind, admitted) for kind, admitted in self._waiting if not admitted.done()]
        if waiting:
            self._kind = waiting[0][0]
        self._waiting = deque(one for one in waiting if one[0] != self._kind)
        for kind, admitted in waiting:
            if kind == self._kind:
                admitted.set_result(None)
                self._num_in += 1
