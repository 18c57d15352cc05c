"""Archives and folders as they are written, and what `verify` says of them. The files are small and of no meaning."""

import gzip
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from loraplex.errors import BundleError
from loraplex.sagemaker.artifact.interrupts import caught
from loraplex.sagemaker.artifact.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from loraplex.sagemaker.artifact.output import Archive, LocalFile, LocalFolder, Output, tar_bytes
from loraplex.sagemaker.artifact.s3 import MAX_PARTS, PART_BYTES, Upload, connect, part_bytes, place_of
from loraplex.sagemaker.artifact.verify import Verified, verify

FILES = {
    "config.json": b"{}",
    "empty": b"",
    "isDone/adapter_config.json": b"{}",
    "isDone/weights": b"w" * 12_345,
    f"isDone/{'long' * 60}": b"long",
    "isDone/Größe": b"not ascii",
}


def restore_signals() -> None:
    """Set pytest's handlers again: after a signal, `caught` leaves its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Buffer:
    """A Stream into memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def check(self, num_bytes: int) -> None: ...

    def begin(self, num_bytes: int) -> None: ...

    def write(self, data: bytes) -> None:
        self.data += data

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


def write(output: Output, files: Mapping[str, bytes] = FILES) -> None:
    output.begin(10**6)
    for name, content in files.items():
        output.add(name, len(content), iter([content[:100], content[100:]]))
    output.commit()
    output.rollback()


def manifest_of(files: Mapping[str, bytes]) -> bytes:
    entries = {name: FileEntry(size=len(one), sha256=hashlib.sha256(one).hexdigest()) for name, one in files.items()}
    return Manifest(loraplex_version="1", base_name=None, adapters=(), files=entries).to_bytes()


def archive_at(path: Path, files: Mapping[str, bytes], level: int = 0) -> Path:
    write(Archive(LocalFile(path, None, replaces=True), level), files)
    return path


@pytest.fixture
def whole() -> dict[str, bytes]:
    return {**FILES, MANIFEST: manifest_of(FILES)}


# Writing


@pytest.mark.parametrize("level", [0, 1, 9])
def test_an_archive_holds_the_files_for_every_reader(tmp_path: Path, level: int) -> None:
    path = archive_at(tmp_path / "model.tar.gz", FILES, level)
    (tmp_path / "tar").mkdir()
    subprocess.run(["tar", "xzf", path, "-C", tmp_path / "tar"], check=True)
    unpacked = {
        one.relative_to(tmp_path / "tar").as_posix(): one.read_bytes()
        for one in (tmp_path / "tar").rglob("*")
        if one.is_file()
    }
    assert unpacked == FILES
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [one.name for one in members] == list(FILES)
    assert {(one.mtime, one.uid, one.gid, one.mode, one.uname, one.gname) for one in members} == {
        (0, 0, 0, 0o644, "", "")
    }
    assert path.stat().st_size <= tar_bytes(len(one) for one in FILES.values())
    assert path.read_bytes()[3:8] == bytes(5), "gzip's header has no name and no time"
    assert set(tmp_path.iterdir()) == {path, tmp_path / "tar"}


def test_an_archive_says_its_size_and_hash() -> None:
    stream = Buffer()
    archive = Archive(stream, 1)
    write(archive)
    assert archive.size == len(stream.data)
    assert archive.sha256 == hashlib.sha256(stream.data).hexdigest()


def test_a_file_of_more_than_8_gib_has_a_header_that_says_so() -> None:
    stream = Buffer()
    archive = Archive(stream, 9)
    size = 9 * 2**30
    archive.add("model.safetensors", size, iter(()))
    archive.commit()
    header = gzip.decompress(bytes(stream.data))
    with tarfile.open(fileobj=io.BytesIO(header)) as tar:
        first = tar.next()
    assert first is not None and (first.name, first.size) == ("model.safetensors", size)


