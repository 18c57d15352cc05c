"""The benchmark's HTTP client and its child processes, against small real ones."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loraplex.bench.call import Answer, Call, Reply
from loraplex.bench.http import Http, classify
from loraplex.bench.load import Job, Load, Sample
from loraplex.bench.process import Process, probe
from loraplex.bench.system import SystemEnded
from loraplex.types import Message

CALL = Call(input="Customer: hello", classifiers=("a",), conversation_id="7")
VERDICT = {"classifier": "a", "label": "yes", "scores": {"yes": 0.75, "no": 0.25}, "label_mass": 1.0}
RESULT = {
    "id": "cls-1",
    "verdicts": [VERDICT],
    "usage": {"prompt_tokens": 9, "computed_tokens": 7, "cached_tokens": 2},
    "timings": {"total_ms": 3.5},
}


def answered(*answers: bytes) -> tuple[list[Reply], int]:
    """Ask a server that gives these answers, one after the other. Returns the replies, and how often it was connected
    to. An empty answer closes the connection."""
    left, num_connections = list(answers), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        while left:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            assert head.startswith(b"POST /llm/v1/classify HTTP/1.1\r\n") and b"Authorization: Bearer k\r\n" in head
            assert json.loads(body) == {
                "input": "Customer: hello",
                "classifiers": ["a"],
                "conversation_id": "7",
                "cascade": False,
            }
            if not (answer := left.pop(0)):
                break
            writer.write(answer)
        writer.close()

    async def ask() -> list[Reply]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        http = Http(f"http://127.0.0.1:{port}/llm/", {"Authorization": "Bearer k"})
        try:
            return [await classify(http, CALL) for _ in answers]
        finally:
            http.close()
            server.close()
            await server.wait_closed()

    return asyncio.run(ask()), num_connections


def http_answer(status: int, body: object) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d Any\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content)


def test_answers_are_read_and_the_connection_is_used_again() -> None:
    late = {**VERDICT, "label": None, "error": {"code": "deadline_exceeded", "message": "", "remedy": ""}}
    full = {**late, "error": {"code": "queue_full", "message": "", "remedy": ""}}
    replies, num_connections = answered(
        http_answer(200, RESULT),
        http_answer(429, {"error": {"code": "queue_full"}}),
        http_answer(503, b"busy"),
        http_answer(500, {"error": "no object"}),
        http_answer(200, b"{}"),
        http_answer(200, {**RESULT, "verdicts": [late]}),
        http_answer(200, {**RESULT, "verdicts": [full]}),
    )
    assert replies[0] == Reply(
        status="ok",
        verdicts={"a": Answer(label="yes", scores={"yes": 0.75, "no": 0.25}, label_mass=1.0)},
        prompt_tokens=9,
        computed_tokens=7,
        cached_tokens=2,
        engine_ms=3.5,
    )
    assert [(one.status, one.error) for one in replies[1:]] == [
        ("refused", "queue_full"),
        ("refused", "503"),
        ("failed", "500"),
        ("failed", "not_loraplex"),
        ("failed", "deadline_exceeded"),
        ("refused", "queue_full"),
    ]
    assert num_connections == 1


def test_no_answer_is_a_failure_and_the_next_request_connects_again() -> None:
    replies, num_connections = answered(b"", b"HTTP/1.1 200 OK\r\n\r\n", http_answer(200, RESULT))
    assert [one.status for one in replies] == ["failed", "failed", "ok"] and num_connections == 3


@pytest.mark.parametrize("url", ["https://x", "127.0.0.1:8000", "http://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no http"):
        Http(url)


def test_a_load_and_its_samples_cross_to_a_worker() -> None:
    messages = (Message(role="user", content="Hi"), Message(role="assistant", content="Yes?"))
    calls = (CALL, Call(input=messages, classifiers=("a", "b")))
    jobs = (Job(index=0, conversation=3, turns=(calls,)), Job(index=1, conversation=3, turns=((CALL,),), at_s=1.5))
    load = Load(jobs=jobs, window_s=(0.5, 2.0))
    assert Load.from_json(json.loads(json.dumps(load.to_json()))) == load
    reply = Reply(status="ok", verdicts={"a": Answer(label="yes", scores={"yes": 1.0}, label_mass=0.5)})
    sample = Sample(job=jobs[1], turn=0, classifiers=("a",), scheduled_s=1.5, sent_s=1.6, done_s=2.0, reply=reply)
    assert Sample.from_json(json.loads(json.dumps(sample.to_json())), load) == sample


def with_process(script: str, log: Path, use: Callable[[Process], Awaitable[object]]) -> None:
    async def run() -> None:
        process = Process([sys.executable, "-c", script], log)
        await process.start()
        try:
            await use(process)
        finally:
            await process.close()
            await process.close()

    asyncio.run(run())


def test_a_process_that_ends_ends_what_asks_it(tmp_path: Path) -> None:
    async def use(process: Process) -> None:
        assert json.loads(await process.line()) == {"key": None}
        with pytest.raises(SystemEnded, match="no_memory: it is full"):
            await process.while_alive(asyncio.sleep(60))

    script = (
        "import os, sys; print('{\"key\": null}', flush=True);"
        "print('error no_memory: it is full', file=sys.stderr); sys.exit(os.environ.get('LORAPLEX_PORT') and 0 or 3)"
    )
    with_process(script, tmp_path / "new" / "x.log", use)


def test_what_a_process_is_asked_for_comes_back_and_it_is_stopped(tmp_path: Path) -> None:
    async def use(process: Process) -> None:
        await process.send("hello")
        assert await process.line() == "HELLO\n"
        assert await process.while_alive(asyncio.sleep(0, "done")) == "done"

    with_process("while True: print(input().upper(), flush=True)", tmp_path / "x.log", use)


def test_settings_of_a_server_do_not_reach_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def use(process: Process) -> None:
        assert (await process.line()).strip() == "None"

    monkeypatch.setenv("LORAPLEX_BACKEND", "peft")
    with_process("import os; print(os.environ.get('LORAPLEX_BACKEND'))", tmp_path / "x.log", use)


def test_an_interpreter_is_asked_for_its_libraries() -> None:
    found = probe(sys.executable, ("torch", "no_such_library"))
    assert found.keys() == {"torch"} and found["torch"][0].isdigit()
    with pytest.raises(OSError, match="status 1"):
        probe("/bin/false", ("torch",))
