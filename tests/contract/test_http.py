"""`loraplex serve --backend …` over HTTP, and the errors of its start. As in test_backends.py, it is vLLM where that is
installed."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

import serving
import tiny
from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.service import preparation

TEXT = "Customer: hello\nAgent: at what time?"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its own, because adapters come into it."""
    return shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("http") / "bundle")


VLLM = ["--backend", "vllm", "--kv-cache", "64MiB", "--vllm-arg", "enforce_eager=true"]
PEFT = ["--backend", "peft"]
OTHERS = [VLLM] if tiny.HAS_VLLM else [PEFT, [*PEFT, "--peft-batching", "mixed"]]


@pytest.fixture(scope="module", params=OTHERS, ids=" ".join)
def other(request: pytest.FixtureRequest, bundle: Path) -> Iterator[httpx.Client]:
    options = ["--dtype", "float32", "--adhoc-questions", *request.param]
    with serving.serve(bundle, *options) as server, serving.client(server) as client:
        yield client


def scores(http: httpx.Client, name: str = "*") -> dict[str, Any]:
    response = http.post("/v1/classify", json={"input": TEXT, "classifiers": name})
    assert response.status_code == 200, response.text
    return {one["classifier"]: one.get("scores", one.get("label")) for one in response.json()["verdicts"]}


def test_the_same_verdicts_as_native(other: httpx.Client, http: httpx.Client) -> None:
    actual, expected = scores(other), scores(http)
    assert actual.keys() == expected.keys()
    for name, found in expected.items():
        assert actual[name] == (found if isinstance(found, str) else pytest.approx(found, abs=1e-3))


def test_typed_questions_get_the_answers_of_classify(other: httpx.Client, http: httpx.Client) -> None:
    """In both formats, from a trained adapter as native's, and from the bare base."""
    native = scores(http, "task0")["task0"]["yes"]
    polite = {"type": "predicate", "instructions": "Is the customer polite?"}
    body = {"input": TEXT, "classifiers": [], "questions": {"polite": polite}}
    [verdict] = other.post("/v1/classify", json=body).json()["verdicts"]
    wanted = {"task0": pytest.approx(native, abs=1e-3), "polite": pytest.approx(verdict["scores"]["yes"], abs=1e-3)}
    questions = [{"type": "predicate", "name": "task0", "instructions": "Is it done?"}, {**polite, "name": "polite"}]
    response = other.post("/v1/decisions", json={"model": "*", "input": TEXT, "questions": questions})
    assert response.status_code == 200, response.text
    answers = {one["name"]: one for one in response.json()["answers"]}
    assert {name: one["probability"] for name, one in answers.items()} == wanted
    assert answers["task0"]["x_adapter"]["name"] == "task0" and answers["polite"]["x_adapter"] is None
    nouls = {"task0": {"type": "noul"}, "polite": {"type": "noul", "instructions": polite["instructions"]}}
    response = other.post("/v1/systemone", json={"state": TEXT, "questions": nouls})
    assert response.status_code == 200, response.text
    assert {name: one["noul"] for name, one in response.json()["answers"].items()} == wanted


def test_many_clients_at_once(other: httpx.Client) -> None:
    alone = {name: scores(other, name)[name] for name in ("task0", "task1", "task2", "verbatim")}
    names = list(alone) * 8
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(lambda name: scores(other, name)[name], names), strict=True):
            assert found == (alone[name] if isinstance(found, str) else pytest.approx(alone[name], abs=1e-3))


def test_routes_text_metrics_and_adapters(other: httpx.Client, bundle: Path) -> None:
    assert other.put("/v1/routes/alias", json={"targets": {"task1": 1}}).status_code in (200, 201)
    assert scores(other, "alias")["alias"] == pytest.approx(scores(other, "task1")["task1"], abs=1e-3)
    text = other.post("/v1/completions", json={"model": "verbatim", "prompt": "Customer:", "max_tokens": 4}).json()
    assert text["usage"]["completion_tokens"] >= 1
    listed = {one["name"]: one for one in other.get("/v1/adapters").json()["adapters"]}
    assert listed["task0"]["state"] == "ready" and listed["task0"]["on_device"]
    before = scores(other, "task2")
    assert other.delete("/v1/adapters/task2").status_code in (200, 204)
    assert other.post("/v1/classify", json={"input": TEXT, "classifiers": "task2"}).status_code == 404
    loaded = other.put("/v1/adapters/task2", json={"source": str(bundle / "task2")})
    assert loaded.status_code in (200, 201), loaded.text
    assert scores(other, "task2")["task2"] == pytest.approx(before["task2"], abs=1e-3)
    assert "loraplex_" in other.get("/metrics").text
    late = other.post("/v1/classify", json={"input": TEXT, "deadline_ms": 0.0001})
    assert late.status_code == 504


def test_what_it_cannot_serve_is_refused_at_load_with_the_remedy(other: httpx.Client, bundle: Path) -> None:
    folder = bundle / "refused"
    tiny.save_adapter(bundle, folder, contract=tiny.CONTRACT, bias="lora_only")
    response = other.put("/v1/adapters/refused", json={"source": str(folder)})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == "adapter_error" and "--backend native" in error["remedy"] and "bias" in error["message"]
    assert "refused" not in [one["name"] for one in other.get("/v1/adapters").json()["adapters"]]
    shutil.rmtree(folder)


def test_a_bundle_that_it_cannot_serve_does_not_start_where_all_are_required(tmp_path: Path) -> None:
    bundle = tiny.save_bundle(tmp_path / "bundle", adapters=1)
    tiny.save_adapter(bundle, bundle / "tokens", contract=tiny.CONTRACT, trainable_token_indices=[3])
    run = serving.loraplex("serve", bundle, *OTHERS[0], "--require-all", "--port", 0)
    assert run.returncode == 1
    assert "trainable_token_indices" in run.stderr and "--backend native" in run.stderr


@pytest.mark.parametrize("backend", ["peft", "vllm"])
def test_without_it_the_error_says_how_to_install_it(
    backend: Literal["peft", "vllm"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "is_installed", lambda library: False)
    with pytest.raises(ConfigurationError) as caught:
        preparation.check_backend(EngineConfig(backend=backend))
    extra = {"peft": "train", "vllm": "vllm"}[backend]
    assert f"pip install 'loraplex[{extra}]'" in caught.value.remedy
    preparation.check_backend(EngineConfig())
