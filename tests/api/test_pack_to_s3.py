"""`loraplex sagemaker pack` and `verify` with S3: moto's server over real HTTP, and the real boto3."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from loraplex.bundle import open_bundle
from loraplex.cli.main import app
from loraplex.errors import ConfigurationError
from loraplex.sagemaker.artifact import s3
from loraplex.sagemaker.artifact.pack import Packed, pack
from loraplex.sagemaker.artifact.verify import verify

PART = 5 * 2**20  # the least that S3 takes


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(moto: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The environment's S3, with one empty bucket `models`."""
    for key, value in {
        "AWS_ENDPOINT_URL_S3": moto,
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
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="models")
    for key in keys(client):
        client.delete_object(Bucket="models", Key=key)
    return client


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, with a file that takes a few parts."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (copy / "LICENSE").write_bytes(os.urandom(2**20) * 14)
    return copy


def packed(bundle: Path, out: str, **options: Any) -> Packed:
    return pack(open_bundle(bundle), out, **options)


def keys(client: Any) -> set[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="models")
    return {one["Key"] for page in pages for one in page.get("Contents", ())}


def uploads(client: Any) -> list[Any]:
    found: list[Any] = client.list_multipart_uploads(Bucket="models").get("Uploads", [])
    return found


class Failing:
    """boto3's client, one of whose calls fails."""

    def __init__(self, client: Any, failing: dict[str, Exception], after: int = 0) -> None:
        self._client, self._failing, self._left = client, failing, after

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            if name in self._failing:
                self._left -= 1
                if self._left < 0:
                    raise self._failing[name]
            return getattr(self._client, name)(**arguments)

        return call


