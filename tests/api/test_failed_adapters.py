"""A start with adapters that cannot be loaded: what is served, who hears of it, and who hears why."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving
import tiny
from loraplex import Loraplex
from loraplex.errors import AdapterError

INFER, ADMIN = {"X-API-Key": "infer-secret-0123456789"}, {"X-API-Key": "admin-secret-0123456789"}
KEYS = f"ci:infer:{INFER['X-API-Key']} ops:admin:{ADMIN['X-API-Key']}"
BROKEN = {
    "truncated": "adapter_error",
    "contract": "contract_error",
    "golden": "contract_error",
    "gone": "adapter_error",
    "cut": "adapter_error",
}


def truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


@pytest.fixture(scope="module")
def place(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with broken adapters, and a state folder that remembers `gone` and `cut`, which are broken now."""
    place = tmp_path_factory.mktemp("failed")
    bundle = shutil.copytree(tiny_bundle, place / "bundle")
    for name in ("gone", "cut"):
        shutil.copytree(tiny_bundle / "task1", place / "elsewhere" / name)
    arguments: dict[str, Any] = {"dtype": "float32", "state_dir": str(place / "state"), "preload": "none"}
    with Loraplex.load(bundle, adapter_root=(str(place / "elsewhere"),), **arguments) as loraplex:
        for name in ("gone", "cut"):
            loraplex.load_adapter(name, place / "elsewhere" / name)
    shutil.rmtree(place / "elsewhere" / "gone")
    truncate(place / "elsewhere" / "cut")
    for name in ("truncated", "contract", "golden"):
        shutil.copytree(bundle / "task1", bundle / name)
    truncate(bundle / "truncated")
    (bundle / "contract" / "classifier.yaml").write_text("labels: [only]\n")
    golden = [{"text": " ", "label": "yes"}]
    (bundle / "golden" / "classifier.yaml").write_text(json.dumps({**tiny.CONTRACT, "golden": golden}))
    return place


def arguments(place: Path) -> tuple[object, ...]:
    return place / "bundle", "--dtype", "float32", "--state-dir", place / "state", "--adapter-root", place / "elsewhere"


@pytest.fixture(scope="module")
def log(place: Path) -> Path:
    return place / "log"


@pytest.fixture(scope="module")
def server(place: Path, log: Path) -> Iterator[serving.Server]:
    with serving.serve(*arguments(place), log=str(log), LORAPLEX_API_KEYS=KEYS) as server:
        yield server


@pytest.fixture
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


def test_the_server_starts_and_ready_counts_what_failed_and_names_it_for_a_key(http: httpx.Client, log: Path) -> None:
    for path in ("/ready", "/ping"):
        assert http.head(path).status_code == 200
        for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer"}):
            response = http.get(path, headers=headers)
            assert response.status_code == 200
            assert response.json() == {"status": "ok", "num_failed": len(BROKEN), "failed": []}
        for headers in (INFER, ADMIN, {"Authorization": f"Bearer {INFER['X-API-Key']}"}):
            body = http.get(path, headers=headers).json()
            assert body["status"] == "ok" and body["num_failed"] == len(BROKEN)
            assert {one["name"]: one["code"] for one in body["failed"]} == BROKEN
    assert http.get("/health").json() == {"status": "ok"}
    lines = log.read_text().splitlines()
    for name in BROKEN:
        assert any(f"{name} cannot be loaded" in line and "ERROR" in line for line in lines)
    states = {one["name"]: one["state"] for one in http.get("/v1/adapters", headers=ADMIN).json()["adapters"]}
    assert {name for name, state in states.items() if state == "failed"} == set(BROKEN)


def test_the_others_are_answered(http: httpx.Client) -> None:
    response = http.post("/v1/classify", json={"input": "hello"}, headers=INFER)
    assert response.status_code == 200
    verdicts = {one["classifier"]: one for one in response.json()["verdicts"]}
    assert {name: one["error"]["code"] for name, one in verdicts.items() if "error" in one} == BROKEN
    assert {"task0", "task1", "task2", "verbatim"} <= {name for name, one in verdicts.items() if "label" in one}