def test_writing_takes_little_memory() -> None:
    """Of any file: 200 MB here, in a buffer that forgets them."""

    class Sink(Buffer):
        def write(self, data: bytes) -> None:
            pass

    archive, chunk = Archive(Sink(), 0), os.urandom(2**20)
    tracemalloc.start()
    try:
        archive.add("model.safetensors", 200 * 2**20, (bytes(chunk) for _ in range(200)))
        archive.commit()
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process grows beyond 4,000 bytes, which reads like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def as_archive(path: Path) -> Output:
    return Archive(LocalFile(path, None), 0)


OUTPUTS: list[tuple[Callable[[Path], Output], str]] = [(as_archive, "model.tar.gz"), (LocalFolder, "model")]


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize(("make", "name"), OUTPUTS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, make: Callable[[Path], Output], name: str) -> None:
    output = make(tmp_path / name)
    with pytest.raises(BundleError, match=f"{name}: cannot be written, and nothing of it was left: File too large"):
        try:
            write(output, {"weights": b"w" * 100_000})
        finally:
            output.rollback()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "name"), OUTPUTS)
def test_what_is_not_committed_leaves_nothing(tmp_path: Path, make: Callable[[Path], Output], name: str) -> None:
    output = make(tmp_path / name)
    output.begin(1)
    output.add("a/b", 1, iter([b"x"]))
    assert not (tmp_path / name).exists(), "nothing has the name before all is written"
    output.rollback()
    output.rollback()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "name"), OUTPUTS)
def test_a_place_that_cannot_be_written_is_refused_before(
    tmp_path: Path, make: Callable[[Path], Output], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / name).check(1000)
    with pytest.raises(BundleError, match=r"there is no folder '.*nowhere'"):
        make(tmp_path / "nowhere" / name).check(1000)
    with pytest.raises(BundleError, match=r"needs 10,000,000,000,000,000 bytes, and [\d,]+ are free"):
        make(tmp_path / name).check(10**16)
    (tmp_path / name).mkdir()
    with pytest.raises(BundleError, match="exists already"):
        make(tmp_path / name).check(1000)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(BundleError, match="exists already"):
        make(tmp_path / name).check(1000)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BundleError, match="cannot be written to"):
        make(tmp_path / "new.tar.gz").check(1000)


@pytest.mark.parametrize(("make", "ending"), [(as_archive, ".tar.gz"), (LocalFolder, "")])
def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path: Path, make: Callable[[Path], Output], ending: str) -> None:
    path = tmp_path / ("n" * (255 - len(ending)) + ending)
    make(path).check(1000)
    write(make(path))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(BundleError, match="File name too long") as caught:
        make(tmp_path / f"n{path.name}").check(1000)
    assert caught.value.remedy == "give a shorter name"


def test_a_compressed_archive_may_fit_so_that_it_is_only_warned_of(tmp_path: Path) -> None:
    told: list[str] = []
    Archive(LocalFile(tmp_path / "model.tar.gz", told.append), 1).check(10**16)
    [line] = told
    assert "up to 10,000,000,000,000,000 bytes are needed" in line


@pytest.mark.parametrize("num_bytes", [1, PART_BYTES * MAX_PARTS, PART_BYTES * MAX_PARTS + 1, 10**12, 5 * 2**40])
def test_an_upload_has_as_few_parts_as_s3_allows(num_bytes: int) -> None:
    size = part_bytes(num_bytes)
    assert size >= PART_BYTES and -(-num_bytes // size) <= MAX_PARTS
    assert size % 2**20 == 0 and size <= 5 * 2**30


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/", "s3:///key", "s3://b/k", "s3://bucket/a/../b",
                                     "s3://bucket//a", "s3://user@bucket/a", "https://bucket/key"])  # fmt: skip
def test_an_address_in_another_form_is_refused(address: str) -> None:
    with pytest.raises(BundleError, match="is no address in S3"):
        place_of(address)


# Verifying


def differences(found: Verified) -> dict[str, tuple[str, ...]]:
    named = {"missing": found.missing, "changed": found.changed, "extra": found.extra}
    return {what: names for what, names in named.items() if names}


