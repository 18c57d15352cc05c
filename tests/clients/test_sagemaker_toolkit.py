"""SageMaker's handlers inside AWS's own `sagemaker-huggingface-inference-toolkit`: `make test-clients`.

The toolkit and its model server, which is a Java program, run in `.venv-clients`. They load an artifact as
`loraplex sagemaker pack` makes it: the base and its adapters, with `code/inference.py` and the package beside it.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import loraplex
import serving
import tiny

BIN = serving.ROOT / ".venv-clients/bin"
PACKAGE = Path(loraplex.__file__).parent
TEXT = "Customer: hello, is my payment done?"
JSON = {"Content-Type": "application/json"}
ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"
STARTED_S, ENDED_S = 60, 30
# name -> headers, body
REQUESTS: dict[str, tuple[dict[str, str], bytes]] = {
    "an adapter": (JSON, json.dumps({"input_text": TEXT, "adapter_name": "task1"}).encode()),
    "the base": (JSON, json.dumps({"input_text": TEXT}).encode()),
    "by a header": ({**JSON, ADAPTER: "task1"}, json.dumps({"input_text": TEXT}).encode()),
    "no type": ({}, json.dumps({"input_text": TEXT, "adapter_name": "task0"}).encode()),
    "labels": (JSON, json.dumps({"inputs": TEXT, "parameters": {"adapter_id": "task0"}}).encode()),
    "a completion": (JSON, json.dumps({"model": "task0", "prompt": TEXT, "max_tokens": 3, "temperature": 0}).encode()),
    "a chat": (
        JSON,
        json.dumps(
            {"model": "task0", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 2, "temperature": 0}
        ).encode(),
    ),
    "CSV": ({"Content-Type": "text/csv", "Accept": "text/csv", ADAPTER: "task0"}, f"inputs\n{TEXT}\nhello\n".encode()),
    "JSON lines": (
        {"Content-Type": "application/jsonlines"},
        b'{"input_text": "hello", "adapter_name": "task0"}\n{"input_text": "hello", "adapter_name": "nope"}\n',
    ),
    "an unknown adapter": (JSON, json.dumps({"input_text": TEXT, "adapter_name": "nope"}).encode()),
    "no JSON": (JSON, b'{"input_text": '),
    "a field that is wrong": (JSON, json.dumps({"input_text": 1}).encode()),
    "another type": ({"Content-Type": "text/plain"}, b"hello"),
}
OF_ONE_ANSWER = {"id", "created", "system_fingerprint"}
Answer = tuple[int, Any]

TOOLKIT = """
import base64, json, sys
import transformers.file_utils

if not hasattr(transformers.file_utils, "is_tf_available"):  # transformers 5 has it no more, and the toolkit asks
    transformers.file_utils.is_tf_available = lambda: False

from mms.context import Context, RequestProcessor
from mms.metrics.metrics_store import MetricsStore
from sagemaker_huggingface_inference_toolkit.handler_service import HuggingFaceHandlerService


class Handler(HuggingFaceHandlerService):
    pass


def answers(folder, requests):
    handler = Handler()
    context = Context("model", folder, {}, 1, None, "1.1.11")
    handler.initialize(context)
    assert sys.modules["inference"].__file__ == folder + "/code/inference.py"
    assert handler.predict.__code__.co_filename.startswith(folder + "/code/loraplex/")
    for headers, body in requests:
        context.request_processor, context.request_ids = [RequestProcessor(headers)], {0: "r0"}
        context.metrics = MetricsStore(context.request_ids, "model")
        [answer] = handler.handle([{"body": bytearray(base64.b64decode(body))}], context)
        yield context.get_response_status(0)[0], answer if isinstance(answer, str) else answer.decode()


def serve(configuration):
    from sagemaker_huggingface_inference_toolkit import mms_model_server
    from sagemaker_inference import model_server

    model_server.MMS_CONFIG_FILE = mms_model_server.MMS_CONFIG_FILE = configuration  # it stands in /etc otherwise
    mms_model_server.start_model_server(handler_service="toolkit")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(json.dumps(list(answers(sys.argv[2], json.load(sys.stdin)))))
"""

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not BIN.is_dir(), reason="needs .venv-clients: make test-clients"),
    pytest.mark.skipif(shutil.which("java") is None, reason="the toolkit's model server needs Java"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SageMaker's /opt/ml, and the toolkit's program beside it."""
    folder = tmp_path_factory.mktemp("ml")
    model = tiny.save_bundle(folder / "model", 2)
    (model / "code").mkdir()
    (model / "code" / "inference.py").write_bytes((PACKAGE / "sagemaker" / "inference.py").read_bytes())
    shutil.copytree(PACKAGE, model / "code" / "loraplex", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "toolkit.py").write_text(TOOLKIT)
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir()
    return {
        **{name: value for name, value in os.environ.items() if name != "JAVA_TOOL_OPTIONS"},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),  # for the model server, which imports `toolkit`
        "HF_HUB_OFFLINE": "1",
        "LORAPLEX_DTYPE": "float32",
        "SAGEMAKER_BASE_DIR": str(folder),
        "SAGEMAKER_PROGRAM": "inference.py",
        "SAGEMAKER_MODEL_SERVER_WORKERS": "1",
        "TMPDIR": str(folder / "tmp"),
    }


