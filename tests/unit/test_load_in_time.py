"""Adapters that were never loaded, for a client with little patience."""

import asyncio
from typing import Any

import pytest

from loraplex.errors import AdapterError, DeadlineExceededError, NotReadyError
from loraplex.routing.question_checks import load_in_time
from loraplex.server.routes import before_the_work
from loraplex.types import AdapterInfo


class Loading:
    """A service whose adapters are loaded when `ready` is set; `broken` never is."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.loaded: list[str] = []

    def knows(self, name: str) -> bool:
        return name != "gone"

    def adapter(self, name: str) -> AdapterInfo:
        return AdapterInfo(name=name, path="", version="v" if name == "warm" else None)

    async def version_of(self, name: str) -> None:
        if name == "broken":
            raise AdapterError("broken", "is broken", remedy="none")
        await self.ready.wait()
        self.loaded.append(name)


@pytest.mark.anyio
async def test_a_slow_load_is_told_and_goes_on() -> None:
    service: Any = Loading()
    with pytest.raises(NotReadyError, match="'cold'"):
        await load_in_time(service, ["warm", "cold", "gone", "broken"], 0.01)
    service.ready.set()
    await asyncio.sleep(0.01)
    assert service.loaded == ["cold"]
    await load_in_time(service, ["warm", "broken"], 0.01)


@pytest.mark.anyio
async def test_a_load_takes_no_longer_than_the_requests_deadline() -> None:
    service: Any = Loading()

    class Connected:
        async def receive(self) -> None:
            await asyncio.Event().wait()

    request: Any = Connected()
    with pytest.raises(DeadlineExceededError, match="not loaded before the deadline"):
        await before_the_work(request, load_in_time(service, ["cold"], 5.0), 10.0)
    service.ready.set()
    await asyncio.sleep(0.01)
    assert service.loaded == ["cold"], "the load goes on"
