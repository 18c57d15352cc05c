"""The images' entry point as a process, with a folder in the place of /opt/ml/model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

import serving
import tiny
from loraplex.bundle import open_bundle
from loraplex.sagemaker.artifact.pack import pack

pytestmark = pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
COMMAND = [sys.executable, "-m", "loraplex.sagemaker.container"]
BODY = {"input_text": "Customer: hello", "adapter_name": "task0"}
AWS_KEYS = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
KEY = "infer-secret-0123456789"


@contextmanager
def container(folder: Path, log: Path, **environment: str) -> Iterator[serving.Server]:
    """The entry point with `serve` alone, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"LORAPLEX_MODEL_DIR": str(folder), "SAGEMAKER_BIND_TO_PORT": port, **environment}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*COMMAND, "serve"], text=True, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | variables
        )
    try:
        assert process.stdout is not None
        yield serving.Server(process, f"http://127.0.0.1:{port}", "", process.stdout)
    finally:
        process.kill()
        process.communicate()


def wait_for(server: serving.Server, path: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.process.poll() is None, "the server has ended"
        try:
            if httpx.get(server.url + path, timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"{path} does not answer 200")


def lines_of(log: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_serve_alone_is_a_container_of_sagemakers(tiny_bundle: Path, tmp_path: Path) -> None:
    """From a bundle to an artifact, its folder, the container, and an answer to AWS's client."""
    bundle, log = tmp_path / "model", tmp_path / "log"
    bundle.mkdir()
    pack(open_bundle(tiny_bundle), str(tmp_path / "model.tar.gz"))
    subprocess.run(["tar", "-C", str(bundle), "-xf", str(tmp_path / "model.tar.gz")], check=True)
    variables = {"SAGEMAKER_MODEL_SERVER_WORKERS": "4", "SAGEMAKER_REGION": "eu-west-1", "LORAPLEX_PRELOAD": "none"}
    variables["SAGEMAKER_CONTAINER_LOG_LEVEL"] = "10"
    with container(bundle, log, **variables) as server:
        wait_for(server, "/ping")
        runtime: Any = boto3.client("sagemaker-runtime", endpoint_url=server.url, region_name="any", **AWS_KEYS)
        response = runtime.invoke_endpoint(EndpointName="any", ContentType="application/json", Body=json.dumps(BODY))
        [answer] = json.loads(response["Body"].read())
        assert answer.keys() == {"confidence_score", "predicted_text"}
        large = json.dumps(BODY) + " " * 20 * 2**20
        assert httpx.post(f"{server.url}/invocations", content=large).status_code == 200
        with serving.connect(server) as upload:
            body = json.dumps(BODY).encode()
            head = f"POST /invocations HTTP/1.1\r\nHost: any\r\nContent-Length: {len(body)}\r\n\r\n"
            upload.sendall(head.encode() + body[:10])
            assert httpx.get(f"{server.url}/ping").status_code == 200  # so the upload, which came before, is accepted
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(f"{server.url}/ping").status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            upload.sendall(body[10:])
            assert serving.receive(upload).startswith(b"HTTP/1.1 200")
        assert server.process.wait(10) == 0
    lines = lines_of(log)
    said = [line["message"] for line in lines if line["logger"] == "loraplex.sagemaker.container"]
    assert said[0].startswith("SAGEMAKER_MODEL_SERVER_WORKERS has no effect: one process")
    assert said[1] == "these variables have no effect: 'SAGEMAKER_REGION'"
    assert "no API keys" in said[2] and len(said) == 3
    assert any(line.get("path") == "/ping" for line in lines), "at this level"
    assert not any("not read" in line["message"] for line in lines) and lines[-1]["message"] == "stopped"


def test_keys_are_obeyed_and_sigterm_ends_the_load(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {"LORAPLEX_API_KEYS": f"ci:infer:{KEY}", "SAGEMAKER_CONTAINER_LOG_LEVEL": "30"}
    with container(tiny_bundle, log, **environment) as server:
        wait_for(server, "/health")
        assert httpx.post(f"{server.url}/invocations", json=BODY).status_code == 401
        assert server.stop() == 0
    assert log.read_text() == "", "there is nothing to warn of"


def test_sigterm_before_it_listens(tiny_bundle: Path, tmp_path: Path) -> None:
    with container(tiny_bundle, tmp_path / "log") as server:
        deadline = time.monotonic() + 60
        while "loading" not in (tmp_path / "log").read_text():
            assert server.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        assert server.stop() == 0


def test_without_a_model_an_error_in_json_ends_it(tmp_path: Path) -> None:
    with container(tmp_path / "missing", tmp_path / "log") as server:
        assert server.process.wait(30) == 1
    [line] = lines_of(tmp_path / "log")
    assert line["error"] == "bundle_error" and "/missing" in line["message"] and "ModelDataUrl" in line["message"]


def test_other_arguments_are_the_commands_own(tiny_bundle: Path) -> None:
    """Also `serve` with a bundle, which needs keys where others reach it."""
    with_bundle = ["serve", str(tiny_bundle), "--host", "0.0.0.0", "--port", "0"]
    run = subprocess.run([*COMMAND, *with_bundle], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "there are no API keys" in run.stderr
    run = subprocess.run([*COMMAND, "keys", "new", "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "Usage: loraplex keys new" in run.stdout
