"""A machine that runs out of memory, threads or files is named as such, wherever that happens, and what to lower."""

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
import typer

from loraplex import Loraplex
from loraplex.adapters.residence import as_error
from loraplex.cli.options import errors_to_exit
from loraplex.config import ServerConfig
from loraplex.engine.engine import _engine_error
from loraplex.errors import EngineError
from loraplex.exhaustion import exhaustion
from loraplex.routing.router import Router
from loraplex.server.app import create_app
from loraplex.server.lifecycle import Lifecycle
from loraplex.text.tokenizer import Tokenizer


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def no_thread() -> RuntimeError:
    return RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("exc", "what", "lower"),
    [
        (raised(lambda: bytearray(1 << 60)), "host memory", "--host-memory"),
        (raised(lambda: torch.empty(1 << 50)), "host memory", "--max-step-tokens"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host memory", "container"),
        (no_thread(), "threads", "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), "open files", "ulimit -n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "device memory", "--kv-cache"),
        (RuntimeError("CUDA error: out of memory"), "device memory", "--adapter-memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "device memory", "--max-step-tokens"),
        (ExceptionGroup("of tasks", [ValueError(), ExceptionGroup("", [no_thread()])]), "threads", "pids"),
    ],
)
def test_the_error_names_what_ran_out_and_what_to_lower(exc: BaseException, what: str, lower: str) -> None:
    error = exhaustion(exc)
    assert error is not None and error.code == "engine_error"
    assert error.message.startswith(f"the server ran out of {what}: ") and lower in error.remedy
    assert len(error.message) < 400


@pytest.mark.parametrize("exc", [ValueError(), RuntimeError("shapes differ"), OSError(errno.ENOENT, "no such file")])
def test_any_other_failure_is_none(exc: Exception) -> None:
    assert exhaustion(exc) is None


def test_the_engine_and_the_loading_of_adapters_say_so() -> None:
    for error in (_engine_error(MemoryError()), as_error(MemoryError(), "one")):
        assert "host memory" in error.message and "--kv-cache" in error.remedy
    assert "ran out" not in _engine_error(ValueError()).message + as_error(ValueError(), "one").message


def test_http_says_so() -> None:
    app = create_app(ServerConfig(), (), Lifecycle(cast(Router, object())))

    async def fail() -> None:
        raise no_thread()

    app.add_api_route("/fail", fail)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://any") as client:
            return await client.get("/fail")

    error = asyncio.run(ask()).json()["error"]
    assert error["code"] == "engine_error" and "ran out of threads" in error["message"]
    assert "report it" not in error["remedy"] and "pids" in error["remedy"]


def test_the_command_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), errors_to_exit():
        raise MemoryError
    assert "ran out of host memory" in capsys.readouterr().err
    with pytest.raises(ValueError), errors_to_exit():
        raise ValueError


def test_a_request_without_a_thread_gets_an_error_and_the_next_is_answered(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fails(thread: threading.Thread) -> Any:
        if thread.name.startswith("loraplex-tokenizer"):
            raise no_thread()
        return start(thread)

    texts = "Customer: hello", "Customer: hello " * 10_000  # long texts have a thread of their own
    with Loraplex.load(tiny_bundle, device="cpu", dtype="float32") as loraplex:
        computing = loraplex.service.computing
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            for text in texts:
                with pytest.raises(EngineError, match="ran out of threads"):
                    loraplex.classify(text, "task0")
        assert computing._threads.num_long_chars == computing.admission.num_evaluations == 0
        for text in texts:
            assert loraplex.classify(text, "task0")["task0"].label


def test_a_request_without_memory_for_its_text_gets_an_error(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    with Loraplex.load(tiny_bundle, device="cpu", dtype="float32") as loraplex:
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode", fails)
            with pytest.raises(EngineError, match="ran out of host memory"):
                loraplex.classify("Customer: hello", ["task0", "task1"])
        assert loraplex.classify("Customer: hello", "task0")["task0"].label
