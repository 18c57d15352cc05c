"""Adapters that come, change and go over HTTP while others are asked: nothing stale, nothing mixed, nothing lost."""

import json
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import torch
from moto.server import ThreadedMotoServer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import serving
import tiny
from loraplex import Loraplex
from loraplex.errors import BundleError, NotReadyError, StateError, UnknownClassifierError
from loraplex.service import registry

TEXT = "Customer: hello, I would like to book a table for two. Is it done?"
INVOCATION = tiny.SPECIAL_TOKENS.index("<|ask|>")
Answer = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with `one` (plain) and `two` (activated) in it, and two versions of each beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.save_base(folder / "bundle", tiny.FAMILIES["mistral"])
    for name, invocation in (("one", None), ("two", [INVOCATION])):
        for seed in (1, 2):
            where = folder / "versions" / f"{name}{seed}"
            tiny.save_adapter(
                folder / "bundle",
                where,
                contract=tiny.CONTRACT,
                seed=10 * seed + len(name),
                alora_invocation_tokens=invocation,
            )
        shutil.copytree(folder / "versions" / f"{name}1", folder / "bundle" / name)
    return folder


@pytest.fixture(scope="module")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """One for all tests, each of which loads what it changes under a name of its own."""
    with serving.serve(
        made / "bundle", "--dtype", "float32", "--adapter-root", tmp_path_factory.getbasetemp()
    ) as server:
        yield server


@pytest.fixture
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def ask(http: httpx.Client, name: str, text: str = TEXT, **fields: object) -> Answer:
    response = http.post("/v1/classify", json={"input": text, "classifiers": name, **fields})
    assert response.status_code == 200, response.text
    [verdict] = response.json()["verdicts"]
    return {key: value for key, value in verdict.items() if key != "id"}


def put(http: httpx.Client, name: str, source: object, **fields: object) -> httpx.Response:
    return http.put(f"/v1/adapters/{name}", json={"source": str(source), **fields})


def overwrite(folder: Path, other: Path) -> None:
    """The files under the same path become another adapter's."""
    for file in other.iterdir():
        shutil.copy(file, folder / file.name)


