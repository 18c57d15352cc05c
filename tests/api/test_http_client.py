"""`Client` and `AsyncClient` against a real server."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import serving
import tiny
from loraplex import AsyncClient, Client, Message
from loraplex.cli.main import app
from loraplex.client import exchange
from loraplex.errors import (
    AdapterError,
    AdapterInUseError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    LoraplexError,
    ServerError,
    UnauthorizedError,
    UnknownClassifierError,
    UnknownRouteError,
    UnknownVerdictError,
)
from loraplex.types import ClassifyResult, Route

ADMIN, INFER = "a-secret-for-admins", "a-secret-for-clients"
NAMES = ["task0", "task1", "task2", "verbatim"]
TEXT = "Customer: hello\nAgent: at what time?"
TEXTS = [f"Customer: hello {'and again ' * (index % 5)} {index}" for index in range(24)]


@pytest.fixture
def client(tiny_server: serving.Server) -> Iterator[Client]:
    with Client(tiny_server.url) as client:
        yield client


def labels(result: ClassifyResult | LoraplexError) -> dict[str, object]:
    assert isinstance(result, ClassifyResult), result
    return {verdict.classifier: verdict.label for verdict in result.verdicts}


def test_results_are_what_http_answers(client: Client, http: httpx.Client) -> None:
    result = client.classify(TEXT)
    answer = http.post("/v1/classify", json={"input": TEXT}).json()
    assert [verdict.classifier for verdict in result.verdicts] == NAMES
    for verdict, expected in zip(result.verdicts, answer["verdicts"], strict=True):
        assert (verdict.label, verdict.confidence) == (expected["label"], expected["confidence"])
        assert verdict.adapter is not None and verdict.adapter.version == expected["adapter"]["version"]
    assert result.usage.prompt_tokens == answer["usage"]["prompt_tokens"] and result.timings.total_ms > 0
    question: Mapping[str, str] = {"role": "assistant", "content": "at what time?"}
    turns = (Message(role="user", content="hello"), question)
    assert labels(client.classify(turns, ["task1", "task0"], conversation_id="c")) == {
        name: result[name].label for name in ("task1", "task0")
    }


def test_errors_are_typed(client: Client) -> None:
    with pytest.raises(UnknownClassifierError, match="'nope'") as caught:
        client.classify(TEXT, "nope")
    assert caught.value.status == 404 and "task0" in caught.value.remedy
    with pytest.raises(InvalidRequestError, match="empty"):
        client.classify("")
    with pytest.raises(InvalidRequestError):
        client.classify([{"role": "robot", "content": "x"}])
    with pytest.raises(DeadlineExceededError):
        client.classify(TEXT, deadline_ms=0.0001)
    with pytest.raises(UnknownClassifierError):
        client.adapter("b ü?#%")
    unknown = client.classify(TEXT, ["task0", "nope"])["nope"]
    assert unknown.error is not None and unknown.error.code == "unknown_classifier"


def test_many_equal_one_by_one_in_order(client: Client, tiny_server: serving.Server) -> None:
    alone = [labels(client.classify(text)) for text in TEXTS]
    assert [labels(one) for one in client.classify_many(iter(TEXTS), concurrency=6, progress=True)] == alone

    async def together() -> list[ClassifyResult]:
        async with AsyncClient(tiny_server.url) as client:
            return await client.classify_many(iter(TEXTS), concurrency=6)

    assert [labels(one) for one in asyncio.run(together())] == alone


def test_an_error_among_many(client: Client) -> None:
    results = client.classify_many([*TEXTS[:3], "", *TEXTS[3:6]], "task0", concurrency=3, on_error="return")
    assert isinstance(results.pop(3), InvalidRequestError)
    assert [labels(one) for one in results] == [labels(client.classify(text, "task0")) for text in TEXTS[:6]]
    with pytest.raises(InvalidRequestError, match="empty"):
        client.classify_many([*TEXTS, ""], "task0")


@pytest.fixture(scope="module")
def own(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """With keys, and to be changed."""
    root = tmp_path_factory.getbasetemp()
    keys = f"ops:admin:{ADMIN},ci:infer:{INFER}"
    with serving.serve(tiny_bundle, "--dtype", "float32", "--adapter-root", root, LORAPLEX_API_KEYS=keys) as server:
        yield server


@pytest.fixture
def admin(own: serving.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Key and URL are in the environment, for the command line, too."""
    monkeypatch.setenv("LORAPLEX_URL", own.url)
    monkeypatch.setenv("LORAPLEX_API_KEY", ADMIN)
    with Client() as client:
        yield client