def in_folder(tmp_path: Path, files: Mapping[str, bytes]) -> str:
    output = LocalFolder(tmp_path / "folder")
    write(output, files)
    return str(tmp_path / "folder")


def in_archive(tmp_path: Path, files: Mapping[str, bytes]) -> str:
    return str(archive_at(tmp_path / "model.tar.gz", files))


PLACES = pytest.mark.parametrize("place", [in_folder, in_archive])
Place = Callable[[Path, Mapping[str, bytes]], str]


@PLACES
def test_a_whole_artifact_is_whole(tmp_path: Path, whole: dict[str, bytes], place: Place) -> None:
    found = verify(place(tmp_path, whole))
    assert found.is_whole and found.manifest.files.keys() == FILES.keys()


@PLACES
def test_the_progress_ends_at_the_size(tmp_path: Path, whole: dict[str, bytes], place: Place) -> None:
    told: list[tuple[int, int | None]] = []
    where = Path(place(tmp_path, whole))
    verify(str(where), lambda done, total: told.append((done, total)))
    size = where.stat().st_size if where.is_file() else sum(len(one) for one in whole.values())
    assert told[-1] == (size, size) and {total for _, total in told} == {size}


@PLACES
def test_each_difference_is_named(tmp_path: Path, whole: dict[str, bytes], place: Place) -> None:
    del whole["empty"]
    whole |= {"config.json": b"[]", "isDone/weights": b"short", "code/evil.py": b"import os"}
    assert differences(verify(place(tmp_path, whole))) == {
        "missing": ("empty",),
        "changed": ("config.json", "isDone/weights"),
        "extra": ("code/evil.py",),
    }


@PLACES
def test_what_pack_did_not_make_is_refused(tmp_path: Path, place: Place) -> None:
    with pytest.raises(BundleError, match=f"holds no {MANIFEST}"):
        verify(place(tmp_path, FILES))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"format_version": 1}', b'{"format_version": 1, "files": {}}', b"[" * 10**5, b"\xff"]
)
def test_a_damaged_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BundleError, match="is damaged"):
        read_manifest("x", text)


def test_a_manifest_of_a_later_format_is_refused() -> None:
    with pytest.raises(BundleError, match="has the format 2, and this Loraplex reads 1"):
        read_manifest("x", b'{"format_version": 2}')


def test_links_in_a_folder_are_not_followed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    root = Path(in_folder(tmp_path, whole))
    (root / "config.json").rename(tmp_path / "elsewhere")
    (root / "config.json").symlink_to(tmp_path / "elsewhere")
    (root / "more").symlink_to(tmp_path)
    assert differences(verify(str(root))) == {"changed": ("config.json",), "extra": ("more",)}


def test_no_name_or_type_in_an_archive_is_trusted(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {**whole, "../outside": b"x", "/absolute": b"y"}.items():
            member = tarfile.TarInfo(f"./{name}" if name == "empty" else name)  # as `tar -C FOLDER .` writes it
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        again = tarfile.TarInfo("config.json")
        tar.addfile(again, io.BytesIO())
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.iterdir())
    found = verify(str(path))
    assert differences(found) == {"changed": ("config.json",), "extra": ("../outside", "/absolute", "link")}
    assert set(tmp_path.iterdir()) == before


def as_folder(name: str, mode: int = 0o755) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    return member


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (as_folder("."), {}),
        (as_folder("./isDone/"), {}),
        (as_folder("config.json"), {"changed": ("config.json",)}),
        (as_folder(MANIFEST), {"changed": (MANIFEST,)}),
        (as_folder("isDone", 0), {"changed": ("isDone",)}),
        (as_folder("more"), {"extra": ("more",)}),
        (as_folder("../evildir"), {"extra": ("../evildir",)}),
        (as_folder("/tmp"), {"extra": ("/tmp",)}),
        (as_folder("isDone/../.."), {"extra": ("isDone/../..",)}),
    ],
)
def test_the_folders_in_an_archive_are_those_of_its_files(
    tmp_path: Path, whole: dict[str, bytes], added: tarfile.TarInfo, expected: dict[str, tuple[str, ...]]
) -> None:
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in whole.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.addfile(added)
    assert differences(verify(str(path))) == expected


