"""Which folders, archives and addresses are let in. What comes over a network is in tests/api/test_source_remote.py."""

import errno
import gzip
import io
import os
import shlex
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from loraplex.adapters.files import ResolvedSource, SourceLimits
from loraplex.adapters.source import resolve_source
from loraplex.bundle import PROMPT_FILES
from loraplex.errors import AdapterError

CONFIG, WEIGHTS, CONTRACT = "adapter_config.json", "adapter_model.safetensors", "classifier.yaml"
SMALL = SourceLimits(max_bytes=100_000, max_text_bytes=1000, max_members=20)

Resolve = Callable[..., ResolvedSource]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An adapter root with `isDone` in it."""
    make_adapter(tmp_path / "root" / "isDone")
    return tmp_path / "root"


@pytest.fixture
def resolve(root: Path, tmp_path: Path) -> Resolve:
    def resolve(source: str | Path, *roots: Path, limits: SourceLimits = SMALL) -> ResolvedSource:
        return resolve_source(source, roots=roots or (root,), cache_dir=tmp_path / "cache", limits=limits)

    return resolve


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_bytes(b"weights")
    return folder


def member(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def adapter_members(folder: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(folder + CONFIG, b"{}"), member(folder + WEIGHTS, b"weights"), member(folder + CONTRACT, b"a: b")]


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def make_archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    path.write_bytes(gzip.compress(tar_bytes(*members)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Folders


def test_a_folder_below_a_root_is_used_where_it_is(root: Path, resolve: Resolve, tmp_path: Path) -> None:
    for named in ("isDone", "./isDone/", root / "isDone", f"{root}/isDone", "isDone/../isDone"):
        resolved = resolve(named)
        assert resolved.path == root / "isDone" and not resolved.remote
        assert resolve(resolved.source, tmp_path).path == resolved.path, "the source must name it again"
    assert resolve("isDone").source == str(root / "isDone")
    assert resolve(root / "isDone", root / "isDone").path == root / "isDone", "a root may be an adapter"


def test_a_relative_path_is_tried_below_each_root(root: Path, resolve: Resolve, tmp_path: Path) -> None:
    second = make_adapter(tmp_path / "second" / "isFraud").parent
    assert resolve("isFraud", root, second).path == second / "isFraud"
    make_adapter(root / "isFraud")
    assert resolve("isFraud", root, second).path == root / "isFraud"


@pytest.mark.parametrize("named", ["../outside", "isDone/../../outside", "{tmp}/outside", "/etc", "../nowhere", "link"])
def test_what_leads_out_of_the_roots_is_refused_alike(root: Path, resolve: Resolve, named: str) -> None:
    make_adapter(root.parent / "outside")
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(AdapterError, match="does not lie below an adapter root") as caught:
        resolve(named.format(tmp=root.parent))
    assert "--adapter-root" in caught.value.remedy


def test_a_folder_whose_name_begins_like_a_root_is_outside(root: Path, resolve: Resolve) -> None:
    make_adapter(root.parent / "root2" / "isDone")
    with pytest.raises(AdapterError, match="does not lie below"):
        resolve("../root2/isDone")


def test_without_roots_no_path_is_let_in(root: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not lie below"):
        resolve_source(root / "isDone", roots=(), cache_dir=tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CONTRACT, *PROMPT_FILES])
def test_a_file_that_is_a_link_leads_out_too(root: Path, resolve: Resolve, name: str) -> None:
    outside = root.parent / "secret"
    outside.write_text("secret")
    (root / "isDone" / name).unlink(missing_ok=True)
    (root / "isDone" / name).symlink_to(outside)
    with pytest.raises(AdapterError, match=f"its {name} is a link that points outside"):
        resolve("isDone")


def test_links_that_stay_below_a_root_are_followed_and_kept_in_the_source(root: Path, resolve: Resolve) -> None:
    (root / "current").symlink_to("isDone")
    resolved = resolve("current")
    assert resolved.path == root / "isDone" and resolved.source == str(root / "current")
    (root / "snapshot").mkdir()
    for name in (CONFIG, WEIGHTS):
        (root / "snapshot" / name).symlink_to(Path("..", "isDone", name))  # as in the hub's cache
    assert resolve("snapshot").path == root / "snapshot"


@pytest.mark.parametrize(
    "named",
    ["", "a\0b", "a\nb", "x" * 5000, "\ud800", "x" * 300, "a/" * 2000, "loop", "isDone/" + CONFIG, "~/x", "fifo"],
)
def test_what_is_no_folder_is_our_error(root: Path, resolve: Resolve, named: str) -> None:
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    with pytest.raises(AdapterError) as caught:
        resolve(named)
    assert caught.value.message.isprintable() and len(caught.value.message) < 5000


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_or_irregular_file_is_named(root: Path, resolve: Resolve, name: str) -> None:
    (root / "isDone" / name).unlink()
    with pytest.raises(AdapterError, match=f"no {name}"):
        resolve("isDone")
    os.mkfifo(root / "isDone" / name)
    with pytest.raises(AdapterError, match=f"no {name}"):
        resolve("isDone")


@pytest.mark.parametrize(("name", "size"), [(CONFIG, 1001), (CONTRACT, 1001), (WEIGHTS, 100_001)])
def test_a_file_over_its_limit_is_refused(root: Path, resolve: Resolve, name: str, size: int) -> None:
    (root / "isDone" / name).write_bytes(bytes(size - 1))
    resolve("isDone")
    (root / "isDone" / name).write_bytes(bytes(size))
    with pytest.raises(AdapterError, match=f"{name} has {size:,} bytes"):
        resolve("isDone")


def test_an_unreadable_folder_is_our_error(root: Path, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)  # the tests may run as root, whom nothing is denied
    with pytest.raises(AdapterError, match=r"cannot be read.*Permission denied"):
        resolve("isDone")


def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    root: Path, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "isDone"
    (folder / WEIGHTS).unlink()
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a.lora_A.weight": shared.T, "a.lora_B.weight": shared}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="can run code") as caught:
        resolve("isDone")
    command = shlex.split(caught.value.remedy[caught.value.remedy.index("python -c") :])
    assert command[:2] == ["python", "-c"] and len(command) == 3
    monkeypatch.chdir(folder)
    exec(command[2], {})
    assert torch.equal(load_file(folder / WEIGHTS)["a.lora_A.weight"], shared.T)
    assert resolve("isDone").path == folder, "a pickle beside safetensors is not read, and harmless"


# Addresses


@pytest.mark.parametrize(
    "named",
    [
        "s3://AKIA:secret@bucket/key",
        "s3://AKIA:sec/ret@bucket/key",
        "s3://bucket/key?X-Amz-Signature=secret",
        "s3://bucket/key#secret",
        "hf://user:secret@org/name",
        "hf://org/name?token=secret",
        "https://user:secret@host/adapter.tar.gz",
        "user:secret@x://y",
    ],
)
def test_credentials_are_refused_and_not_shown(resolve: Resolve, named: str) -> None:
    with pytest.raises(AdapterError, match="is not an address") as caught:
        resolve(named)
    assert "sec" not in str(caught.value) and "s3://bucket/folder" in caught.value.remedy


@pytest.mark.parametrize(
    "named",
    (
        "hf:// hf://name hf://org/.. hf://org/name/../x hf://org/name@../../x hf://org/name@/etc/passwd "
        "hf://org/na*me hf://org/name/[a] s3:// s3:///key s3://b s3://bucket//key s3://bucket/../key "
        "gs://bucket/key file:///etc S3://bucket/key :// "
    ).split(),
)
def test_addresses_that_could_lead_elsewhere_are_refused(resolve: Resolve, named: str) -> None:
    with pytest.raises(AdapterError, match="is not an address"):
        resolve(named)


def test_s3_without_boto3_says_what_to_install(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(AdapterError, match="boto3") as caught:
        resolve("s3://bucket/isDone")
    assert caught.value.remedy == "pip install 'loraplex[aws]'"


# Archives


@pytest.mark.parametrize("folder", ["", "./", "isDone/", "./isDone/"])
def test_an_archive_is_unpacked_from_its_root_or_its_one_folder(root: Path, resolve: Resolve, folder: str) -> None:
    others = [member("README.md"), member("._" + CONFIG), member("isDone", b"", type=tarfile.DIRTYPE), member("a/b/c")]
    checkpoint = [member(f"isDone/checkpoint-9/{CONFIG}", b"wrong")]
    prompt = {name: f"a {name}".encode() for name in PROMPT_FILES}
    beside = [member(folder + name, content) for name, content in prompt.items()]
    make_archive(root / "isDone.tar.gz", *others, *adapter_members(folder), *beside, *checkpoint)
    resolved = resolve("isDone.tar.gz")
    assert contents(resolved.path) == {CONFIG: b"{}", WEIGHTS: b"weights", CONTRACT: b"a: b", **prompt}
    assert resolved.source == str(root / "isDone.tar.gz") and not resolved.remote


def test_an_adapter_at_the_root_wins_over_a_trainers_checkpoints(root: Path, resolve: Resolve) -> None:
    checkpoint = [member(f"checkpoint-9/{CONFIG}", b"wrong"), member(f"checkpoint-9/{WEIGHTS}", b"wrong")]
    make_archive(root / "isDone.tar.gz", *checkpoint, *adapter_members())
    assert contents(resolve("isDone.tar.gz").path)[WEIGHTS] == b"weights"


def test_an_archive_is_unpacked_once_and_again_when_it_changes(root: Path, resolve: Resolve) -> None:
    archive = make_archive(root / "isDone.tar.gz", *adapter_members())
    first = resolve("isDone.tar.gz").path
    made = (first / WEIGHTS).stat().st_ino
    assert resolve("isDone.tar.gz").path == first and (first / WEIGHTS).stat().st_ino == made
    make_archive(archive, member(CONFIG, b"{}"), member(WEIGHTS, b"changed"))
    second = resolve("isDone.tar.gz").path
    assert contents(second) == {CONFIG: b"{}", WEIGHTS: b"changed"}
    assert contents(first)[WEIGHTS] == b"weights", "the old version may still be in use"
    (second / WEIGHTS).unlink()
    assert contents(resolve("isDone.tar.gz").path)[WEIGHTS] == b"changed", "a damaged copy is made again"


@pytest.mark.parametrize(
    ("bad", "wrong"),
    [
        (member("../" + CONFIG), "points outside"),
        (member("a/../../" + CONFIG), "points outside"),
        (member("/" + CONFIG), "points outside"),
        (member("/etc/passwd"), "points outside"),
        (member(CONTRACT, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
        (member(CONTRACT, b"", type=tarfile.LNKTYPE, linkname="../x"), "link"),
        (member("folder", b"", type=tarfile.SYMTYPE, linkname="/etc"), "link"),
        (member(CONTRACT, b"", type=tarfile.CHRTYPE), "device"),
        (member(CONTRACT, b"", type=tarfile.FIFOTYPE), "device"),
        (member(CONFIG), "twice"),
        (member(CONTRACT, bytes(1001)), r"classifier\.yaml has 1,001 bytes"),
    ],
)
def test_a_hostile_member_is_refused(
    root: Path, resolve: Resolve, bad: tuple[tarfile.TarInfo, bytes], wrong: str
) -> None:
    make_archive(root / "isDone.tar.gz", member(CONFIG, b"{}"), member(WEIGHTS), bad)
    with pytest.raises(AdapterError, match=wrong):
        resolve("isDone.tar.gz")
    assert not [path for path in (root.parent / "cache").rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize("name", [WEIGHTS, "junk", "adapter_model.bin", "deep/er/junk"])
def test_a_bomb_is_stopped_at_the_limit(root: Path, resolve: Resolve, name: str) -> None:
    make_archive(root / "isDone.tar.gz", *adapter_members("a/"), member(name, bytes(200_000)))
    with pytest.raises(AdapterError, match=r"and 100,000 are allowed") as caught:
        resolve("isDone.tar.gz")
    assert caught.value.remedy == "no setting raises this limit; save the adapter alone, without the base"


def test_a_config_above_the_limit_is_to_be_shortened(root: Path, resolve: Resolve) -> None:
    (root / "isDone" / CONFIG).write_bytes(b" " * 1001)
    with pytest.raises(AdapterError, match=r"config\.json has 1,001 bytes or more, and 1,000 are allowed") as caught:
        resolve("isDone")
    assert caught.value.remedy == "no setting raises this limit; shorten the file"


@pytest.mark.parametrize("at", ["after the end", "in a name", "in names"])
def test_a_bomb_outside_the_members_is_stopped_before_it_is_unpacked(root: Path, resolve: Resolve, at: str) -> None:
    """64 MiB of zeros, against what Python holds at most while it refuses them."""
    if at == "after the end":
        raw = tar_bytes(*adapter_members()) + bytes(64 * 2**20)
    else:
        header = tarfile.TarInfo("././@LongLink")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, 64 * 2**20 if at == "in a name" else 2**18
        raw = (header.tobuf() + bytes(header.size)) * (1 if at == "in a name" else 256)
    (root / "isDone.tar.gz").write_bytes(gzip.compress(raw, 1))
    tracemalloc.start()
    with pytest.raises(AdapterError, match=r"are allowed|headers are too long"):
        resolve("isDone.tar.gz", limits=SourceLimits(max_bytes=2**20 if at == "after the end" else 2**30))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_too_many_members_and_a_size_below_zero_end(root: Path, resolve: Resolve) -> None:
    make_archive(root / "isDone.tar.gz", *[member(f"f{number}") for number in range(21)])
    with pytest.raises(AdapterError, match="more than 20 members"):
        resolve("isDone.tar.gz")
    backwards, _ = member(CONFIG, b"")
    backwards.pax_headers = {"size": "-2048"}
    make_archive(root / "isDone.tar.gz", (backwards, b""), *adapter_members())
    with pytest.raises(AdapterError, match="cannot be unpacked"):
        resolve("isDone.tar.gz")


def test_a_sparse_member_is_refused(root: Path, resolve: Resolve) -> None:
    make_archive(root / "isDone.tar.gz", member(CONFIG), member(WEIGHTS, b"x", type=tarfile.GNUTYPE_SPARSE))
    with pytest.raises(AdapterError, match=r"sparse|cannot be unpacked"):
        resolve("isDone.tar.gz")


def test_what_an_archive_lacks_is_named(root: Path, resolve: Resolve) -> None:
    archive = root / "isDone.tar.gz"
    for members, wrong in (
        ([], f"no {CONFIG}"),
        ([member("isDone/" + CONFIG)], f"no {WEIGHTS}"),
        ([member(CONFIG), member("adapter_model.bin")], "pickle"),
        ([member("isDone/adapter_model.bin")], "pickle"),
        (adapter_members("a/") + adapter_members("b/"), "several adapters: 'a', 'b'"),
    ):
        make_archive(archive, *members)
        with pytest.raises(AdapterError, match=wrong):
            resolve("isDone.tar.gz")


@pytest.mark.parametrize("damage", ["empty", "no gzip", "no tar", "cut", "flipped"])
def test_a_damaged_archive_is_our_error(root: Path, resolve: Resolve, damage: str) -> None:
    weights = os.urandom(5000)
    whole = gzip.compress(tar_bytes(member(CONFIG, b"{}"), member(WEIGHTS, weights)))
    middle = len(whole) // 2
    (root / "isDone.tar.gz").write_bytes(
        {
            "empty": b"",
            "no gzip": b"PK\x03\x04",
            "no tar": gzip.compress(b"text" * 1000),
            "cut": whole[:-4],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        }[damage]
    )
    with pytest.raises(AdapterError, match=r"cannot be unpacked|no adapter_config\.json"):
        resolve("isDone.tar.gz")


PARTS = st.sampled_from(["..", ".", "", "a", "b", "\udcff", CONFIG, WEIGHTS, CONTRACT, "adapter_model.bin"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


def all_that_is_unpacked(raw: bytes) -> set[str]:
    """Resolve an archive in a folder of its own; the files that appear anywhere but where they belong."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "isDone.tar.gz").write_bytes(raw)
        try:
            path = resolve_source("isDone.tar.gz", roots=(home,), cache_dir=home / "deep" / "cache", limits=SMALL).path
        except AdapterError as error:
            assert error.remedy and str(error).encode()
            path = home / "nothing"
        else:
            assert {CONFIG, WEIGHTS} <= set(contents(path)) <= {CONFIG, WEIGHTS, CONTRACT}
            assert not any(file.is_symlink() for file in path.iterdir())
        files = {file for file in home.rglob("*") if not file.is_dir() and file.parent != path}
        return {file.name for file in files} - {"isDone.tar.gz", "lock"}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMES, KINDS), max_size=6))
def test_whatever_its_members_an_archive_yields_an_adapter_or_an_error(names: list[tuple[str, bytes]]) -> None:
    members = [
        member(name, b"x" if kind == tarfile.REGTYPE else b"", type=kind, linkname="../../x") for name, kind in names
    ]
    assert not all_that_is_unpacked(gzip.compress(tar_bytes(*members), 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3 * 1024 - 1), st.integers(0, 255)), max_size=8))
def test_whatever_its_headers_say_an_archive_yields_an_adapter_or_an_error(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(tar_bytes(*adapter_members()))
    for place, value in changes:
        raw[place] = value
        start = place // 1024 * 1024
        if place % 1024 < 512:  # a header whose checksum is right is believed
            header = raw[start : start + 512]
            raw[start + 148 : start + 156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    assert not all_that_is_unpacked(gzip.compress(bytes(raw), 1))
