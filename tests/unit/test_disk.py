"""A file that changes while it is read is noticed."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from loraplex import Loraplex
from loraplex.adapters.archive import unpack
from loraplex.adapters.base_name import ServedBase
from loraplex.adapters.checkpoint import read_unidentified
from loraplex.adapters.source import resolve_source
from loraplex.bundle import AdapterSource, open_bundle
from loraplex.cli.classify import _read as read_text
from loraplex.disk import unchanged
from loraplex.errors import AdapterError, BundleError, ConfigurationError
from loraplex.executors.capabilities import NATIVE
from loraplex.model.loader import read_config, read_layers
from loraplex.service.classifiers import ClassifierChecker
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer


def rewrite(path: Path) -> None:
    """The same bytes again, and the old time: as `cp -p` leaves a file."""
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    new.rename(path)


@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_change_is_an_error_in_place_of_any_other(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "x"
    for fails in (False, True):
        path.write_bytes(b"content")
        with pytest.raises(BundleError, match="x: changed while it was read"), unchanged([path], BundleError):
            change(path)
            if fails:
                raise ValueError("half of it makes no sense")


def test_a_file_that_appears_is_a_change_and_one_that_stays_missing_is_not(tmp_path: Path) -> None:
    with unchanged([tmp_path / "x"], BundleError):
        pass
    with pytest.raises(BundleError, match="changed while it was read"), unchanged([tmp_path / "x"], BundleError):
        (tmp_path / "x").touch()


def test_only_a_file_that_was_written_just_now_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    started = time.monotonic()
    with unchanged([tmp_path / "x"], BundleError):
        assert time.time() - (tmp_path / "x").stat().st_ctime >= 0.009
    for _ in range(20):
        with unchanged([tmp_path / "x"], BundleError):
            pass
    assert time.monotonic() - started < 0.15


@pytest.mark.parametrize("name", ["classifier.yaml", "adapter_config.json", "adapter_model.safetensors"])
def test_a_classifier_is_of_one_version(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A folder whose contract or config changes while its weights are read is no version."""
    folder = tmp_path / "task0"
    folder.mkdir()
    for file in (tiny_bundle / "task0").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    layers, num_embeddings = read_layers(read_config(tiny_bundle), tiny_bundle)
    checker = ClassifierChecker(
        layers, ChatTemplate.of(Tokenizer(tiny_bundle, num_embeddings)), 256, NATIVE, ServedBase(tiny_bundle)
    )
    source = AdapterSource(name="task0", path=folder, contract=None)
    assert checker.check(source).source.contract is not None

    def change_and_read(*args: Any) -> Any:
        replace(folder / name)
        return read_unidentified(*args)

    monkeypatch.setattr("loraplex.service.classifiers.read_unidentified", change_and_read)
    with pytest.raises(AdapterError, match=f"{name}: changed while it was read"):
        checker.check(source)


def test_an_archive_that_changes_while_it_is_unpacked_is_not_cached(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "x.tar.gz"
    os.system(f"tar czf {archive} -C {tiny_bundle / 'task0'} .")

    def unpack_and_change(*args: Any) -> Path:
        found = unpack(*args)
        rewrite(archive)
        return found

    def resolve() -> Path:
        return resolve_source(archive, roots=[tmp_path], cache_dir=tmp_path / "cache").path

    with monkeypatch.context() as patch:
        patch.setattr("loraplex.adapters.local.unpack", unpack_and_change)
        with pytest.raises(AdapterError, match="changed while it was read"):
            resolve()
    assert not list((tmp_path / "cache").rglob("adapter_config.json"))
    assert (resolve() / "adapter_config.json").is_file()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
BASE_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]


@pytest.mark.parametrize(
    "name", [*BASE_FILES, "task0/classifier.yaml", "task0/adapter_config.json", "task0/adapter_model.safetensors"]
)
def test_a_git_lfs_pointer_is_named_whatever_file_it_stands_for(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / name).write_text(POINTER)
    with pytest.raises(ConfigurationError) as caught, Loraplex.load(bundle):
        pass
    assert caught.value.message == f"{bundle / name}: is a Git LFS pointer and not the file itself"
    assert caught.value.remedy == "run `git lfs pull` in its repository"


def test_a_shard_that_is_a_git_lfs_pointer_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "model.safetensors").rename(bundle / "a.safetensors")
    (bundle / "b.safetensors").write_text(POINTER)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (bundle / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BundleError, match=r"b\.safetensors: is a Git LFS pointer"):
        open_bundle(bundle)


def test_an_archive_or_a_text_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_text(POINTER)
    with pytest.raises(AdapterError, match=r"x\.tar\.gz: is a Git LFS pointer"):
        resolve_source("x.tar.gz", roots=[tmp_path], cache_dir=tmp_path / "cache")
    (tmp_path / "x.txt").write_text(POINTER)
    with pytest.raises(ConfigurationError, match=r"x\.txt: is a Git LFS pointer"):
        read_text(tmp_path / "x.txt")
