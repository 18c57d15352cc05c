"""`--adapter NAME=SOURCE`, and what takes a source in its place: the same sources as at run time, from anywhere."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

import serving
import tiny
from hub import Hub, listening
from loraplex import Loraplex
from loraplex.errors import AdapterError, BundleError

TEXT = "Customer: hello, is it done?"
ASKED: list[tuple[str, str]] = []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; an adapter of it in `mine` and `mine.tar.gz`; and as `mine` in the cache of a hub's client."""
    place = tmp_path_factory.mktemp("sources")
    tiny.save_base(place / "base", tiny.FAMILIES["mistral"])
    tiny.save_adapter(place / "base", place / "mine", contract=tiny.CONTRACT)
    with tarfile.open(place / "mine.tar.gz", "w:gz") as tar:
        tar.add(place / "mine", arcname=".")
    snapshot = place / "models--org--mine" / "snapshots" / ("0" * 40)
    shutil.copytree(place / "mine", snapshot)
    return place


@pytest.fixture(scope="module")
def remote(place: Path) -> Iterator[dict[str, str]]:
    """The environment in which org/open on the hub, and s3://bucket/mine, are that adapter, too."""

    class ThisHub(Hub):
        asked = ASKED

        def files(self, commit: str) -> dict[str, bytes]:
            return {path.name: path.read_bytes() for path in (place / "mine").iterdir()}

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    with listening(ThisHub) as url:
        session = boto3.session.Session("testing", "testing", region_name="us-east-1")
        client = session.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        for path in (place / "mine").iterdir():
            client.upload_file(str(path), "bucket", f"mine/{path.name}")
        yield {
            **keys,
            "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "HF_ENDPOINT": url,
            "HF_HOME": str(place / "hf"),
            "HF_HUB_OFFLINE": "0",
            "XDG_CACHE_HOME": str(place / "cache"),
        }
    moto.stop()


@pytest.mark.slow
def test_all_sources_are_served_from_the_start(place: Path, remote: dict[str, str], tmp_path: Path) -> None:
    sources = {
        "folder": f"{place}/mine/",
        "archive": f"{place}/mine.tar.gz",
        "cached": f"{place}/models--org--mine",
        "hub": "org/open",
        "revision": "org/open@v2",
        "address": "hf://org/open",
        "s3": "s3://bucket/mine",
    }
    options = [word for name, source in sources.items() for word in ("--adapter", f"{name}={source}")]
    log = tmp_path / "log"
    with serving.serve(place / "base", *options, "--dtype", "float32", log=str(log), **remote) as server:
        with serving.client(server) as http:
            answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": list(sources)}).json()
            ASKED.clear()
            refused = http.put("/v1/adapters/new", json={"source": "org/open"})
    confidences = [verdict["confidence"] for verdict in answer["verdicts"]]
    assert len(confidences) == len(sources) and max(confidences) - min(confidences) < 1e-6, answer
    assert len({verdict["adapter"]["version"] for verdict in answer["verdicts"]}) == 1
    said = log.read_text()
    for name in ("hub", "s3"):
        assert f"fetching {name} …" in said and f"{name}: 0 of 0 MiB" in said, said
    assert "fetching folder" not in said
    assert refused.status_code == 422 and "below an adapter root" in refused.json()["error"]["message"]
    assert "hf://org/name" in refused.json()["error"]["remedy"]
    assert not ASKED, "a client's path is never an id on the hub"
    offline = {**remote, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    with serving.serve(place / "base", "--adapter", "hub=org/open", "--log-format", "json", **offline) as server:
        with serving.client(server) as http:
            assert http.get("/v1/adapters/hub").json()["state"] == "ready"


@pytest.mark.slow
def test_classify_and_verify_take_the_same_sources(place: Path, remote: dict[str, str], monkeypatch: Any) -> None:
    for key, value in remote.items():
        monkeypatch.setenv(key, value)
    options = ("--adapter", "s3=s3://bucket/mine", "--text", TEXT, "--json")
    run = serving.loraplex("classify", place / "base", "--all", *options)
    assert run.returncode == 0, run.stderr
    assert [one["classifier"] for one in json.loads(run.stdout)["verdicts"]] == ["s3"]
    for source in ("org/open", "s3://bucket/mine", f"{place}/mine.tar.gz"):
        run = serving.loraplex("adapters", "verify", source, "--base", place / "base", "--no-peft", "--json")
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["adapter"]["name"] == "adapter"
    run = serving.loraplex("adapters", "verify", "s3://bucket/mine")
    assert run.returncode == 2 and "--base" in run.stderr
    with Loraplex.load(place / "base", adapters={"s3": "s3://bucket/mine"}, dtype="float32") as loraplex:
        assert loraplex.classify(TEXT)["s3"].label in ("yes", "no")


def test_the_base_of_a_nested_adapter_is_above_the_other_adapter(place: Path) -> None:
    shutil.copytree(place / "mine", place / "base" / "run")
    shutil.copytree(place / "mine", place / "base" / "run" / "inner")
    try:
        run = serving.loraplex("adapters", "verify", place / "base" / "run" / "inner", "--no-peft")
        assert run.returncode == 0, run.stderr
    finally:
        shutil.rmtree(place / "base" / "run")


def test_what_is_nowhere_says_where_it_was_looked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdapterError) as caught:
        Loraplex.load(place / "base", adapters={"x": "nobody/nothing"})
    looked = f"nobody/nothing: no such folder or archive ('{tmp_path}/nobody/nothing'); hf://nobody/nothing: cannot be"
    assert looked in caught.value.message
    assert "check the path, or" in caught.value.remedy
    for source in ("nothing", "a/b/c", "./nobody/nothing", "../nothing", "/nobody/nothing", "nobody/x.tar.gz", "a/b/"):
        with pytest.raises(AdapterError, match="and it is no hub id org/name") as caught:
            Loraplex.load(place / "base", adapters={"x": source})
        assert "hf://" in caught.value.remedy


def test_a_home_is_the_users(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    with Loraplex.load(place / "base", adapters={"x": "~/mine"}, dtype="float32") as loraplex:
        assert loraplex.service.knows("x")


@pytest.mark.parametrize("name", ["a/b", "isDone"])
def test_a_name_that_is_wrong_or_taken_is_told_before_anything_is_fetched(place: Path, name: str) -> None:
    shutil.copytree(place / "mine", place / "base" / "isDone")
    try:
        with pytest.raises(BundleError, match=r"cannot name a classifier|second classifier named 'isDone'"):
            Loraplex.load(place / "base", adapters={name: "s3://nowhere/x"})
    finally:
        shutil.rmtree(place / "base" / "isDone")


def test_a_named_adapter_that_the_state_overrules_is_told(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named: dict[str, str | Path] = {"extra": tiny_bundle / "task0"}
    for change, told in (("unload", "it was unloaded"), ("load", f"it was loaded from {tiny_bundle / 'task1'}")):
        state = tmp_path / change
        with Loraplex.load(tiny_bundle, adapters=named, dtype="float32", state_dir=str(state)) as loraplex:
            if change == "unload":
                loraplex.unload_adapter("extra")
            else:
                loraplex.load_adapter("extra", "task1")
        assert not caplog.messages
        with Loraplex.load(tiny_bundle, adapters=named, dtype="float32", state_dir=str(state)) as loraplex:
            assert loraplex.service.knows("extra") == (change == "load")
        assert f"--adapter extra has no effect: {told} at run time, as --state-dir remembers" in caplog.messages
        caplog.clear()