def refusal(call: str, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": f"this is {code}"}}, call)


def fail(monkeypatch: pytest.MonkeyPatch, client: Any, failing: dict[str, Exception], after: int = 0) -> None:
    monkeypatch.setattr(s3, "connect", lambda place: Failing(client, failing, after))


def test_an_archive_in_s3_is_the_one_on_disk(bundle: Path, client: Any, tmp_path: Path) -> None:
    here = packed(bundle, str(tmp_path / "model.tar.gz"))
    there = packed(bundle, "s3://models/support/model.tar.gz")
    assert here.sha256 == there.sha256 and keys(client) == {"support/model.tar.gz"}
    answer = client.get_object(Bucket="models", Key="support/model.tar.gz", ChecksumMode="ENABLED")
    assert answer["Body"].read() == (tmp_path / "model.tar.gz").read_bytes()
    assert answer["ETag"].endswith('-4"'), "it came in parts"
    assert uploads(client) == []
    assert verify("s3://models/support/model.tar.gz").is_whole


def test_parts_carry_their_sha256(bundle: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    client.meta.events.register("before-sign.s3", lambda request, operation_name, **_: asked.append(
        (operation_name, {key.lower(): value for key, value in request.headers.items()})))  # fmt: skip
    monkeypatch.setattr(s3, "connect", lambda place: client)
    packed(bundle, "s3://models/model.tar.gz")
    sent = dict(asked)
    assert sent["CreateMultipartUpload"]["x-amz-checksum-algorithm"] == "SHA256"
    assert "x-amz-checksum-sha256" in sent["UploadPart"]


@pytest.mark.slow
def test_files_below_a_prefix_are_those_of_a_folder(bundle: Path, client: Any, tmp_path: Path) -> None:
    here = packed(bundle, str(tmp_path / "model"), uncompressed=True)
    there = packed(bundle, "s3://models/support/v1", uncompressed=True)
    assert here.sha256 == there.sha256 and uploads(client) == []
    folder = {path.relative_to(tmp_path / "model").as_posix(): path for path in (tmp_path / "model").rglob("*")}
    files = {f"support/v1/{name}": path for name, path in folder.items() if path.is_file()}
    assert keys(client) == files.keys()
    for key in ("support/v1/LICENSE", "support/v1/task0/adapter_model.safetensors", "support/v1/code/inference.py"):
        body = client.get_object(Bucket="models", Key=key)["Body"].read()
        assert hashlib.sha256(body).digest() == hashlib.sha256(files[key].read_bytes()).digest()
    client.put_object(Bucket="models", Key="support/v1/", Body=b"")  # as AWS's console makes a folder
    told: list[tuple[int, int | None]] = []
    assert verify("s3://models/support/v1/", lambda done, total: told.append((done, total))).is_whole
    assert told[-1] == (there.size, there.size)
    client.put_object(Bucket="models", Key="support/v1/config.json", Body=b"{}")
    client.put_object(Bucket="models", Key="support/v1/more", Body=b"{}")
    client.delete_object(Bucket="models", Key="support/v1/tokenizer.json")
    found = verify("s3://models/support/v1")
    assert (found.missing, found.changed, found.extra) == (("tokenizer.json",), ("config.json",), ("more",))


@pytest.mark.parametrize("out", ["s3://models/my model", "s3://models/my model/"])
def test_the_next_command_takes_the_prefix_as_it_is(tiny_bundle: Path, client: Any, out: str) -> None:
    run = CliRunner().invoke(app, ["sagemaker", "pack", str(tiny_bundle), "--out", out, "--uncompressed"])
    assert "next: loraplex sagemaker deploy NAME --model-data 's3://models/my model/' --role" in run.output, run.output


def test_nothing_is_written_over(bundle: Path, client: Any) -> None:
    client.put_object(Bucket="models", Key="model.tar.gz", Body=b"mine")
    client.put_object(Bucket="models", Key="v1/else", Body=b"mine")
    client.put_object(Bucket="models", Key="new.tar.gz.old", Body=b"mine")
    with pytest.raises(ConfigurationError, match=r"s3://models/model.tar.gz: exists already") as caught:
        packed(bundle, "s3://models/model.tar.gz")
    assert "--force" in caught.value.remedy
    with pytest.raises(ConfigurationError, match=r"s3://models/v1/: holds objects already"):
        packed(bundle, "s3://models/v1/", uncompressed=True)
    with pytest.raises(ConfigurationError, match=r"s3://models/v1/: holds objects already"):
        packed(bundle, "s3://models/v1/", uncompressed=True, replaces=True)
    packed(bundle, "s3://models/new.tar.gz")
    packed(bundle, "s3://models/model.tar.gz", replaces=True)
    assert verify("s3://models/model.tar.gz").is_whole


def test_a_dry_run_asks_and_writes_nothing(bundle: Path, client: Any) -> None:
    packed(bundle, "s3://models/model.tar.gz", is_dry=True)
    assert keys(client) == set() and uploads(client) == []
    with pytest.raises(ConfigurationError, match=r"AWS refuses HeadBucket with 404"):
        packed(bundle, "s3://no-such-bucket/model.tar.gz", is_dry=True)


FAILURES: list[tuple[str, Exception, str, str]] = [
    ("head_bucket", refusal("HeadBucket", "404"), "HeadBucket with 404", "aws s3 mb"),
    ("head_bucket", refusal("HeadBucket", "403"), "HeadBucket with 403", "s3:ListBucket"),
    ("head_bucket", refusal("HeadBucket", "400"), "HeadBucket with 400", "aws sso login"),
    ("head_bucket", refusal("HeadBucket", "301"), "HeadBucket with 301", "AWS_REGION"),
    ("list_objects_v2", refusal("ListObjectsV2", "AccessDenied"), "ListObjectsV2 with AccessDenied", "s3:ListBucket"),
    ("put_object", refusal("PutObject", "AccessDenied"), "PutObject with AccessDenied: this is", "s3:PutObject"),
    ("upload_part", refusal("UploadPart", "ExpiredToken"), "UploadPart with ExpiredToken", "aws sso login"),
    ("upload_part", refusal("UploadPart", "SlowDown"), "UploadPart with SlowDown", "run the command again"),
    ("upload_part", EndpointConnectionError(endpoint_url="x"), "cannot be asked: EndpointConnectionError", "network"),
    ("complete_multipart_upload", refusal("CompleteMultipartUpload", "InternalError"), "with InternalError", "again"),
    ("create_multipart_upload", refusal("CreateMultipartUpload", "AccessDenied"), "AccessDenied", "s3:PutObject"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["archive", "prefix"])
@pytest.mark.parametrize(("call", "error", "message", "remedy"), FAILURES)
def test_a_failure_names_the_call_and_the_remedy_and_leaves_nothing(
    bundle: Path,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    call: str,
    error: Exception,
    message: str,
    remedy: str,
) -> None:
    if kind == "archive" and call == "put_object":
        pytest.skip("an archive is always uploaded in parts")
    fail(monkeypatch, client, {call: error}, after=2 if call in ("put_object", "upload_part") else 0)
    out = "s3://models/model.tar.gz" if kind == "archive" else "s3://models/model/"
    with pytest.raises(ConfigurationError, match=rf"s3://models/model.*{message}") as caught:
        packed(bundle, out, uncompressed=kind == "prefix")
    assert remedy in caught.value.remedy
    assert keys(client) == set() and uploads(client) == []


def test_what_cannot_be_removed_is_named(bundle: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that expire refuse the removal, too."""
    expired = {name: refusal(call, "ExpiredToken") for name, call in (
        ("upload_part", "UploadPart"), ("abort_multipart_upload", "AbortMultipartUpload"),
    )}  # fmt: skip
    fail(monkeypatch, client, expired, after=1)
    with pytest.raises(ConfigurationError, match="AbortMultipartUpload with ExpiredToken") as caught:
        packed(bundle, "s3://models/model.tar.gz")
    [left] = uploads(client)
    command = "aws s3api abort-multipart-upload --bucket models --key model.tar.gz --upload-id "
    assert command + left["UploadId"] in caught.value.remedy and "aws sso login" in caught.value.remedy
    client.abort_multipart_upload(Bucket="models", Key="model.tar.gz", UploadId=left["UploadId"])
    denied = {name: refusal(call, "AccessDenied") for name, call in (
        ("put_object", "PutObject"), ("delete_object", "DeleteObject"),
    )}  # fmt: skip
    fail(monkeypatch, client, denied, after=3)
    with pytest.raises(ConfigurationError, match="DeleteObject with AccessDenied") as caught:
        packed(bundle, "s3://models/model/", uncompressed=True)
    assert re.search(
        r"up to \d+ objects are left; remove them: aws s3 rm --recursive s3://models/model/", caught.value.remedy
    )


def test_a_bundle_that_would_not_load_uploads_nothing(bundle: Path, client: Any) -> None:
    (bundle / "model.safetensors").write_bytes((bundle / "model.safetensors").read_bytes()[:-1])
    for out, uncompressed in (("s3://models/model.tar.gz", False), ("s3://models/model/", True)):
        with pytest.raises(ConfigurationError, match="cut short"):
            packed(bundle, out, uncompressed=uncompressed)
    assert keys(client) == set() and uploads(client) == []


def test_credentials_and_boto3_are_needed(bundle: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigurationError, match="NoCredentialsError") as caught:
        packed(bundle, "s3://models/model.tar.gz")
    assert "AWS_PROFILE" in caught.value.remedy
    monkeypatch.setitem(sys.modules, "boto3", None)
    for ask in (lambda: packed(bundle, "s3://models/model.tar.gz"), lambda: verify("s3://models/model.tar.gz")):
        with pytest.raises(ConfigurationError, match="boto3, which is missing") as caught:
            ask()
        assert caught.value.remedy == "pip install 'loraplex[aws]'"


def test_verify_names_what_is_missing_or_damaged(bundle: Path, client: Any) -> None:
    with pytest.raises(ConfigurationError, match="GetObject with NoSuchKey"):
        verify("s3://models/nowhere.tar.gz")
    with pytest.raises(ConfigurationError, match="HeadBucket with 404"):
        verify("s3://no-such-bucket/model.tar.gz")
    with pytest.raises(ConfigurationError, match=r"holds no loraplex-manifest\.json"):
        verify("s3://models/nowhere/")
    packed(bundle, "s3://models/model.tar.gz")
    data = client.get_object(Bucket="models", Key="model.tar.gz")["Body"].read()
    client.put_object(Bucket="models", Key="cut.tar.gz", Body=data[:-1000])
    with pytest.raises(ConfigurationError, match="is damaged, or not complete"):
        verify("s3://models/cut.tar.gz")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_upload_leaves_nothing(bundle: Path, client: Any, sent: signal.Signals) -> None:
    with (bundle / "NOTICE").open("wb") as file:
        file.truncate(2 * 2**30)
    command = [
        sys.executable,
        "-m",
        "loraplex.cli.main",
        "sagemaker",
        "pack",
        str(bundle),
        "--out",
        "s3://models/m.tar.gz",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not uploads(client):
            assert time.monotonic() < end and process.poll() is None, process.stderr
            time.sleep(0.02)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + sent and "Traceback" not in said, said
    assert keys(client) == set() and uploads(client) == []
