"""SageMaker's handlers without its toolkit: they answer as the server does. With the toolkit: tests/clients."""

import json
import logging
import re
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving
import tiny
from loraplex.errors import ConfigurationError, InvalidRequestError, LoraplexError, UnknownClassifierError
from loraplex.sagemaker import handlers, inference
from loraplex.sagemaker.handlers import Model, Unloaded, input_fn, model_fn, output_fn, predict_fn

pytestmark = pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")

TEXT = "Customer: hello, is my payment done?"
ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"
ARTICLE = {"input_text": TEXT, "adapter_name": "task1"}
LINES = "application/jsonlines"
PASSING = {"id", "created", "timings", "usage"}  # of no two answers the same
Load = Callable[..., Model]


class Context:
    """As model servers make it for a request."""

    def __init__(self, **headers: str) -> None:
        self.headers, self.status = headers, 0
        self.answered: dict[str, str] = {}

    def get_all_request_header(self, index: int) -> dict[str, Any]:
        return {"body": {"content-type": "application/json"}, **self.headers}  # as AWS's has it

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        assert phrase
        self.status = code

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.answered[key] = value


@pytest.fixture
def load(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads the tiny bundle with variables of the environment, given without LORAPLEX_."""
    loaded = []

    def load(**variables: str) -> Model:
        for name, value in {"dtype": "float32", **variables}.items():
            monkeypatch.setenv(f"LORAPLEX_{name.upper()}", value)
        model = model_fn(str(tiny_bundle))
        assert isinstance(model, Model)
        loaded.append(model)
        return model

    yield load
    for model in loaded:
        model.loraplex.close()


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[Model]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_DTYPE", "float32")
        model = model_fn(tiny_bundle)
    assert isinstance(model, Model)
    with model.loraplex:
        yield model


def lasting(answer: Any) -> Any:
    """The answer without what differs each time."""
    if isinstance(answer, dict):
        return {name: lasting(one) for name, one in answer.items() if name not in PASSING}
    return [lasting(one) for one in answer] if isinstance(answer, list) else answer


def near(answer: Any) -> Any:
    """The same with numbers that may differ in their last bits."""
    if isinstance(answer, dict):
        return {name: near(one) for name, one in answer.items()}
    if isinstance(answer, list):
        return [near(one) for one in answer]
    return pytest.approx(answer, abs=1e-5) if isinstance(answer, float) else answer


def check(answer: Any, expected: Any) -> None:
    assert lasting(answer) == near(lasting(expected))


def name_of(parameter: Any) -> str:
    return str(parameter)[:60]


# ------------------------------------------------------------------------------------------- answers


def test_the_articles_way(model: Model, http: httpx.Client) -> None:
    inputs = input_fn(json.dumps(ARTICLE), "application/json")
    assert inputs == ARTICLE
    output = predict_fn(inputs, model)
    [answer] = output
    assert list(answer) == ["confidence_score", "predicted_text"] and answer["predicted_text"] in ("yes", "no")
    check(output, http.post("/invocations", json=ARTICLE).json())
    assert output_fn(output, "application/json") == json.dumps(output)


def test_an_artifacts_entry_point_has_the_four_handlers() -> None:
    assert [getattr(inference, name) for name in ("model_fn", "input_fn", "predict_fn", "output_fn")] == [
        model_fn,
        input_fn,
        predict_fn,
        output_fn,
    ]


@pytest.mark.parametrize(
    "body",
    [
        ARTICLE,
        {"input_text": TEXT},
        {**ARTICLE, "raw": True},
        {"input_text": "é 💬 \ud800"},
        {"input": TEXT, "classifiers": "*"},
        {"inputs": [TEXT, "hello"], "classifiers": ["task0", "nope"]},
        {"inputs": TEXT, "parameters": {"adapter_id": "task0", "top_k": None}},
        {"prompt": TEXT, "model": "task1", "max_tokens": 3, "temperature": 0, "logprobs": 2},
        {"model": "task0", "input": TEXT},
        {"model": "nope", "prompt": TEXT},
        {"input_text": TEXT, "adapter_name": "nope"},
        {"input_text": "", "extra": 1},
        {"input": TEXT, "classifiers": "*", "deadline_ms": -1},
        [1],
        "text",
        {"input_text": "x" * 3_000_000},
        {"messages": [{"role": "user", "content": TEXT}]},
    ],
    ids=name_of,
)
def test_answers_and_errors_are_the_servers(model: Model, http: httpx.Client, body: Any) -> None:
    content, context = json.dumps(body).encode(), Context()
    expected = http.post("/invocations", content=content, headers={"Content-Type": "application/json"})
    inputs = input_fn(bytearray(content), "application/json", context)
    check(predict_fn(inputs, model, context), expected.json())
    assert context.status == expected.status_code
    if expected.is_success:
        check(predict_fn(body, model), expected.json())
    else:
        with pytest.raises(LoraplexError) as caught:
            predict_fn(body, model)
        error = {"code": caught.value.code, "message": caught.value.message, "remedy": caught.value.remedy}
        assert (caught.value.status, {"error": error}) == (expected.status_code, expected.json())


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b'{"input_text": NaN}', "application/json"),
        (b'{"input_text": "a", "input_text": "b"}', "application/json"),
        (b"\xff", "application/json"),
        (b"hello", "text/plain"),
        (b'{"input_text": "hello"}', "application/x-www-form-urlencoded"),
        (b'{"input_text": "hello"}', "application/octet-stream"),
        (b'{"input_text": "hello"}', None),
        (json.dumps({"input_text": TEXT}).encode("utf-16"), "application/json; charset=utf-16"),
        (b"", "text/csv"),
        (b'"', "text/csv"),
        (b"a,b\n", "text/csv"),
        (b"hello\nCustomer: thanks\n", "text/csv"),
        (b'{"input_text": "hello"}\n{"input_text": "hello", "adapter_name": "nope"}\n[1]\n', LINES),
    ],
    ids=name_of,
)
def test_other_bodies_too(model: Model, http: httpx.Client, content: bytes, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    expected, context = http.post("/invocations", content=content, headers=headers), Context()
    answer = output_fn(predict_fn(input_fn(content, kind, context), model, context), "application/json", context)
    assert context.status == expected.status_code
    lines = answer.decode() if isinstance(answer, bytes) else answer
    for one, other in zip(lines.splitlines(), expected.text.splitlines(), strict=True):
        check(json.loads(one), json.loads(other))


def test_headers_are_passed_on(model: Model, http: httpx.Client) -> None:
    headers = {ADAPTER: "task0", "Accept": "text/csv"}
    expected = http.post("/invocations", content="inputs\nhello\n", headers={**headers, "Content-Type": "text/csv"})
    context = Context(**headers, **{"Content-Length": "1", "Host": "elsewhere", "Origin": "https://elsewhere"})
    answer = predict_fn(input_fn("inputs\nhello\n", "text/csv", context), model, context)
    assert output_fn(answer, "text/csv", context) == answer
    rows = [line.split(",") for line in answer.decode().splitlines()]
    assert rows[0] == ["label", "score", "error"]
    [label, score, error] = expected.text.splitlines()[1].split(",")
    assert rows[1] == [label, rows[1][1], error] and float(rows[1][1]) == pytest.approx(float(score), abs=1e-5)


def test_headers_of_the_answer_are_passed_on(model: Model) -> None:
    context = Context(**{"X-Amzn-SageMaker-Session-Id": "NEW_SESSION", "X-Request-ID": "turn-7"})
    predict_fn({"input_text": TEXT, "adapter_name": "task0"}, model, context)
    assert "; Expires=" in context.answered["x-amzn-sagemaker-new-session-id"]
    assert context.answered["x-request-id"] == "turn-7"


def test_errors_are_raised_without_a_model_server(model: Model) -> None:
    with pytest.raises(UnknownClassifierError, match="no classifier named 'nope'"):
        predict_fn({"input_text": TEXT, "adapter_name": "nope"}, model)
    endless: list[Any] = []
    endless.append(endless)
    for inputs in ({1, 2}, object(), endless, {"input_text": b"bytes"}):
        with pytest.raises(InvalidRequestError, match="cannot be written as JSON"):
            predict_fn(inputs, model)


def test_threads_share_batches(model: Model) -> None:
    texts = [f"{TEXT} {index}" * (index % 3 + 1) for index in range(48)]
    bodies = [{"input_text": text, "adapter_name": f"task{index % 3}"} for index, text in enumerate(texts)]
    alone = [predict_fn(body, model) for body in bodies]
    before = model.loraplex.service.stats()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: predict_fn(body, model), bodies))
    after = model.loraplex.service.stats()
    check(together, alone)
    assert after.num_steps - before.num_steps < after.num_step_sequences - before.num_step_sequences == len(bodies)


def test_an_engine_that_died_ends_the_worker(load: Load) -> None:
    """The model server starts another. Without one, the error is raised."""
    model = load()
    model.loraplex.service.computing.computation.close()
    with pytest.raises(SystemExit):
        predict_fn(ARTICLE, model, Context())
    with pytest.raises(LoraplexError) as caught:
        predict_fn(ARTICLE, model)
    assert caught.value.status in (500, 503)


# ------------------------------------------------------------------------------------------- settings


def test_peft_is_chosen_by_the_environment(load: Load, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraplex")
    peft = load(backend="PEFT", preload="none")
    assert "bundle with peft," in caplog.text
    for body in (ARTICLE, {"input_text": TEXT}):
        [answer], [expected] = predict_fn(body, peft), predict_fn(body, model)
        assert answer["predicted_text"] == expected["predicted_text"]
        assert answer["confidence_score"] == pytest.approx(expected["confidence_score"], abs=1e-3)


def test_all_adapters_are_loaded_at_the_start(load: Load, model: Model) -> None:
    assert {one.on_device for one in model.loraplex.adapters()} == {True}
    some = load(preload="task0")
    assert [one.name for one in some.loraplex.adapters() if one.on_device] == ["task0"]


def test_settings_of_the_server_count(load: Load) -> None:
    model = load(max_body_bytes="1024", log_inputs="yes", public="docs metrics")
    with pytest.raises(LoraplexError, match="1024 bytes") as caught:
        predict_fn({"input_text": "x" * 2000}, model)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"dtype": "int3"}, "LORAPLEX_DTYPE=int3: is not"),
        ({"max_queue": "many"}, "LORAPLEX_MAX_QUEUE=many: is no.* whole number"),
        ({"preload": "nobody"}, "no classifier 'nobody'"),
        ({"peft_batching": "mixed"}, "has no effect with --backend native"),
        ({"drain_timeout": "-1"}, "LORAPLEX_DRAIN_TIMEOUT=-1: is below 0"),
    ],
)
def test_a_wrong_variable_is_named(load: Load, variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(**variables)


def test_variables_that_nobody_reads_are_named(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    load(port="tcp://10.43.1.39:8000", service_host="10.43.1.39", kvcache="0", preload="none", backend="")
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(found) == 2
    assert found[0].startswith("LORAPLEX_PORT=tcp://10.43.1.39:8000 is ignored")
    assert "'LORAPLEX_KVCACHE'; did you mean LORAPLEX_KV_CACHE" in found[1]


@pytest.mark.parametrize(
    ("workers", "context", "warning"),
    [
        ("4", None, "is 4"),
        ("4", Context(), "is 4"),
        ("", Context(), "is not set"),
        ("", None, ""),
        ("1", Context(), ""),
    ],
)
def test_several_workers_are_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: str,
    context: Any,
    warning: str,
) -> None:
    monkeypatch.setenv("SAGEMAKER_MODEL_SERVER_WORKERS", workers)
    if context is None:
        with pytest.raises(ConfigurationError):
            model_fn(tmp_path)
    else:
        model_fn(tmp_path, context)
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(";")[0] for text in found] == (
        [f"SAGEMAKER_MODEL_SERVER_WORKERS {warning}"] if warning else []
    )


@pytest.mark.parametrize(
    ("library", "found", "is_refused"),
    [
        ("torch", "2.6.0+cu124", True),
        ("torch", "2.11.0a0+nv26.1", False),
        ("torch", "3.0.0", False),
        ("transformers", "5.5.3", True),
        ("transformers", "5.10.0", False),
    ],
)
def test_an_images_old_libraries_are_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, library: str, found: str, is_refused: bool
) -> None:
    monkeypatch.setattr(handlers, "version", lambda name: found if name == library else version(name))
    if is_refused:
        with pytest.raises(ConfigurationError, match=rf"{re.escape(found)}: is too old .*add {library}>="):
            load(preload="none")
    else:
        load(preload="none")


def test_peft_takes_an_images_old_torch(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "version", lambda name: "2.6.0" if name == "torch" else version(name))
    load(preload="none", backend="peft")


def test_the_oldest_libraries_are_those_of_the_package() -> None:
    needed = tomllib.loads((serving.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for library, numbers in handlers.OLDEST.items():
        assert f"{library}>={'.'.join(map(str, numbers))}" in needed


def test_what_cannot_be_loaded_answers_why(tmp_path: Path) -> None:
    """The toolkit itself would answer 400, which says that the client is wrong."""
    with pytest.raises(ConfigurationError) as caught:
        model_fn(tmp_path)
    context = Context()
    model = model_fn(tmp_path, context)
    assert isinstance(model, Unloaded)
    answer = predict_fn(input_fn(json.dumps(ARTICLE), "application/json", context), model, context)
    assert context.status == 500
    assert answer["error"] == {"code": "bundle_error", "message": caught.value.message, "remedy": caught.value.remedy}


def test_a_broken_adapter_does_not_end_the_start(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the server, unless LORAPLEX_REQUIRE_ALL is set."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for one in tiny_bundle.iterdir():
        (folder / one.name).symlink_to(one)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    monkeypatch.setenv("LORAPLEX_DTYPE", "float32")
    model = model_fn(folder)
    assert isinstance(model, Model)
    with model.loraplex:
        assert predict_fn(ARTICLE, model)
    monkeypatch.setenv("LORAPLEX_REQUIRE_ALL", "1")
    with pytest.raises(ConfigurationError, match="broken"):
        model_fn(folder)
