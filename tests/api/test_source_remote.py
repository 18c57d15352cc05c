"""Adapters from S3 (moto's server, behind a proxy that counts and disturbs) and from a hub (a small one, over HTTP)."""

import gzip
import hashlib
import http.client
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import boto3
import pytest
from moto.server import ThreadedMotoServer

from hub import COMMITS, Hub, listening
from loraplex.adapters.files import FILES as FILES_READ
from loraplex.adapters.files import PICKLE, ResolvedSource, SourceLimits
from loraplex.adapters.s3 import PREFIXES
from loraplex.adapters.source import resolve_source
from loraplex.bundle import PROMPT_FILES
from loraplex.errors import AdapterError
from loraplex.io_yaml import IO_YAML

CONFIG, WEIGHTS, CONTRACT = "adapter_config.json", "adapter_model.safetensors", "classifier.yaml"
# What is fetched beside the weights: contents by name.
TEXTS = {CONFIG: b"{}", CONTRACT: b"a: b", IO_YAML: b"c: d", **{name: f"a {name}".encode() for name in PROMPT_FILES}}
BIG = os.urandom(3_000_000)
SCRIPT = """
import json, sys
from pathlib import Path
from loraplex.adapters.source import resolve_source
from loraplex.errors import AdapterError
steps = []
for source in sys.argv[2:]:
    try:
        found = resolve_source(source, roots=(), cache_dir=Path(sys.argv[1]), progress=lambda *step: steps.append(step))
        print(json.dumps({"path": str(found.path), "source": found.source, "remote": found.remote, "steps": steps}))
    except AdapterError as error:
        print(json.dumps({"message": error.message, "remedy": error.remedy}))
"""


