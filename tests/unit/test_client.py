"""The client against a scripted server, on a clock of its own: what is sent, what again, and what comes of it."""

import asyncio
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

import loraplex
from loraplex import AsyncClient, Client, Message, Question, errors
from loraplex.client.exchange import Connection
from loraplex.errors import (
    AdapterError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    LoraplexError,
    NotReadyError,
    QueueFullError,
    ServerError,
)
from loraplex.types import ClassifyResult, ErrorInfo

RESULT = {
    "id": "cls-1",
    "verdicts": [{"classifier": "a", "label": "yes", "confidence": 0.75, "scores": {"yes": 0.75, "no": 0.25}}],
    "usage": {"prompt_tokens": 3},
    "timings": {"total_ms": 1.5},
}
ADAPTER = {"name": "a", "state": "ready", "version": "v", "path": "/a", "pinned": True}
ROUTE = {"name": "r", "targets": {"a": 1.0}, "shadows": ["b"], "revision": 2}
STATS = {
    "name": "r",
    "targets": [
        {
            "target": "a",
            "version": "v",
            "role": "primary",
            "num_verdicts": 3,
            "num_errors": 1,
            "label_shares": {"yes": 1.0},
            "mean_confidence": 0.5,
            "latency_ms": {"mean": 1.0, "p50": 1.0, "p99": 2.0},
            "agreement": None,
            "accuracy": {"num_labelled": 2, "share": 0.5, "low": 0.1, "high": 0.9},
        }
    ],
}
EXAMPLES = {
    "examples": [
        {"id": "cls-1", "input": "hi", "labels": {"r": "yes"}, "corrected": ["r"]},
        {"id": "cls-2", "input": [{"role": "user", "content": "hi"}], "labels": {"r": "no"}},
    ],
    "after": "1.2",
}
OK = httpx.codes.OK
Step = httpx.Response | Exception


def error(status: int, code: str = "engine_error", **headers: str) -> httpx.Response:
    body = {"error": {"code": code, "message": "what", "remedy": "how"}}
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Script:
    """Answers one step after the other, the last one for ever; its time passes only in sleeps and in `seconds`."""

    steps: list[Step]
    seconds: float = 0.0  # that an attempt takes
    now: float = 0.0
    requests: list[httpx.Request] = field(default_factory=list)
    sleeps: list[float] = field(default_factory=list)
    jitters: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.now += self.seconds
        step = self.steps[min(len(self.requests), len(self.steps) - 1)]
        self.requests.append(request)
        if isinstance(step, Exception):
            raise step
        return httpx.Response(step.status_code, content=step.content, headers=step.headers)

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)

    def uniform(self, low: float, high: float) -> float:
        self.jitters.append((low, high))
        return high

    def bodies(self) -> list[Any]:
        return [json.loads(request.content) if request.content else None for request in self.requests]


Ask = Callable[..., Any]