def requests() -> Iterator[tuple[str, str, Any]]:
    for name in (*BROKEN, "task0", "nope", "*"):
        yield "POST", "/v1/classify", {"input": "hello", "classifiers": name}
        yield "POST", "/v1/classify", {"inputs": ["hello", " "], "classifiers": [name, "truncated"]}
        yield "POST", "/invocations", {"input_text": "hello", "adapter_name": name}
        yield "POST", "/endpoints/any/invocations", {"input_text": "hello", "adapter_name": name}
        yield "POST", "/v1/completions", {"model": name, "prompt": "hello", "max_tokens": 1}
        yield "POST", "/v1/completions", {"model": name, "prompt": "hello", "max_tokens": 1, "stream": True}
        yield "GET", f"/v1/models/{name}", None
    yield "POST", "/v1/classify", {"input": [{"role": "robot", "content": "x"}]}
    yield "POST", "/v1/feedback", {"verdict_id": "any", "label": "yes"}
    for path in ("/v1/models", "/ready", "/health", "/ping", "/metrics", "/openapi.json", "/v1/adapters"):
        yield "GET", path, None


def test_no_answer_to_a_key_that_may_only_infer_shows_a_path(http: httpx.Client, place: Path) -> None:
    seen = set()
    for method, path, body in requests():
        response = http.request(method, path, json=body, headers=INFER)
        seen.add(response.status_code)
        for internal in (str(place), "safetensors", "classifier.yaml, key", "elsewhere"):
            assert internal not in response.text, (path, body, response.text)
    assert seen >= {200, 403, 404, 500}


def test_a_failed_adapter_is_named_and_an_admin_hears_why(http: httpx.Client, place: Path) -> None:
    for name, code in BROKEN.items():
        body = {"input": "hello", "classifiers": name}
        told = http.post("/v1/classify", json=body, headers=INFER).json()["error"]
        assert told["code"] == code and told["message"] == f"the adapter {name!r} cannot be used"
        why = http.post("/v1/classify", json=body, headers=ADMIN).json()["error"]
        assert why["code"] == code and str(place) in why["message"]
        among = http.post("/v1/classify", json={**body, "classifiers": [name, "task0"]}, headers=ADMIN).json()
        assert str(place) in among["verdicts"][0]["error"]["message"]


@pytest.mark.parametrize("more", [("--preload", "all"), ("--preload", "none")])
def test_require_all_ends_the_start(place: Path, more: tuple[str, ...]) -> None:
    run = serving.loraplex("serve", *arguments(place)[:3], "--require-all", "--port", 0, *more)
    assert run.returncode == 1 and run.stdout == ""
    assert "contract_error" in run.stderr and "labels" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gone", "cut"])
def test_require_all_holds_for_the_state_folder_too(tiny_bundle: Path, place: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(place / "state", tmp_path / "state")
    other = {"gone": "cut", "cut": "gone"}[name]
    with (
        serving.serve(tiny_bundle, "--state-dir", tmp_path / "state", "--adapter-root", place / "elsewhere") as server,
        serving.client(server) as http,
    ):
        assert http.delete(f"/v1/adapters/{other}").status_code == 200
    run = serving.loraplex(
        "serve", tiny_bundle, "--state-dir", tmp_path / "state", "--adapter-root", place / "elsewhere", "--require-all"
    )
    assert run.returncode == 1 and name in run.stderr and "adapter_error" in run.stderr


def test_an_adapter_that_the_command_line_names_is_required(tiny_bundle: Path, place: Path) -> None:
    run = serving.loraplex("serve", tiny_bundle, "--adapter", f"mine={place / 'elsewhere' / 'cut'}", "--port", 0)
    assert run.returncode == 1 and "adapter_error" in run.stderr


def test_in_process_all_are_required(place: Path) -> None:
    shutil.copytree(place / "bundle", place / "copy")
    for name in ("contract", "golden"):
        shutil.rmtree(place / "copy" / name)
    with pytest.raises(AdapterError, match="truncated"):
        Loraplex.load(place / "copy", dtype="float32")


def test_an_infer_key_sees_no_path_where_the_state_is_gone(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--state-dir", tmp_path / "state", "--preload", "none")
    with serving.serve(tiny_bundle, *options, LORAPLEX_API_KEYS=KEYS) as server, serving.client(server) as http:
        body = {"input": "Customer: hello", "classifiers": "task0"}
        verdict = http.post("/v1/classify", json=body, headers=INFER).json()["verdicts"][0]
        (tmp_path / "state").rename(tmp_path / "moved")
        feedback = {"verdict_id": verdict["id"], "label": "yes"}
        hidden, told = (http.post("/v1/feedback", json=feedback, headers=key).json()["error"] for key in (INFER, ADMIN))
    assert hidden["code"] == told["code"] == "state_error"
    assert str(tmp_path) in told["message"] and str(tmp_path) not in json.dumps(hidden)