@pytest.mark.parametrize("name", ["one", "two"])
def test_no_answer_is_stale_or_mixed_while_versions_change_under_the_same_path(
    folder: Path, server: serving.Server, http: httpx.Client, name: str
) -> None:
    place, versions = folder / "versions" / "place", [folder / "versions" / f"{name}{seed}" for seed in (1, 2)]
    shutil.copytree(versions[0], place)
    expected: dict[str, dict[str, float]] = {}
    for version in versions:
        overwrite(place, version)
        info = put(http, "probe", place).json()
        expected[info["version"]] = ask(http, "probe")["scores"]
    assert len(expected) == 2
    assert abs(next(iter(expected.values()))["yes"] - list(expected.values())[1]["yes"]) > 0.01

    answers: list[Answer] = []
    stopping = threading.Event()

    def traffic(which: int) -> None:
        with serving.client(server) as client:
            while not stopping.is_set():
                # One of them keeps its K/V from call to call.
                answers.append(ask(client, "probe", **({"conversation_id": "same"} if which else {})))

    threads = [threading.Thread(target=traffic, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(8):
            overwrite(place, versions[round_ % 2])
            info = put(http, "probe", place).json()
            answer = ask(http, "probe", conversation_id="same")
            assert answer["adapter"]["version"] == info["version"]
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert {answer["adapter"]["version"] for answer in answers} == set(expected)
    for answer in answers:
        assert answer["scores"] == pytest.approx(expected[answer["adapter"]["version"]], abs=1e-4)


def test_a_contract_only_change_is_a_new_version_and_keeps_the_kv(folder: Path, http: httpx.Client) -> None:
    place = folder / "versions" / "two1"
    first = put(http, "contract", place).json()
    text = TEXT + " really?"
    ask(http, "contract", text)
    contract = place / "classifier.yaml"
    contract.write_text(contract.read_text() + "threshold: 0.0\n")
    second = put(http, "contract", place).json()
    assert second["version"] != first["version"]
    response = http.post("/v1/classify", json={"input": text, "classifiers": "contract"}).json()
    assert response["verdicts"][0]["label"] == "yes"
    assert response["usage"]["cached_tokens"] >= 16


def truncate(place: Path) -> None:
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def change(place: Path, to: float) -> None:
    weights = place / "adapter_model.safetensors"
    save_file({key: torch.full_like(t, to) if "lora_B" in key else t for key, t in load_file(weights).items()}, weights)


def other_shape(place: Path) -> None:
    weights = place / "adapter_model.safetensors"
    save_file({key: tensor[:, :-1].contiguous() for key, tensor in load_file(weights).items()}, weights)


def wrong_golden(place: Path) -> None:
    contract = place / "classifier.yaml"
    golden = [{"text": "Customer: hello", "label": "yes"}, {"text": "Customer: hello", "label": "no"}]
    contract.write_text(contract.read_text() + f"golden: {json.dumps(golden)}\n")


@pytest.mark.parametrize(
    ("break_it", "code", "says"),
    [
        (truncate, "adapter_error", "safetensors"),
        (other_shape, "adapter_error", "shape"),
        (lambda place: change(place, float("nan")), "adapter_error", "NaN"),
        (lambda place: change(place, 0.0), "adapter_error", "changes nothing"),
        (wrong_golden, "contract_error", "golden"),
        (lambda place: (place / "adapter_config.json").unlink(), "adapter_error", "adapter_config.json"),
        (
            lambda place: (place / "adapter_model.safetensors").rename(place / "adapter_model.bin"),
            "adapter_error",
            "bin",
        ),
    ],
)
def test_a_broken_adapter_never_replaces_a_working_one(
    folder: Path, http: httpx.Client, break_it: Any, code: str, says: str
) -> None:
    assert put(http, "works", folder / "versions" / "one1").status_code == 200
    before = ask(http, "works")
    place = folder / "versions" / "one2"
    break_it(place)
    response = put(http, "works", place)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == code and says in error["message"] + error["remedy"] and error["remedy"]
    assert ask(http, "works") == before
    if (place / "adapter_config.json").exists() and (place / "adapter_model.safetensors").exists():
        info = http.get("/v1/adapters/works").json()
        assert info["state"] == "ready" and info["error"]["code"] == code
    assert put(http, "new", place).status_code == 422
    assert http.get("/v1/adapters/new").status_code == 404


def test_an_unloaded_adapter_is_unknown_and_can_come_back(folder: Path, http: httpx.Client) -> None:
    assert put(http, "gone", folder / "versions" / "one2").status_code == 200
    before = ask(http, "gone")
    assert http.delete("/v1/adapters/gone").json() == {"name": "gone", "state": "unloaded"}
    response = http.post("/v1/classify", json={"input": TEXT, "classifiers": "gone"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_classifier"
    both = http.post("/v1/classify", json={"input": TEXT, "classifiers": ["gone", "two"]}).json()["verdicts"]
    assert both[0]["error"]["code"] == "unknown_classifier" and both[1]["label"]
    assert http.delete("/v1/adapters/gone").status_code == 404
    assert put(http, "gone", folder / "versions" / "one2").status_code == 200
    assert ask(http, "gone") == before


def test_vllms_names(folder: Path, http: httpx.Client) -> None:
    body = {"lora_name": "v", "lora_path": str(folder / "versions" / "one1")}
    response = http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 200 and "Success" in response.text
    first = ask(http, "v")
    again = http.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 409 and again.json()["error"]["code"] == "adapter_exists"
    body["lora_path"] = str(folder / "versions" / "one2")
    assert http.post("/v1/load_lora_adapter", json=body | {"load_inplace": True}).status_code == 200
    assert ask(http, "v")["adapter"]["version"] != first["adapter"]["version"]
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "v"}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "v"}).status_code == 404


def test_sagemakers_names(folder: Path, http: httpx.Client) -> None:
    body = {"name": "s", "src": str(folder / "versions" / "one1"), "preload": True, "pin": True}
    assert http.post("/adapters", json=body).json()["pinned"] is True
    assert http.post("/adapters", json=body).status_code == 409
    answer = http.post("/invocations", json={"input_text": TEXT, "adapter_name": "s"})
    assert answer.json()[0]["predicted_text"] in ("yes", "no")
    assert http.delete("/adapters/s").status_code == 200
    assert http.post("/invocations", json={"input_text": TEXT, "adapter_name": "s"}).status_code == 404


@pytest.mark.parametrize("source", ["/etc", "../..", "", "s3://", "ftp://x/y", "no/such/folder", "\0", "hf://x"])
def test_what_lies_elsewhere_is_refused(http: httpx.Client, source: str) -> None:
    response = put(http, "x", source)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["remedy"]


@pytest.mark.parametrize("name", ["*", "a%20b", "..", "%2e%2e%2fx", "x" * 129])
def test_names_are_restricted(folder: Path, http: httpx.Client, name: str) -> None:
    assert put(http, name, folder / "versions" / "one1").status_code in (404, 405, 422)


def test_a_kill_forgets_nothing(folder: Path) -> None:
    arguments = ["--dtype", "float32", "--adapter-root", folder / "versions", "--state-dir", folder / "state"]
    with serving.serve(folder / "bundle", *arguments) as server, serving.client(server) as http:
        assert put(http, "new", folder / "versions" / "one2", pinned=True).status_code == 200
        assert put(http, "lost", folder / "versions" / "two2").status_code == 200
        assert put(http, "two", folder / "versions" / "two2").status_code == 200
        assert http.delete("/v1/adapters/one").status_code == 200
        expected = {name: ask(http, name) for name in ("new", "two")}
        server.process.kill()
        server.process.wait(30)
    shutil.copytree(folder / "versions" / "two2", folder / "bundle" / "kept")
    shutil.rmtree(folder / "versions" / "two2")
    with serving.serve(folder / "bundle", *arguments) as server, serving.client(server) as http:
        adapters = {one["name"]: one for one in http.get("/v1/adapters").json()["adapters"]}
        assert set(adapters) == {"new", "lost", "two", "kept"}
        assert adapters["new"]["pinned"] and ask(http, "new") == expected["new"]
        for name in ("lost", "two"):  # their folder is gone
            assert adapters[name]["state"] == "failed" and adapters[name]["error"]["remedy"]
            assert http.post("/v1/classify", json={"input": TEXT, "classifiers": name}).status_code >= 400
        assert put(http, "two", folder / "bundle" / "kept").status_code == 200
        assert ask(http, "two")["scores"] == expected["two"]["scores"]


def test_lazy_adapters_are_read_when_they_are_asked(folder: Path) -> None:
    (folder / "bundle" / "two" / "adapter_model.safetensors").write_bytes(b"broken")
    with (
        serving.serve(folder / "bundle", "--dtype", "float32", "--preload", "none") as server,
        serving.client(server) as http,
    ):
        states = {one["name"]: one["state"] for one in http.get("/v1/adapters").json()["adapters"]}
        assert states == {"one": "registered", "two": "registered"}
        verdicts = http.post("/v1/classify", json={"input": TEXT, "classifiers": "*"}).json()["verdicts"]
        assert verdicts[0]["label"] and verdicts[1]["error"]["code"] == "adapter_error"
        states = {one["name"]: one["state"] for one in http.get("/v1/adapters").json()["adapters"]}
        assert states == {"one": "ready", "two": "failed"}


def test_more_adapters_than_places_take_turns(folder: Path) -> None:
    for seed in range(6):
        tiny.save_adapter(folder / "bundle", folder / "bundle" / f"more{seed}", contract=tiny.CONTRACT, seed=50 + seed)
    with (
        serving.serve(folder / "bundle", "--dtype", "float32", "--max-adapters", "2", "--host-memory", "0") as server,
        serving.client(server) as http,
    ):
        every = http.post("/v1/classify", json={"input": TEXT, "classifiers": "*"}).json()["verdicts"]
        assert len(every) == 8 and all("label" in verdict for verdict in every)
        for verdict in every:
            assert ask(http, verdict["classifier"])["scores"] == pytest.approx(verdict["scores"], abs=1e-4)
        on_device = [one["name"] for one in http.get("/v1/adapters").json()["adapters"] if one["on_device"]]
        assert len(on_device) <= 2


def test_from_s3_and_again_when_it_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto's server over real HTTP, and the real boto3 in ours."""
    storage = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    storage.start()
    try:
        host, port = storage.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="models")

        def upload(version: str) -> None:
            for file in (folder / "versions" / version).iterdir():
                s3.upload_file(str(file), "models", f"one/{file.name}")

        with (
            serving.serve(folder / "bundle", "--dtype", "float32", **environment) as server,
            serving.client(server) as http,
        ):
            upload("one1")
            first = put(http, "far", "s3://models/one").json()
            assert ask(http, "far")["scores"] == ask(http, "one")["scores"]
            upload("one2")
            assert put(http, "far", "s3://models/one").json()["version"] != first["version"]
            missing = put(http, "far", "s3://models/nothing")
            assert missing.status_code == 422 and missing.json()["error"]["remedy"]
            assert ask(http, "far")["label"]
    finally:
        storage.stop()