def test_keys(own: serving.Server) -> None:
    with Client(own.url) as nobody:
        nobody.wait_until_ready(1)
        with pytest.raises(UnauthorizedError) as caught:
            nobody.classify(TEXT)
        assert caught.value.status == 401
    with Client(own.url, api_key=INFER) as client:
        assert client.classify(TEXT).verdicts
        with pytest.raises(ForbiddenError):
            client.unload_adapter("task0")


def test_adapters_and_models(admin: Client, tiny_bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "late"
    tiny.save_adapter(tiny_bundle, place, contract=tiny.CONTRACT, seed=77)
    assert [one.name for one in admin.adapters()] == NAMES
    loaded = admin.load_adapter("late", place, pin=True)
    assert (loaded.name, loaded.state, loaded.pinned, loaded.labels) == ("late", "ready", True, ("yes", "no"))
    assert admin.adapter("late") == loaded
    assert admin.classify(TEXT, "late")["late"].adapter is not None
    assert admin.pin_adapter("late", False).pinned is False
    base, *models = admin.models()
    assert (base.parent, {one.parent for one in models}) == (None, {base.id})
    assert "late" in [one.id for one in models]
    admin.unload_adapter("late")
    with pytest.raises(UnknownClassifierError):
        admin.unload_adapter("late")
    (place / "adapter_model.safetensors").write_bytes(b"broken")
    for source in (place, "/nowhere"):
        with pytest.raises(AdapterError) as caught:
            admin.load_adapter("late", source)
        assert caught.value.status == 422 and caught.value.remedy


def test_routes_and_feedback(admin: Client) -> None:
    assert admin.routes() == ()
    with pytest.raises(UnknownRouteError):
        admin.route("done")
    with pytest.raises(UnknownClassifierError):
        admin.set_route("done", {"nope": 1})
    with pytest.raises(InvalidRequestError):
        admin.set_route("done", {"task0": -1})
    first = admin.set_route("done", {"task0": 3, "task1": 1}, ["task2"])
    assert first == Route(name="done", targets={"task0": 3, "task1": 1}, shadows=("task2",), revision=first.revision)
    assert admin.route("done") == first and admin.routes() == (first,)
    with pytest.raises(AdapterInUseError):
        admin.unload_adapter("task0")
    changed = admin.set_route("done", {"task0": 1})
    assert changed.revision > first.revision and changed.shadows == ()
    assert admin.rollback_route("done").targets == first.targets

    results = admin.classify_many(((f"c{index}", text) for index, text in enumerate(TEXTS)), "done")
    verdict = results[0]["done"]
    assert verdict.id is not None and verdict.label is not None
    assert admin.feedback(verdict.id, verdict.label) >= 1
    with pytest.raises(UnknownVerdictError):
        admin.feedback("nope", "yes")
    with pytest.raises(InvalidRequestError):
        admin.feedback(verdict.id, "perhaps")
    stats = admin.route_stats("done")
    primaries = [one for one in stats.targets if one.role == "primary" and one.target in first.targets]
    assert sum(one.num_verdicts for one in primaries) >= len(TEXTS)
    [judged] = [one for one in primaries if one.accuracy is not None]
    assert judged.accuracy is not None and (judged.accuracy.num_labelled, judged.accuracy.share) == (1, 1)
    assert judged.latency_ms is not None and judged.latency_ms.p50 <= judged.latency_ms.p99

    admin.delete_route("done")
    with pytest.raises(UnknownRouteError):
        admin.delete_route("done")


def test_the_command_line_for_routes(admin: Client) -> None:
    def run(*arguments: str) -> str:
        ran = CliRunner().invoke(app, ["routes", *arguments])
        assert ran.exit_code == 0, ran.stderr
        return ran.stdout

    made = json.loads(run("set", "cli", "task0=90", "task1", "--shadow", "task2", "--json"))
    assert (made["targets"], made["shadows"]) == ({"task0": 90, "task1": 1}, ["task2"])
    assert json.loads(run("list", "--json")) == [made]
    assert json.loads(run("show", "cli", "--json")) == made
    assert "task0 98.9 %, task1 1.099 %" in run("list")
    verdict = admin.classify(TEXT, "cli", conversation_id="c")["cli"]
    assert verdict.id is not None and verdict.label is not None and verdict.adapter is not None
    judged = json.loads(run("feedback", verdict.id, verdict.label, "--json"))
    assert judged["verdict_id"] == verdict.id and judged["num_answers"] >= 1
    asked = httpx.post(
        f"{os.environ['LORAPLEX_URL']}/v1/classify",
        json={"input": TEXT, "classifiers": ["task0"]},
        headers={"X-API-Key": ADMIN, "X-Request-ID": "turn-7"},
    )
    request = asked.headers["X-Request-ID"]
    judged = json.loads(run("feedback", request, "yes", "--request", "--classifier", "task0", "--json"))
    assert judged == {"request_id": request, "num_answers": 1}
    assert "100.0% (" in run("stats", "cli")
    assert verdict.adapter.name in [one["target"] for one in json.loads(run("stats", "cli", "--json"))["targets"]]
    assert "revision" in run("set", "cli", "task1")
    assert json.loads(run("rollback", "cli", "--json"))["targets"] == made["targets"]
    run("delete", "cli")
    gone = serving.loraplex("routes", "show", "cli")
    assert gone.returncode == 1 and "unknown_route" in gone.stderr and "remedy" in gone.stderr


@pytest.mark.parametrize("targets", [["task0=x"], ["=1"], ["task0=-1"], ["task0=nan"], ["task0", "task0=2"], []])
def test_wrong_targets_are_wrong_usage(targets: list[str]) -> None:
    ran = CliRunner().invoke(app, ["routes", "set", "cli", *targets])
    assert ran.exit_code == 2 and "TARGET" in ran.output


@pytest.mark.slow
def test_a_server_that_dies_in_mid_run_and_comes_back(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MOST_BACKOFF_S", 0.5)
    with (
        serving.serve(tiny_bundle, "--dtype", "float32") as server,
        Client(server.url, max_retries=0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        num_read = 0

        def texts() -> Iterator[str]:
            nonlocal num_read
            for num_read in range(10_000):
                yield f"Customer: hello {num_read}"

        run = pool.submit(client.classify_many, texts(), concurrency=4)
        while num_read < 20:
            time.sleep(0.001)
        server.process.send_signal(signal.SIGKILL)
        with pytest.raises(ServerError) as caught:
            run.result(30)
        assert caught.value.code == "unreachable" and num_read < 10_000
        results = client.classify_many(["x", "y"], on_error="return")
        assert [type(one) for one in results] == [ServerError] * 2
        assert client.ready() is False

        with Client(server.url, max_retries=500) as patient:
            late = pool.submit(patient.classify, TEXT)
            port = server.url.rpartition(":")[2]
            again = subprocess.Popen(
                [sys.executable, "-m", "loraplex.cli.main", "serve", str(tiny_bundle), "--port", port],
                stdout=subprocess.DEVNULL,
            )
            try:
                client.wait_until_ready(60)
                assert list(labels(late.result(60))) == NAMES
            finally:
                again.terminate()
                again.wait(30)


def test_ctrl_c_ends_a_script_though_the_server_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and answers nothing
        code = (
            "import loraplex\n"
            f"with loraplex.Client('http://127.0.0.1:{silent.getsockname()[1]}', timeout=60) as client:\n"
            "    def texts():\n"
            "        yield from ['x', 'y']\n"
            "        print('busy', flush=True)\n"
            "        yield 'z'\n"
            "    client.classify_many(texts(), concurrency=3, progress=True)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == b"busy\n"
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) != 0
            assert process.stderr.read().rstrip().endswith(b"KeyboardInterrupt")


def test_a_call_that_is_cancelled_frees_the_server(tiny_server: serving.Server, client: Client) -> None:
    async def leave() -> None:
        async with AsyncClient(tiny_server.url) as client:
            await asyncio.wait_for(client.classify_many(TEXTS * 100, concurrency=20), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert list(labels(client.classify(TEXT))) == NAMES


def test_threads_share_a_client(client: Client) -> None:
    expected, seen = [labels(client.classify(text)) for text in TEXTS], threading.Barrier(8)

    def one(text: str) -> dict[str, object]:
        if text in TEXTS[:8]:
            seen.wait(10)
        return labels(client.classify(text))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, TEXTS)) == expected


def test_json_of_the_command_line_is_the_apis(tiny_server: serving.Server, http: httpx.Client) -> None:
    run = serving.loraplex("adapters", "list", "--json", "--url", tiny_server.url)
    assert json.loads(run.stdout) == http.get("/v1/adapters").json()["adapters"]
    run = serving.loraplex("adapters", "show", "task0", "--json", "--url", tiny_server.url)
    assert json.loads(run.stdout) == http.get("/v1/adapters/task0").json()
