"""`classify_many` of either client against a scripted server: order, bounds, errors, progress and interruption."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from loraplex import AsyncClient, Client
from loraplex.client.many import Conversation
from loraplex.errors import InvalidRequestError, UnknownClassifierError
from loraplex.types import ClassifyResult

RESULT: dict[str, Any] = {"verdicts": [], "usage": {}, "timings": {}}


Many = Callable[..., list[Any]]


def error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "what", "remedy": "how"}}


def echo(request: httpx.Request) -> httpx.Response:
    """A result whose id is the input; "bad" is an error."""
    body = json.loads(request.content)
    if body["input"] == "bad":
        return httpx.Response(404, json=error("unknown_classifier"))
    return httpx.Response(200, json=RESULT | {"id": f"{body.get('conversation_id', '')}{body['input']}"})


@pytest.fixture(params=["Client", "AsyncClient"])
def many(request: pytest.FixtureRequest) -> Many:
    """`classify_many` of either client. `handle` runs in the attempt's thread or task."""

    def many_sync(handle: Callable[[httpx.Request], httpx.Response], *args: Any, **kwargs: Any) -> list[Any]:
        with Client("http://server", transport=httpx.MockTransport(handle)) as client:
            return list(client.classify_many(*args, **kwargs))

    def many_async(handle: Callable[[httpx.Request], httpx.Response], *args: Any, **kwargs: Any) -> list[Any]:
        async def handle_async(request: httpx.Request) -> httpx.Response:
            return await asyncio.to_thread(handle, request)

        async def run() -> list[Any]:
            async with AsyncClient("http://server", transport=httpx.MockTransport(handle_async)) as client:
                return list(await client.classify_many(*args, **kwargs))

        return asyncio.run(run())

    return many_sync if request.param == "Client" else many_async


def ids(results: list[Any]) -> list[str]:
    return [result.id for result in results]


def test_many_are_in_order_and_bounded_and_read_no_further_than_needed(many: Many) -> None:
    lock, state = threading.Lock(), {"now": 0, "most": 0, "done": 0, "ahead": 0}
    threads = set()  # those of this call: an earlier test's may still be ending

    def handle(request: httpx.Request) -> httpx.Response:
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
            if threading.current_thread().name.startswith("loraplex-client"):
                threads.add(threading.get_ident())
        time.sleep(0.001 * (int(json.loads(request.content)["input"]) % 5))  # so that they end out of order
        with lock:
            state["now"] -= 1
            state["done"] += 1
        return echo(request)

    def texts() -> Iterator[str]:
        for index in range(60):
            state["ahead"] = max(state["ahead"], index - state["done"])
            yield str(index)

    assert ids(many(handle, texts(), "a", concurrency=4)) == [str(index) for index in range(60)]
    assert state["most"] == 4
    assert state["ahead"] <= 4 and len(threads) <= 4


def test_many_of_nothing_and_more_threads_than_work(many: Many) -> None:
    assert many(echo, []) == []
    assert ids(many(echo, ["x", "y"], concurrency=50)) == ["x", "y"]


def test_many_with_conversation_ids_and_messages(many: Many) -> None:
    turns = [{"role": "user", "content": "x"}]
    conversations: list[Conversation] = ["x", ("c", "y"), turns, ("d", turns), ({"role": "user", "content": "x"},) * 2]
    assert ids(many(echo, conversations)) == ["x", "cy", f"{turns}", f"d{turns}", f"{turns * 2}"]


def test_the_first_error_ends_it(many: Many) -> None:
    asked = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["input"])
        return echo(request)

    with pytest.raises(UnknownClassifierError):
        many(handle, (text for text in ["x", "bad", *"y" * 1000]), concurrency=2)
    assert len(asked) < 20


def test_an_error_takes_its_results_place(many: Many) -> None:
    results = many(echo, ["x", "bad", None, "\ud800", "y"], on_error="return")
    assert [type(one) for one in results] == [
        ClassifyResult,
        UnknownClassifierError,
        InvalidRequestError,
        InvalidRequestError,
        ClassifyResult,
    ]


def test_what_the_users_generator_raises_comes_through(many: Many) -> None:
    def texts() -> Iterator[str]:
        yield "x"
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        many(echo, texts(), on_error="return")


def test_wrong_use_of_many(many: Many) -> None:
    with pytest.raises(InvalidRequestError, match="one text"):
        many(echo, "text")
    with pytest.raises(InvalidRequestError, match="concurrency"):
        many(echo, ["x"], concurrency=0)


def test_a_bar_shows_progress_on_standard_error(many: Many, capsys: pytest.CaptureFixture[str]) -> None:
    many(echo, ["x", "bad", "y"], progress=True, on_error="return")
    many(echo, iter(["x", "y"]), progress=True)
    captured = capsys.readouterr()
    assert "3/3" in captured.err and "2/?" in captured.err and captured.out == ""
    many(echo, ["x"])
    assert capsys.readouterr().err == ""


def test_ctrl_c_stops_at_once_though_the_server_hangs() -> None:
    """Neither what is in flight nor a wait before the next attempt is waited for, and nothing is sent afterwards."""
    hanging, asked = threading.Event(), []

    def handle(request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["input"]
        asked.append(text)
        if text == "hang":
            hanging.wait(30)
        if text == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            hanging.wait(30)
        return httpx.Response(429, json=error("queue_full"), headers={"Retry-After": "0.2"})

    started = time.monotonic()
    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        with pytest.raises(KeyboardInterrupt):
            client.classify_many(iter(["busy", "hang", "interrupt", "never"]), concurrency=3, on_error="return")
        assert time.monotonic() - started < 5
        time.sleep(0.9)  # "busy" would have been sent again
        hanging.set()
    assert sorted(asked) == ["busy", "hang", "interrupt"]


def test_cancelling_many_cancels_what_is_in_flight() -> None:
    cancelled = []

    async def handle(request: httpx.Request) -> httpx.Response:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(json.loads(request.content)["input"])
            raise
        return echo(request)

    async def run() -> None:
        async with AsyncClient("http://server", transport=httpx.MockTransport(handle)) as client:
            work: Awaitable[Any] = client.classify_many(map(str, range(10)), concurrency=3)
            await asyncio.wait_for(work, 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert sorted(cancelled) == ["0", "1", "2"]