def test_the_command_line(folder: Path, server: serving.Server) -> None:
    def run(*arguments: object) -> Any:
        return serving.loraplex("adapters", *arguments, "--url", server.url)

    assert "one" in run("list").stdout
    loaded = run("load", "cli", folder / "versions" / "one2", "--pin", "--json")
    assert json.loads(loaded.stdout)["pinned"] is True
    assert json.loads(run("pin", "cli", "--off", "--json").stdout)["pinned"] is False
    assert "state: ready" in run("show", "cli").stdout
    assert run("unload", "cli").returncode == 0
    gone = run("show", "cli")
    assert gone.returncode == 1 and "unknown_classifier" in gone.stderr and "remedy" in gone.stderr
    nobody = serving.loraplex("adapters", "list", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 1 and "unreachable" in nobody.stderr


@pytest.mark.slow
def test_verify_compares_with_peft(folder: Path) -> None:
    for name in ("one", "two"):
        run = serving.loraplex("adapters", "verify", folder / "bundle" / name, "--text", "Customer: is it?", "--json")
        assert run.returncode == 0, run.stderr
        proof = json.loads(run.stdout)
        assert proof["num_compared"] == 1 and proof["difference"] <= 1e-4
    truncate(folder / "bundle" / "one")
    run = serving.loraplex("adapters", "verify", folder / "bundle" / "one")
    assert run.returncode == 1 and "safetensors" in run.stderr


def test_what_is_remembered_of_a_bundle_moves_with_it(folder: Path) -> None:
    with Loraplex.load(folder / "bundle", dtype="float32", state_dir=str(folder / "state")) as loraplex:
        loraplex.pin_adapter("one")
        loraplex.unload_adapter("two")
    shutil.move(folder / "bundle", folder / "moved")
    with Loraplex.load(folder / "moved", dtype="float32", state_dir=str(folder / "state")) as loraplex:
        [info] = loraplex.adapters()
        assert (info.name, info.state, info.pinned) == ("one", "ready", True)
        loraplex.load_adapter("two", folder / "moved" / "two")
    with Loraplex.load(folder / "moved", dtype="float32", state_dir=str(folder / "state")) as loraplex:
        assert [info.name for info in loraplex.adapters()] == ["one", "two"]


def test_an_untrained_adapter_of_the_head_or_the_embedding_is_refused(folder: Path, http: httpx.Client) -> None:
    """PEFT stores a copy of the base's embedding beside it, which hides that nothing changes."""
    for layer in ("lm_head", "embed_tokens"):
        model = AutoModelForCausalLM.from_pretrained(folder / "bundle")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = get_peft_model(model, LoraConfig(r=2, target_modules=[layer], task_type="CAUSAL_LM"))
            peft.save_pretrained(str(folder / layer))
        response = put(http, layer, folder / layer)
        assert response.status_code == 422 and "changes nothing" in response.json()["error"]["message"]


def test_two_loads_of_one_new_name_do_not_both_succeed(folder: Path, server: serving.Server) -> None:
    def load(version: str) -> int:
        with serving.client(server) as client:
            path = str(folder / "versions" / version)
            return client.post("/v1/load_lora_adapter", json={"lora_name": "race", "lora_path": path}).status_code

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(load, ["one1", "one2"])) == [200, 409]