def resolve_in_a_process(cache_dir: Path, *sources: str, **environment: str) -> list[dict[str, Any]]:
    """As a server does that starts with this environment."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(cache_dir), *sources],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert "%|" not in run.stderr, "a server draws no bars"
    return [json.loads(line) for line in run.stdout.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# S3


class Disturbance:
    """What stands between a client and S3: it notes what was asked, and is told what to do with the big files."""

    def __init__(self, moto: str) -> None:
        self.moto = moto
        self.asked: list[tuple[str, str, str | None]] = []  # (method, path, range)
        self.sent = 0  # bytes of big files
        self.cut_after: int | None = None
        self.flip_a_bit = False
        self.ignore_range = False
        self.forbid = False
        self.before: Callable[[], object] | None = None  # once, before a big file is passed on

    def gets(self) -> list[str | None]:
        """The ranges of the requests for big files."""
        return [asked for method, path, asked in self.asked if method == "GET" and path.endswith((WEIGHTS, ".tar.gz"))]


class Proxy(BaseHTTPRequestHandler):
    disturbance: ClassVar[Disturbance]

    def do_GET(self) -> None:
        told, big = self.disturbance, urlsplit(self.path).path.endswith((WEIGHTS, ".tar.gz"))
        told.asked.append((self.command, urlsplit(self.path).path, self.headers["Range"]))
        if self.command == "GET" and big and told.before is not None:
            before, told.before = told.before, None
            before()
        if told.forbid:
            self.send_response_only(403)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            return
        upstream = http.client.HTTPConnection(told.moto)
        headers = {key: value for key, value in self.headers.items() if not (told.ignore_range and key == "Range")}
        upstream.request(self.command, self.path, headers=headers)
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        self.send_response_only(response.status)
        for key, value in response.getheaders():
            if key.lower() not in ("connection", "transfer-encoding"):
                self.send_header(key, value)
        self.end_headers()
        if big and told.flip_a_bit:
            told.flip_a_bit, body = False, bytes([body[0] ^ 1]) + body[1:]
        if big and told.cut_after is not None:
            body = body[: told.cut_after]
        told.sent += len(body) * big
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def between(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disturbance]:
    told = Disturbance(moto)
    with listening(type("ThisProxy", (Proxy,), {"disturbance": told})) as url:
        for key, value in {
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        yield told


class Bucket:
    def __init__(self, moto: str, name: str) -> None:
        self.name = name
        self.client = boto3.session.Session().client("s3", endpoint_url=f"http://{moto}")
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def put_adapter(self, folder: str, weights: bytes = BIG) -> None:
        for name, content in (*TEXTS.items(), (WEIGHTS, weights)):
            self.put(f"{folder}{name}", content)


@pytest.fixture
def bucket(moto: str, between: Disturbance, tmp_path: Path) -> Bucket:
    return Bucket(moto, "bucket-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16])


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., ResolvedSource]:
    def resolve(source: str, **options: Any) -> ResolvedSource:
        return resolve_source(source, roots=(), cache_dir=tmp_path / "cache", **options)

    return resolve


Resolve = Callable[..., ResolvedSource]


def packed(weights: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in (*TEXTS.items(), (WEIGHTS, weights)):
            info = tarfile.TarInfo(f"isDone/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), 1)


@pytest.mark.parametrize("form", ["folder", "archive", "root"])
def test_an_adapter_in_s3_is_fetched_once_and_again_when_it_changes(
    bucket: Bucket, between: Disturbance, resolve: Resolve, form: str
) -> None:
    def put(weights: bytes) -> None:
        if form == "archive":
            bucket.put("models/isDone.tar.gz", packed(weights))
        else:
            bucket.put_adapter("" if form == "root" else "models/isDone/", weights)

    put(BIG)
    for name in ("models/isDone/README.md", "models/isDone/adapter_model.pt", "models/isDone/checkpoint-9/" + CONFIG):
        bucket.put(name, b"wrong")
    key = {"folder": "/models/isDone", "archive": "/models/isDone.tar.gz", "root": ""}[form]
    steps: list[tuple[int, int | None]] = []
    first = resolve(f"s3://{bucket.name}{key}", progress=lambda *step: steps.append(step))
    assert contents(first.path) == TEXTS | {WEIGHTS: BIG}
    assert first.source == f"s3://{bucket.name}{key}" and first.remote
    assert steps == sorted(steps) and len({total for _, total in steps}) == 1 and steps[-1][0] == steps[-1][1]
    assert not [path for method, path, _ in between.asked if method == "GET" and path.endswith((".md", ".pt"))]
    assert resolve(f"s3://{bucket.name}{key}/" if form == "folder" else first.source) == first
    assert between.gets() == [None], "unchanged, it is not fetched again"
    put(BIG[::-1])
    second = resolve(first.source)
    assert contents(second.path)[WEIGHTS] == BIG[::-1] and second.source == first.source
    assert contents(first.path)[WEIGHTS] == BIG, "the old version may still be in use"
    assert len(between.gets()) == 2


def test_a_folder_with_more_objects_than_a_page_is_listed_by_name(bucket: Bucket, resolve: Resolve) -> None:
    bucket.put_adapter("models/isDone/", b"weights")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda index: bucket.put(f"models/isDone/a{index}", b""), range(1001)))
    assert contents(resolve(f"s3://{bucket.name}/models/isDone").path) == TEXTS | {WEIGHTS: b"weights"}
    assert all(name.startswith(PREFIXES) for name in (*FILES_READ, PICKLE))


def test_a_download_that_is_cut_goes_on_where_it_was(bucket: Bucket, between: Disturbance, resolve: Resolve) -> None:
    bucket.put_adapter("isDone/")
    between.cut_after = 1_000_000
    assert contents(resolve(f"s3://{bucket.name}/isDone").path)[WEIGHTS] == BIG
    assert between.gets() == [None, "bytes=1000000-", "bytes=2000000-"]
    assert between.sent == len(BIG)


def test_a_download_that_failed_is_taken_up_by_the_next_call(
    bucket: Bucket, between: Disturbance, resolve: Resolve, tmp_path: Path
) -> None:
    bucket.put("isDone.tar.gz", archive := packed(BIG))
    source = f"s3://{bucket.name}/isDone.tar.gz"
    between.cut_after = 500_000
    with pytest.raises(AdapterError, match="cannot be fetched from S3") as caught:
        resolve(source)
    assert "the download resumes" in caught.value.remedy
    between.cut_after, failed = None, len(between.gets())
    steps: list[tuple[int, int | None]] = []
    assert contents(resolve(source, progress=lambda *step: steps.append(step)).path)[WEIGHTS] == BIG
    assert between.gets()[failed:] == ["bytes=2500000-"]
    assert between.sent == len(archive), "each byte came once"
    assert steps[0][0] > 2_500_000 and steps[-1] == (len(archive), len(archive))
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_part_of_an_object_that_changed_is_thrown_away(
    bucket: Bucket, between: Disturbance, resolve: Resolve, tmp_path: Path
) -> None:
    bucket.put_adapter("isDone/")
    source = f"s3://{bucket.name}/isDone"
    between.cut_after = 500_000
    with pytest.raises(AdapterError):
        resolve(source)
    bucket.put_adapter("isDone/", BIG[::-1])
    between.cut_after, failed = None, len(between.gets())
    assert contents(resolve(source).path)[WEIGHTS] == BIG[::-1]
    assert between.gets()[failed:] == [None]
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_an_object_that_changes_between_listing_and_download_is_noticed(
    bucket: Bucket, between: Disturbance, resolve: Resolve
) -> None:
    bucket.put_adapter("isDone/")
    between.before = lambda: bucket.put_adapter("isDone/", BIG[::-1])
    assert contents(resolve(f"s3://{bucket.name}/isDone").path)[WEIGHTS] == BIG[::-1]

    def change_again() -> None:
        bucket.put_adapter("isDone/", os.urandom(1000))
        between.before = change_again

    change_again()
    with pytest.raises(AdapterError, match="changes faster"):
        resolve(f"s3://{bucket.name}/isDone")


def test_a_range_that_is_ignored_and_a_bit_that_is_flipped_do_no_harm(
    bucket: Bucket, between: Disturbance, resolve: Resolve
) -> None:
    bucket.put_adapter("isDone/")
    between.flip_a_bit = True
    assert contents(resolve(f"s3://{bucket.name}/isDone").path)[WEIGHTS] == BIG
    assert between.gets() == [None, None]
    bucket.put_adapter("isFraud/")
    between.cut_after = 1_000_000
    between.before = lambda: setattr(between, "ignore_range", True)
    with pytest.raises(AdapterError):
        resolve(f"s3://{bucket.name}/isFraud")
    between.cut_after = None
    assert contents(resolve(f"s3://{bucket.name}/isFraud").path)[WEIGHTS] == BIG


def test_threads_and_processes_that_ask_at_once_fetch_it_once(
    bucket: Bucket, between: Disturbance, resolve: Resolve, tmp_path: Path
) -> None:
    bucket.put_adapter("isDone/")
    source = f"s3://{bucket.name}/isDone"
    meet = threading.Barrier(3)
    between.before = meet.wait  # the first to fetch waits until the processes ask

    def process() -> str:
        threading.Timer(1.0, meet.wait).start()
        return str(resolve_in_a_process(tmp_path / "cache", source)[0]["path"])

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(lambda: str(resolve(source).path)) for _ in range(3)]
        calls += [pool.submit(process) for _ in range(2)]
        paths = {call.result() for call in calls}
    assert len(paths) == 1 and contents(Path(paths.pop()))[WEIGHTS] == BIG
    assert between.gets() == [None]


def test_what_s3_lacks_or_forbids_says_what_to_do(
    bucket: Bucket, between: Disturbance, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("pickled/" + CONFIG, b"{}")
    bucket.put("pickled/adapter_model.bin", b"x")
    bucket.put_adapter("big/", b"x" * 2000)
    for key, wrong, remedy in (
        ("nowhere", f"no {CONFIG}", "save_pretrained"),
        ("nowhere.tar.gz", "cannot be fetched from S3", "check the bucket and the key"),
        ("pickled", "pickle", "python -c"),
        ("big", r"2,000 bytes .* 1,000 are allowed", "no setting raises this limit"),
    ):
        with pytest.raises(AdapterError, match=wrong) as caught:
            resolve(f"s3://{bucket.name}/{key}", limits=SourceLimits(max_bytes=1000))
        assert remedy in caught.value.remedy
    assert not between.gets(), "it is refused before it is fetched"
    with pytest.raises(AdapterError, match="bucket does not exist") as caught:
        resolve("s3://no-such-bucket/isDone")
    assert "check the bucket" in caught.value.remedy
    between.forbid = True
    for key in ("big", "big.tar.gz"):
        with pytest.raises(AdapterError, match=r"Denied|Forbidden") as caught:
            resolve(f"s3://{bucket.name}/{key}")
        assert "s3:GetObject and s3:ListBucket" in caught.value.remedy
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AdapterError, match="credentials") as caught:
        resolve(f"s3://{bucket.name}/big")
    assert "AWS_PROFILE" in caught.value.remedy


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "nonsense"])
def test_an_s3_that_is_not_there_is_our_error(
    between: Disturbance, resolve: Resolve, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(AdapterError, match=r"endpoint") as caught:
        resolve("s3://bucket/isDone")
    assert "AWS_ENDPOINT_URL" in caught.value.remedy


# The hub


FILES = {
    **{name: b"{}" for name in (CONFIG, f"a/b/{CONFIG}", f"pickled/{CONFIG}", "config.json")},
    **{name: b"weights" for name in (WEIGHTS, f"a/b/{WEIGHTS}")},
    **{name: b"pickle" for name in ("pickled/adapter_model.bin", "adapter_model.bin", "code.py", "a/b/x.pt")},
    **{name: content for name, content in TEXTS.items() if name != CONFIG},
}


@pytest.fixture
def asked() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def hub(asked: list[tuple[str, str]], tmp_path: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Resolve sources with the hub client told by its environment, as users tell it, where the hub is."""

    def files(_: Hub, commit: str) -> dict[str, bytes]:
        return {name: content + commit.encode() for name, content in FILES.items()}

    with listening(type("ThisHub", (Hub,), {"asked": asked, "files": files})) as url:

        def resolve(*sources: str, **environment: str) -> list[dict[str, Any]]:
            told = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
            return resolve_in_a_process(tmp_path / "cache", *sources, **{**told, **environment})

        yield resolve


