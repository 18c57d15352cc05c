"""The names that ask the base: what the user typed, or --served-model-name; all answer, and the first is shown."""

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
from loraplex.errors import BundleError, ConfigurationError

COMMIT = "0123456789" * 4
NAMES = ("acme/tiny:v2", "tiny", "/models/tiny")


@pytest.fixture(scope="module")
def cache(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in the hub's cache, whose snapshot is the tiny bundle."""
    cache = tmp_path_factory.mktemp("hub") / "models--acme--tiny-base"
    shutil.copytree(tiny_bundle, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    return cache


@pytest.fixture(scope="module")
def http(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    bundle = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("named") / tiny_bundle.name)
    (bundle / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with serving.serve(bundle, "--dtype", "float32", "--served-model-name", *NAMES) as server:
        with serving.client(server) as client:
            yield client


def test_a_base_in_the_hubs_cache_has_its_id_however_it_is_given(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "prod").symlink_to(cache / "snapshots" / COMMIT)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "loraplex.yaml").write_text(f"base: {cache}")
    for given, name in (
        (cache, "acme/tiny-base"),
        (cache / "snapshots" / COMMIT, "acme/tiny-base"),
        (tmp_path / "prod", "prod"),
        (tmp_path / "bundle", "acme/tiny-base"),
    ):
        with Loraplex.load(given, dtype="float32") as loraplex:
            assert loraplex.service.base_names == (name,)
            assert len(loraplex.adapters()) == (0 if given.name == "bundle" else 4)


def test_every_name_answers_and_the_first_is_shown(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed[:3]] == list(NAMES) and all(one["parent"] is None for one in listed[:3])
    assert {one["parent"] for one in listed[3:]} == {NAMES[0]}
    for name in NAMES:
        assert http.get(f"/v1/models/{name}").json()["id"] == name
        assert http.get(f"/v1/models/{name.replace('/', '%2F')}").json()["id"] == name
        body: dict[str, Any] = {"model": name, "max_tokens": 1, "temperature": 0}
        answer = http.post("/v1/completions", json={**body, "prompt": "hello"})
        assert answer.status_code == 200 and answer.json()["model"] == NAMES[0], answer.text
        chat = http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "hello"}]})
        assert chat.status_code == 200 and chat.json()["model"] == NAMES[0], chat.text
        with http.stream("POST", "/v1/completions", json={**body, "prompt": "hello", "stream": True}) as stream:
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
        assert {json.loads(event)["model"] for event in events} == {NAMES[0]}
    adapter = http.post("/v1/completions", json={"model": "task0", "prompt": "hello", "max_tokens": 1}).json()
    assert adapter["model"] == "task0"
    metrics = http.get("/metrics").text
    counted = [line for line in metrics.splitlines() if line.startswith("loraplex_completions_total")]
    assert len(counted) == 2 and f'"{NAMES[0]}"' in counted[0], "one series for the base"


def test_the_folders_name_is_no_name_then(http: httpx.Client, tiny_bundle: Path) -> None:
    answer = http.post("/v1/completions", json={"model": tiny_bundle.name, "prompt": "hello"})
    assert answer.status_code == 404
    assert http.get(f"/v1/models/{tiny_bundle.name}").status_code == 404


def test_no_adapter_and_no_route_takes_a_name_of_the_base(http: httpx.Client) -> None:
    for path, body in (("adapters", {"source": "task0"}), ("routes", {"targets": {"task0": 1}})):
        answer = http.put(f"/v1/{path}/tiny", json=body)
        assert answer.status_code == 422 and "the base's name" in answer.json()["error"]["message"]


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_names_are_the_same_with_every_backend(tmp_path: Path, backend: str) -> None:
    tiny.save_base(base := tmp_path / "base", tiny.FAMILIES["mistral"])
    with Loraplex.load(base, dtype="float32", backend=backend, served_model_name=("a", "b/c", "a")) as loraplex:
        assert loraplex.service.base_names == ("a", "b/c") and loraplex.service.base_name == "a"
    with Loraplex.load(base, dtype="float32", backend=backend, served_model_name="one") as loraplex:
        assert loraplex.service.base_names == ("one",)


@pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 257, "a\n"])
def test_a_name_that_no_request_could_give_is_refused(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name the base"):
        Loraplex.load(tiny_bundle, served_model_name=(name,))


def test_a_name_of_a_classifier_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--served-model-name task0: 'task0' names the base and a classifier"):
        Loraplex.load(tiny_bundle, served_model_name=("a", "task0"))
    bundle = shutil.copytree(tiny_bundle, tmp_path / "task1")
    with pytest.raises(BundleError, match="'task1' names the base and a classifier") as caught:
        Loraplex.load(bundle)
    assert "--served-model-name" in caught.value.remedy
    with Loraplex.load(bundle, dtype="float32", served_model_name="base") as loraplex:
        assert loraplex.service.knows("task1")


def test_names_come_from_the_environment_too(tiny_bundle: Path) -> None:
    environment = {"LORAPLEX_SERVED_MODEL_NAME": "one two"}
    with serving.serve(tiny_bundle, "--preload", "none", **environment) as server, serving.client(server) as http:
        assert [one["id"] for one in http.get("/v1/models").json()["data"][:2]] == ["one", "two"]