def test_downloads_that_hang_hold_up_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        arrived.wait(30)
        raise BundleError("far", "is gone", remedy="none")

    monkeypatch.setattr(registry, "resolve_source", hang)
    with Loraplex.load(folder / "bundle", dtype="float32") as loraplex, ThreadPoolExecutor(20) as pool:
        loads = [pool.submit(loraplex.load_adapter, f"far{i}", "s3://far/away") for i in range(20)]
        try:
            assert loraplex.classify(TEXT, "one", deadline_ms=10_000)["one"].label
        finally:
            arrived.set()
        assert all(isinstance(load.exception(), BundleError) for load in loads)


def test_all_means_those_that_are_live(folder: Path) -> None:
    roots = (str(folder / "versions"),)
    with (
        Loraplex.load(folder / "bundle", dtype="float32", adapter_root=roots) as loraplex,
        ThreadPoolExecutor(1) as pool,
    ):
        place = folder / "versions" / "one2"
        golden = [{"text": f"Customer: hello {i}", "label": "yes"} for i in range(300)]
        contract = place / "classifier.yaml"
        contract.write_text(contract.read_text() + f"threshold: 0.0\ngolden: {json.dumps(golden)}\n")
        load = pool.submit(loraplex.load_adapter, "new", place)
        while "new" not in [info.name for info in loraplex.adapters()] and not load.done():
            time.sleep(0.001)
        names = [verdict.classifier for verdict in loraplex.classify(TEXT).verdicts]
        assert load.done() or names == ["one", "two"]
        assert load.result().state == "ready"
        assert len(loraplex.classify(TEXT).verdicts) == 3