@pytest.fixture(scope="module")
def model_server(folder: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The toolkit's model server, which starts, and its URL."""
    port = free_port()
    command = [str(BIN / "python"), str(folder / "toolkit.py"), "serve", str(folder / "mms.properties")]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "SAGEMAKER_BIND_TO_PORT": str(port), "TEMP": str(folder / "tmp")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        yield process, url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(ENDED_S)


def free_port() -> int:
    """MMS takes no port above 32767."""
    for port in range(20_000 + os.getpid() % 10_000, 2**15):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def ping(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/ping", timeout=5).status_code == 200
    return False


def has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)  # nobody has asked for its exit code
    return True


def wait_until(is_true: Any, seconds: float, log: Path) -> None:
    ends = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends, log.read_text()[-4000:]
        time.sleep(0.1)


def settled(text: str) -> Any:
    """The answer without what differs each time."""
    try:
        answer = json.loads(text)
    except ValueError:  # CSV, or JSON lines
        return [json.loads(line) if line.startswith(("{", "[")) else line[:9] for line in text.splitlines()]
    return {name: answer[name] for name in answer.keys() - OF_ONE_ANSWER} if isinstance(answer, dict) else answer


def near(answer: Any) -> Any:
    """The same with numbers that may differ in their last bits."""
    if isinstance(answer, dict):
        return {name: near(one) for name, one in answer.items()}
    if isinstance(answer, list):
        return [near(one) for one in answer]
    return pytest.approx(answer, abs=1e-5) if isinstance(answer, float) else answer


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Answer]:
    """The server's own answers to REQUESTS."""
    answers = {}
    with serving.serve(folder / "model", "--dtype", "float32") as server, serving.client(server) as http:
        for name, (headers, body) in REQUESTS.items():
            response = http.post("/invocations", content=body, headers=headers)
            answers[name] = response.status_code, near(settled(response.text))
    return answers


@pytest.mark.usefixtures("model_server")  # it starts meanwhile
def test_the_handler_service_answers_as_the_server(
    folder: Path, environment: dict[str, str], expected: dict[str, Answer]
) -> None:
    asked = [(headers, base64.b64encode(body).decode()) for headers, body in REQUESTS.values()]
    command = [str(BIN / "python"), str(folder / "toolkit.py"), "answer", str(folder / "model")]
    done = subprocess.run(
        command, cwd=folder, env=environment, input=json.dumps(asked), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    answers = {name: (status, settled(text)) for name, (status, text) in zip(REQUESTS, found, strict=True)}
    assert answers == expected
    statuses = {name: status for name, (status, _) in answers.items() if status != 200}
    assert statuses == {
        "an unknown adapter": 404,
        "no JSON": 400,
        "a field that is wrong": 422,
        "another type": 422,
    }
    assert {answers[name][1]["error"]["code"] for name in statuses} == {
        "unknown_classifier",
        "bad_input",
        "invalid_request",
    }


def test_the_model_server_answers_with_the_same_statuses(
    model_server: tuple[subprocess.Popen[bytes], str], expected: dict[str, Answer], folder: Path
) -> None:
    _, url = model_server
    wait_until(lambda: ping(url), STARTED_S, folder / "log")  # it says 200 before the model is loaded
    for name in ("an adapter", "CSV", "an unknown adapter", "no JSON"):
        headers, body = REQUESTS[name]
        response = httpx.post(f"{url}/invocations", content=body, headers=headers, timeout=STARTED_S)
        assert (response.status_code, settled(response.text)) == expected[name], (folder / "log").read_text()[-4000:]
    assert ping(url)


def test_the_model_server_ends_with_the_model(model_server: tuple[subprocess.Popen[bytes], str], folder: Path) -> None:
    """MMS leaves the small process behind that has forked its worker; a container's end is its end, too."""
    process, url = model_server
    started = [one for one in psutil.process_iter() if os.getsid(one.pid) == process.pid]
    [java] = [one for one in started if one.name() == "java"]
    [model] = [one for one in started if one.ppid() in {other.pid for other in java.children()}]
    process.terminate()
    assert process.wait(ENDED_S) == 0
    wait_until(lambda: has_ended(java) and has_ended(model), ENDED_S, folder / "log")
    left = [" ".join(one.cmdline()) for one in started if not has_ended(one)]
    assert all("model_service_worker" in command for command in left) and len(left) <= 1
    assert not ping(url)