@pytest.mark.parametrize("mode", [0, 0o200, 0o4644])
def test_a_file_that_unpacks_unreadable_or_with_special_rights_is_changed(
    tmp_path: Path, whole: dict[str, bytes], mode: int
) -> None:
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in whole.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode if name == "empty" else 0o600
            tar.addfile(member, io.BytesIO(content))
    assert differences(verify(str(path))) == {"changed": ("empty",)}


def test_an_empty_folder_is_extra(tmp_path: Path, whole: dict[str, bytes]) -> None:
    root = Path(in_folder(tmp_path, whole))
    (root / "isDone" / "more").mkdir()
    assert differences(verify(str(root))) == {"extra": ("isDone/more",)}


def test_nothing_may_follow_the_end_of_an_archive(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = Path(in_archive(tmp_path, whole))
    data = path.read_bytes()
    path.write_bytes(data + gzip.compress(bytes(10_240)))
    assert verify(str(path)).is_whole, "zeros pad an archive"
    unzipped = gzip.decompress(data)
    end = len(unzipped.rstrip(b"\0")) // 512 * 512 + 512
    for more in (data + gzip.compress(unzipped), gzip.compress(unzipped[:end] + b"x" * 512 + bytes(1024))):
        path.write_bytes(more)
        with pytest.raises(BundleError, match="it holds data after its end"):
            verify(str(path))


@pytest.mark.parametrize("name", ["../config.json", "/config.json", "a/../b", "a//b", "."])
def test_a_manifest_names_files_below_it(name: str) -> None:
    with pytest.raises(BundleError, match="is damaged"):
        read_manifest("x", manifest_of({"plain": b""}).replace(b"plain", name.encode()))


def test_every_cut_and_every_changed_byte_is_found(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = Path(in_archive(tmp_path, whole))
    data = path.read_bytes()
    for cut in range(0, len(data), 997):
        path.write_bytes(data[:cut])
        with pytest.raises(BundleError, match=r"is damaged, or not complete|holds no"):
            verify(str(path))
    for at in range(20, len(data) - 8, 1009):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=r"is damaged, or not complete|holds no"):
            verify(str(path))


def test_a_manifest_is_the_same_bytes_whatever_the_order(whole: dict[str, bytes]) -> None:
    assert manifest_of(dict(reversed(FILES.items()))) == whole[MANIFEST]
    assert json.loads(whole[MANIFEST])["format_version"] == 1


def test_where_nothing_is_there_is_nothing_to_verify(tmp_path: Path) -> None:
    for name in ("nowhere", "nowhere.tar.gz"):
        with pytest.raises(BundleError, match=r"nowhere"):
            verify(str(tmp_path / name))


@pytest.mark.parametrize(
    ("environment", "region"),
    [
        ({"AWS_REGION": "eu-west-1"}, "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-1"),
    ],
)
def test_s3_is_asked_in_the_region_that_the_variables_name(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], region: str
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert connect(place_of("s3://bucket/key")).meta.region_name == region


def test_an_interrupt_while_an_upload_is_made_removes_it() -> None:
    """Nobody would know its id."""
    aborted = []

    class Client:
        def create_multipart_upload(self, **given: Any) -> dict[str, str]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return {"UploadId": "made"}

        def abort_multipart_upload(self, **given: Any) -> None:
            aborted.append(given["UploadId"])

    upload = Upload(Client(), place_of("s3://bucket/key"), 10)
    with pytest.raises(SystemExit), caught():
        try:
            upload.begin()
        finally:
            upload.rollback()
    restore_signals()
    assert aborted == ["made"]