def test_pins_that_leave_no_room_do_not_stop_a_start(folder: Path) -> None:
    state: dict[str, Any] = {"dtype": "float32", "state_dir": str(folder / "state"), "max_adapters": 2}
    shutil.copytree(folder / "versions" / "one2", folder / "bundle" / "three")
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        loraplex.pin_adapter("one")
        loraplex.pin_adapter("two")
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        assert {info.name for info in loraplex.adapters()} == {"one", "two", "three"}
        assert loraplex.classify(TEXT, "one")["one"].label
        with pytest.raises(NotReadyError, match="pinned"):
            loraplex.classify(TEXT, "three")


def test_an_unloaded_adapter_may_be_broken(folder: Path) -> None:
    state: dict[str, Any] = {"dtype": "float32", "state_dir": str(folder / "state")}
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        loraplex.unload_adapter("one")
    truncate(folder / "bundle" / "one")
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        assert [info.name for info in loraplex.adapters()] == ["two"]


def test_a_state_directory_has_one_server(folder: Path) -> None:
    state: dict[str, Any] = {"dtype": "float32", "state_dir": str(folder / "state")}
    with Loraplex.load(folder / "bundle", **state):
        with pytest.raises(StateError, match="another server"):
            Loraplex.load(folder / "bundle", **state)
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        (folder / "state" / "loraplex.sqlite").write_bytes(b"no database" * 1000)
        with pytest.raises(StateError, match="took effect"):
            loraplex.load_adapter("one", folder / "bundle" / "two")
        expected = loraplex.classify(TEXT, "two")["two"].scores
        assert loraplex.classify(TEXT, "one")["one"].scores == pytest.approx(expected, abs=1e-4)


def test_a_change_that_could_not_be_saved_is_saved_with_the_next(folder: Path) -> None:
    state: dict[str, Any] = {"dtype": "float32", "state_dir": str(folder / "state")}
    shutil.copytree(folder / "versions" / "one2", folder / "bundle" / "three")
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        (folder / "state").rename(folder / "aside")
        with pytest.raises(StateError, match=r"'one' took effect.*removed or replaced"):
            loraplex.unload_adapter("one")  # which nobody can repeat
        with pytest.raises(StateError, match="'two' took effect"):
            loraplex.pin_adapter("two")
        assert [verdict.classifier for verdict in loraplex.classify(TEXT).verdicts] == ["three", "two"]
        (folder / "aside").rename(folder / "state")
        loraplex.pin_adapter("three")
    with Loraplex.load(folder / "bundle", **state) as loraplex:
        assert {info.name: info.pinned for info in loraplex.adapters()} == {"two": True, "three": True}


def test_names_in_a_message_are_few(http: httpx.Client) -> None:
    known = [f"adapter{i}" for i in range(5000)]
    assert len(str(UnknownClassifierError("x", known))) < 1000
    names = [f"nobody{i}" for i in range(2000)]
    response = http.post("/v1/classify", json={"input": TEXT, "classifiers": [*names, "one"]})
    assert response.status_code == 404 and "(2000 in all)" in response.json()["error"]["message"]
    assert len(response.content) < 5000


def test_verify_takes_an_activated_adapter_without_a_contract_in_any_folder(folder: Path) -> None:
    place = folder / "bundle" / "_checkpoint 5"
    shutil.copytree(folder / "versions" / "two1", place)
    (place / "classifier.yaml").unlink()
    (folder / "bundle" / "one" / "classifier.yaml").write_text("nonsense: 1")
    run = serving.loraplex("adapters", "verify", place, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["difference"] <= 1e-4


def test_a_stop_does_not_wait_for_a_download_that_hangs(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(8) as pool:  # accepts, answers nothing
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with (
            serving.serve(folder / "bundle", "--dtype", "float32", "--drain-timeout", 1, **environment) as server,
            serving.client(server) as http,
        ):
            loads = [pool.submit(put, http, f"far{i}", "s3://bucket/far") for i in range(8)]
            time.sleep(1)
            assert ask(http, "one", deadline_ms=10_000)["label"]
            started = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - started < 15
            for load in loads:
                error = load.exception()
                assert load.result().status_code == 503 if error is None else isinstance(error, httpx.HTTPError)