@pytest.fixture(params=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Calls a method of either client under a script."""

    def ask_sync(script: Script, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        with Client("http://server", transport=httpx.MockTransport(script), **options or {}) as client:
            client._connection = replace(client._connection, clock=lambda: script.now, uniform=script.uniform)
            client._sleep = script.sleep
            return getattr(client, method)(*args, **kwargs)

    def ask_async(script: Script, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient("http://server", transport=httpx.MockTransport(script), **options or {}) as client:
                client._connection = replace(client._connection, clock=lambda: script.now, uniform=script.uniform)
                client._sleep = script.sleep_async
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(run())

    return ask_sync if request.param == "Client" else ask_async


# method, arguments, HTTP method, path, body, answer
CALLS: list[tuple[str, tuple[Any, ...], str, str, Any, Any]] = [
    ("classify", ("x", "a"), "POST", "/v1/classify", {"input": "x", "classifiers": ["a"]}, RESULT),
    ("feedback", ("v", "yes"), "POST", "/v1/feedback", {"verdict_id": "v", "label": "yes"}, {"num_answers": 2}),
    (
        "feedback_on_request",
        ("r", "yes", "a"),
        "POST",
        "/v1/feedback",
        {"request_id": "r", "classifier": "a", "label": "yes"},
        {"num_answers": 2},
    ),
    ("models", (), "GET", "/v1/models", None, {"data": [{"id": "base"}, {"id": "a", "parent": "base"}]}),
    ("adapters", (), "GET", "/v1/adapters", None, {"adapters": [ADAPTER]}),
    ("skipped", (), "GET", "/v1/adapters", None, {"adapters": [], "skipped": [{"path": "/b/.a", "reason": "hidden"}]}),
    ("adapter", ("a/b ü",), "GET", "/v1/adapters/a%2Fb%20%C3%BC", None, ADAPTER),
    ("load_adapter", ("a", "s3://x"), "PUT", "/v1/adapters/a", {"source": "s3://x", "pinned": None}, ADAPTER),
    ("unload_adapter", ("a",), "DELETE", "/v1/adapters/a", None, {"name": "a", "state": "unloaded"}),
    ("pin_adapter", ("a",), "PUT", "/v1/adapters/a/pin", None, ADAPTER),
    ("pin_adapter", ("a", False), "DELETE", "/v1/adapters/a/pin", None, ADAPTER),
    ("routes", (), "GET", "/v1/routes", None, {"routes": [ROUTE]}),
    ("route", ("r",), "GET", "/v1/routes/r", None, ROUTE),
    ("set_route", ("r", {"a": 1}, ["b"]), "PUT", "/v1/routes/r", {"targets": {"a": 1}, "shadows": ["b"]}, ROUTE),
    ("delete_route", ("r",), "DELETE", "/v1/routes/r", None, {"name": "r", "state": "deleted"}),
    ("rollback_route", ("r",), "POST", "/v1/routes/r/rollback", None, ROUTE),
    ("route_stats", ("r",), "GET", "/v1/routes/r/stats", None, STATS),
    ("examples", ("r",), "POST", "/v1/examples", {"classifiers": ["r"], "only": "corrected"}, EXAMPLES),
    ("ready", (), "GET", "/ready", None, {"status": "ok"}),
    (
        "decide",
        ("x", {"a": Question(type="predicate", instructions="Is it?", descriptions={"yes": "done"})}, "m"),
        "POST",
        "/v1/decisions",
        {
            "model": "m",
            "input": "x",
            "questions": [
                {
                    "type": "predicate",
                    "name": "a",
                    "instructions": "Is it?",
                    "x_labels": ["yes", "no"],
                    "x_criteria": {"true": "done", "false": None},
                }
            ],
        },
        {
            "answers": [{"type": "predicate", "name": "a", "x_scores": {"yes": 0.5, "no": 0.5}}],
            "usage": {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 1}},
        },
    ),
]
# They change nothing.
SAFE = {"classify", "decide", "models", "adapters", "skipped", "adapter", "routes", "route", "route_stats", "examples"}


@pytest.mark.parametrize(("method", "args", "verb", "path", "body", "answer"), CALLS)
def test_what_is_sent_and_what_comes_back(
    ask: Ask, method: str, args: tuple[Any, ...], verb: str, path: str, body: Any, answer: Any
) -> None:
    script = Script([httpx.Response(OK, json=answer)])
    result = ask(script, method, *args, options={"api_key": "secret"})
    [request] = script.requests
    assert (request.method, request.url.raw_path.decode(), script.bodies()) == (verb, path, [body])
    assert request.headers["Authorization"] == "Bearer secret"
    expected: dict[str, Any] = {
        "feedback": 2,
        "feedback_on_request": 2,
        "ready": True,
        "unload_adapter": None,
        "delete_route": None,
    }
    if method in expected:
        assert result == expected[method]
    else:
        first = result[0] if isinstance(result, tuple) else result
        assert type(first).__module__ in ("loraplex.types", "loraplex.discovery", "loraplex.decisions")


def test_every_method_is_in_the_table_and_both_clients_have_the_same() -> None:
    def public(kind: type) -> dict[str, inspect.Signature]:
        return {
            name: inspect.signature(one)
            for name, one in vars(kind).items()
            if inspect.isfunction(one) and not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)
    assert public(Client).keys() - {one[0] for one in CALLS} == {"classify_many", "wait_until_ready", "close"}


def test_answers_are_typed(ask: Ask) -> None:
    result = ask(Script([httpx.Response(OK, json=RESULT)]), "classify", "x")
    assert isinstance(result, ClassifyResult) and result["a"].scores == {"yes": 0.75, "no": 0.25}
    stats = ask(Script([httpx.Response(OK, json=STATS)]), "route_stats", "r").targets[0]
    assert (stats.latency_ms.p99, stats.accuracy.low, stats.agreement) == (2.0, 0.1, None)
    page = ask(Script([httpx.Response(OK, json=EXAMPLES)]), "examples", since_s=60, is_corrected=False, after="0.0")
    assert page.after == "1.2" and page.examples[1].input == ({"role": "user", "content": "hi"},)
    base, adapter = ask(Script([httpx.Response(OK, json=CALLS[3][5])]), "models")
    assert (base.id, base.parent, adapter.parent) == ("base", None, "base")


def test_a_newer_or_older_server_is_understood(ask: Ask) -> None:
    newer = json.loads(json.dumps(RESULT).replace('"usage": {', '"new": 1, "usage": {"new": {}, '))
    newer["verdicts"][0]["new"] = newer["timings"]["new"] = [1]
    assert ask(Script([httpx.Response(OK, json=newer)]), "classify", "x")["a"].label == "yes"
    older = {"id": "x", "verdicts": [{"classifier": "a"}], "usage": {}, "timings": {}}
    assert ask(Script([httpx.Response(OK, json=older)]), "classify", "x")["a"].label is None
    assert ask(Script([httpx.Response(OK, json={"name": "a", "path": "p"})]), "adapter", "a").rank is None
    assert ask(Script([httpx.Response(OK, json={"name": "r", "targets": {"a": 1}})]), "route", "r").shadows == ()
    bare = {"name": "r", "targets": [{"target": "a"}]}
    assert ask(Script([httpx.Response(OK, json=bare)]), "route_stats", "r").targets[0].label_shares == {}


def test_messages_are_objects_or_mappings(ask: Ask) -> None:
    script = Script([httpx.Response(OK, json=RESULT)])
    turns = (one for one in [Message(role="user", content="hi"), {"role": "assistant", "content": "hé", "name": "x"}])
    ask(script, "classify", turns, ["a", "b"], conversation_id="c", deadline_ms=5)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé", "name": "x"}]
    assert script.bodies() == [{"input": messages, "classifiers": ["a", "b"], "conversation_id": "c", "deadline_ms": 5}]


@pytest.mark.parametrize(
    "input",
    [
        None,
        5,
        [5],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        b"bytes",
        {"role": "user", "content": "x"},
        "\ud800",
    ],
)
def test_what_no_request_can_say_is_not_sent(ask: Ask, input: Any) -> None:
    script = Script([httpx.Response(OK, json=RESULT)])
    with pytest.raises(InvalidRequestError):
        ask(script, "classify", input)
    with pytest.raises(InvalidRequestError):
        ask(script, "set_route", "r", {"a": math.nan})
    assert not script.requests


# ------------------------------------------------------------------------------------------- retries

REQUEST = httpx.Request("GET", "http://server")
EVERY = {one[0] for one in CALLS} - {"ready"}
POLICY: list[tuple[Step, set[str]]] = [
    (httpx.ConnectError("refused"), EVERY),
    (httpx.ConnectTimeout("late"), EVERY),
    (error(429, "queue_full"), EVERY),
    (error(503, "not_ready"), EVERY - {"rollback_route"}),
    (httpx.Response(503, html="<p>busy"), EVERY - {"rollback_route"}),
    (httpx.ReadTimeout("late"), SAFE),
    (httpx.WriteTimeout("late"), SAFE),
    (httpx.ReadError("reset"), SAFE),
    (httpx.RemoteProtocolError("disconnected"), SAFE),
    (httpx.Response(502, html="<p>gone"), SAFE),
    (error(500), set()),
    (error(504, "deadline_exceeded"), set()),
    (httpx.Response(504, html="<p>late"), set()),
    *[(error(status), set[str]()) for status in (400, 401, 403, 404, 408, 409, 413, 422, 499)],
    (httpx.LocalProtocolError("bad header"), set()),
    (httpx.UnsupportedProtocol("no"), set()),
    (httpx.Response(307, headers={"Location": "/elsewhere"}), set()),
    (httpx.Response(OK, html="<p>hello"), set()),
]


@pytest.mark.parametrize(("method", "args", "answer"), [(one[0], one[1], one[5]) for one in CALLS if one[0] != "ready"])
def test_only_what_is_safe_is_sent_again(ask: Ask, method: str, args: tuple[Any, ...], answer: Any) -> None:
    for step, again in POLICY:
        script = Script([step, httpx.Response(OK, json=answer)])
        if method in again:
            ask(script, method, *args)
            assert len(script.requests) == 2, f"{method} was not sent again after {step}"
            assert script.bodies()[0] == script.bodies()[1]
        else:
            with pytest.raises(LoraplexError):
                ask(script, method, *args)
            assert len(script.requests) == 1, f"{method} was sent again after {step}"


def test_waits_double_are_random_and_end(ask: Ask) -> None:
    script = Script([error(503, "not_ready")])
    with pytest.raises(NotReadyError):
        ask(script, "adapters", options={"max_retries": 1200})
    assert len(script.requests) == 1201
    assert script.sleeps == [0.5, 1, 2, 4] + [8] * 1196
    assert script.jitters == [(0, high) for high in script.sleeps]
    script = Script([error(503, "not_ready")])
    with pytest.raises(NotReadyError):
        ask(script, "adapters", options={"max_retries": 0})
    assert len(script.requests) == 1 and not script.sleeps


@pytest.mark.parametrize(
    ("header", "least"), [("3", 3), ("0.25", 0.25), ("100000", 30), ("inf", 30), ("nan", 0), ("-5", 0), ("soon", 0)]
)
def test_retry_after_comes_on_top_and_is_capped(ask: Ask, header: str, least: float) -> None:
    script = Script([error(429, "queue_full", retry_after=header), httpx.Response(OK, json=RESULT)])
    ask(script, "classify", "x")
    assert script.sleeps == [least + 0.5]


def test_an_overload_says_when_to_come_back(ask: Ask) -> None:
    with pytest.raises(QueueFullError) as caught:
        ask(Script([error(429, "queue_full", retry_after="7")]), "classify", "x")
    assert (caught.value.retry_after_s, caught.value.status) == (7, 429)
    with pytest.raises(QueueFullError) as caught:
        ask(Script([error(429, "queue_full")]), "classify", "x")
    assert caught.value.retry_after_s == 1


def test_the_deadline_is_for_all_attempts_together(ask: Ask) -> None:
    script = Script([error(503, "not_ready")], seconds=0.25)
    with pytest.raises(NotReadyError):
        ask(script, "classify", "x", deadline_ms=2000, options={"max_retries": 9})
    # sent at 0 and 0.75; at 2.0 it would be too late
    assert [body["deadline_ms"] for body in script.bodies()] == [2000, 1250]
    assert script.sleeps == [0.5]


def test_a_server_that_hangs_beyond_the_deadline_is_not_waited_for(ask: Ask) -> None:
    script = Script([httpx.ReadTimeout("")], seconds=7)
    with pytest.raises(DeadlineExceededError, match="2000 ms"):
        ask(script, "classify", "x", deadline_ms=2000)
    [request] = script.requests
    assert request.extensions["timeout"]["read"] == 7  # the server's own answer gets 5 s to arrive
    with pytest.raises(ServerError) as caught:
        ask(
            Script([httpx.ReadTimeout("")], seconds=30),
            "classify",
            "x",
            deadline_ms=200_000,
            options={"max_retries": 0},
        )
    assert caught.value.code == "unreachable" and "ReadTimeout" in caught.value.message


@pytest.mark.parametrize(
    ("method", "args", "timeout", "read", "connect"),
    [
        ("classify", ("x",), 30.0, 30, 10),
        ("classify", ("x",), 3.0, 3, 3),
        ("classify", ("x",), None, None, 10),
        ("load_adapter", ("a", "x"), 30.0, None, 10),
        ("unload_adapter", ("a",), 30.0, None, 10),
        ("pin_adapter", ("a",), 3.0, None, 10),
        ("ready", (), 30.0, 5, 5),
    ],
)
def test_timeouts(
    ask: Ask, method: str, args: tuple[str, ...], timeout: float | None, read: float | None, connect: float
) -> None:
    [answer] = {one[0]: one[5] for one in CALLS if one[0] == method}.values()
    script = Script([httpx.Response(OK, json=answer)])
    ask(script, method, *args, options={"timeout": timeout})
    limits = script.requests[0].extensions["timeout"]
    assert (limits["read"], limits["write"], limits["connect"]) == (read, read, connect)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("code", errors.BY_CODE)
def test_an_error_is_of_the_class_that_has_its_code(ask: Ask, code: str) -> None:
    with pytest.raises(LoraplexError) as caught:
        ask(Script([error(422, code)]), "adapters")
    assert type(caught.value) is errors.BY_CODE[code]
    assert (caught.value.code, caught.value.message, caught.value.remedy) == (code, "what", "how")
    assert caught.value.status == 422 and str(caught.value) == "what (how)"
    assert ErrorInfo.of(caught.value) == ErrorInfo(code=code, message="what", remedy="how")


def test_every_class_with_a_code_of_its_own_is_known() -> None:
    documented = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    defined = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, LoraplexError)}
    assert documented == defined - {"LoraplexError"}
    without = {"OverloadedError", "RefusedError", "ServerError", "LoraplexError"}
    assert {one.__name__ for one in errors.BY_CODE.values()} == defined - without


def test_a_code_from_the_future_is_a_server_error(ask: Ask) -> None:
    with pytest.raises(ServerError) as caught:
        ask(Script([error(418, "teapot")]), "adapters")
    assert (caught.value.code, caught.value.status, caught.value.remedy) == ("teapot", 418, "how")


def test_an_adapter_that_is_not_sound_is_what_it_is_in_process(ask: Ask) -> None:
    with pytest.raises(AdapterError) as caught:
        ask(Script([error(422, "adapter_error")]), "load_adapter", "a", "x")
    assert isinstance(caught.value, ConfigurationError) and caught.value.source == ""


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, html="<p>no such page"),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(404, json={"error": "text"}),
        httpx.Response(500),
        httpx.Response(302, headers={"Location": "https://login"}),
        httpx.Response(OK, html="<p>welcome"),
        httpx.Response(OK, json={"id": "x"}),
        httpx.Response(OK, json=[]),
        httpx.Response(204),
    ],
)
def test_what_is_not_ours_says_so(ask: Ask, answer: httpx.Response) -> None:
    with pytest.raises(ServerError, match="http://server answers") as caught:
        ask(Script([answer]), "classify", "x")
    assert (caught.value.code, caught.value.status) == ("not_loraplex", answer.status_code)


def test_no_answer_is_unreachable(ask: Ask) -> None:
    with pytest.raises(ServerError, match="http://server does not answer: refused") as caught:
        ask(Script([httpx.ConnectError("refused")]), "classify", "x")
    assert (caught.value.code, caught.value.status) == ("unreachable", 0)
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


# ------------------------------------------------------------------------------------------- connection


def test_url_and_key_come_from_the_environment_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPLEX_URL", raising=False)
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)
    connection = Connection.to(None, None, 1, 1)
    assert (connection.url, connection.api_key) == ("http://127.0.0.1:8000", None)
    assert "Authorization" not in connection.options()["headers"]
    monkeypatch.setenv("LORAPLEX_URL", "https://there/prefix/")
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret\n")
    connection = Connection.to(None, None, 1, 1)
    assert (connection.url, connection.api_key) == ("https://there/prefix", "secret")
    assert "secret" not in repr(connection)
    connection = Connection.to("http://here", "other", 1, 1)
    assert (connection.url, connection.api_key) == ("http://here", "other")


@pytest.mark.parametrize(
    "url", ["server:8000", "127.0.0.1:8000", "ftp://x", "http://", "http://[::1", "x", "http://h:x"]
)
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(url)):
        Client(url)


@pytest.mark.parametrize("key", ["schlüssel", "a\nb", "a\x00b"])
def test_what_is_no_key_is_refused_at_once_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Client(api_key=key)
    assert key not in str(caught.value)


def test_a_path_before_the_api_is_kept() -> None:
    script = Script([httpx.Response(OK, json=RESULT)])
    with Client("http://proxy/loraplex/", transport=httpx.MockTransport(script)) as client:
        client.classify("x")
    assert script.requests[0].url == "http://proxy/loraplex/v1/classify"


def test_ready_never_raises_and_asks_once(ask: Ask) -> None:
    for step in (error(503, "not_ready"), httpx.ConnectError("no"), httpx.Response(502), httpx.ReadTimeout("late")):
        script = Script([step])
        assert ask(script, "ready") is False
        assert len(script.requests) == 1


def test_waiting_until_ready(ask: Ask) -> None:
    script = Script([httpx.ConnectError("no"), error(503, "not_ready"), httpx.Response(OK, json={"status": "ok"})])
    ask(script, "wait_until_ready", 10)
    assert len(script.requests) == 3
    script = Script([httpx.ConnectError("no"), error(503, "not_ready")])
    with pytest.raises(NotReadyError):
        ask(script, "wait_until_ready", 1)
    assert 1 <= script.now < 1.5


def test_no_model_and_no_server_is_imported() -> None:
    code = (
        "import sys, loraplex; from loraplex import AsyncClient, Client; import loraplex.client.many;"
        "print([one for one in ('torch', 'transformers', 'fastapi', 'starlette', 'uvicorn') if one in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_only_what_is_needed_is_imported_with_the_package() -> None:
    code = "import sys, loraplex; print([one for one in ('torch', 'httpx', 'pydantic', 'typer') if one in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert {"Client", "AsyncClient", "Loraplex"} <= set(loraplex.__all__)