HubResolve = Callable[..., list[dict[str, Any]]]


def test_an_adapter_on_the_hub_is_fetched_at_its_revision(
    hub: HubResolve, asked: list[tuple[str, str]], tmp_path: Path
) -> None:
    named = ["hf://org/open", "hf://org/open@v2", "hf://org/open/a/b", "hf://org/open/a/b/@refs/pr/1"]
    found = hub(*named)
    assert [one["source"] for one in found] == [*named[:3], "hf://org/open/a/b@refs/pr/1"]
    assert all(one["remote"] for one in found)
    for one, revision in zip(found, ("main", "v2", "main", "refs/pr/1"), strict=True):
        commit = COMMITS[revision].encode()
        assert (Path(one["path"]) / WEIGHTS).read_bytes() == b"weights" + commit
        assert Path(one["path"]).is_relative_to(tmp_path / "hf")
    size = sum(len(FILES[name]) + 40 for name in (WEIGHTS, *TEXTS))
    assert found[0]["steps"][-1] == [size, size]
    fetched = {path.rpartition("/")[2] for method, path in asked if method == "GET" and "/resolve/" in path}
    assert fetched == {WEIGHTS, *TEXTS}, "no pickle, no code"
    offline = hub(*named[:3], "hf://org/open@refs/pr/9", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert [one.get("path") for one in offline] == [*(one["path"] for one in found[:3]), None]
    assert "HF_HUB_OFFLINE" in offline[3]["remedy"]


def test_what_the_hub_lacks_or_forbids_says_what_to_do(hub: HubResolve, asked: list[tuple[str, str]]) -> None:
    answers = hub(
        "hf://org/missing",
        "hf://org/private",
        "hf://org/gated",
        "hf://org/open@nowhere",
        "hf://org/open/nowhere",
        "hf://org/open/pickled",
    )
    for answer, wrong, remedy in zip(
        answers,
        ["Repository Not Found", "401", "gated repo", "Revision Not Found", f"no {CONFIG}", "pickle"],
        ["check the id", "set HF_TOKEN", "accept its terms", "behind '@'", "save_pretrained", "python -c"],
        strict=True,
    ):
        assert wrong in answer["message"] and remedy in answer["remedy"], answer
    assert not [path for method, path in asked if method == "GET" and "/resolve/" in path]
    assert "path" in hub("hf://org/private", HF_TOKEN="hf_right")[0]


def test_a_hub_that_is_not_there_is_our_error(hub: HubResolve) -> None:
    answer = hub("hf://org/open", HF_ENDPOINT="http://127.0.0.1:1")[0]
    assert "cannot be fetched from the hub" in answer["message"] and "check the network" in answer["remedy"]
