"""What a folder of the hub's cache stands for, and what it is called."""

import os
from pathlib import Path

import pytest

from loraplex.errors import BundleError
from loraplex.hub_cache import public_name, snapshot_of

FILES = ("config.json",)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("/models/llama", "llama"),
        ("/models/llama/", "llama"),
        ("models/../llama", "llama"),
        ("/cache/models--acme--tiny-base", "acme/tiny-base"),
        ("/cache/models--acme--tiny-base/snapshots/0123abc", "acme/tiny-base"),
        ("/cache/models--acme--tiny-base/snapshots/0123abc/", "acme/tiny-base"),
        ("/cache/models--gpt2/snapshots/0123abc", "gpt2"),
        ("/cache/models--acme--tiny-base/snapshots/0123abc/part", "part"),
        ("/data/snapshots/tuesday", "tuesday"),
        ("/", "base"),
    ],
)
def test_a_folder_is_called_as_it_is_given(given: str, name: str) -> None:
    assert public_name(given) == name


def test_this_folder_has_a_name_and_a_link_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v17").mkdir()
    (tmp_path / "prod").symlink_to(tmp_path / "v17")
    assert public_name(tmp_path / "prod") == "prod"
    monkeypatch.chdir(tmp_path / "v17")
    assert public_name(".") == "v17" and public_name("..") == tmp_path.name


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    cache = tmp_path / "models--acme--tiny-base"
    for commit in ("1" * 40, "2" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("2" * 40)
    return cache


def test_a_repository_stands_for_the_snapshot_of_main(cache: Path, tmp_path: Path) -> None:
    assert snapshot_of(cache, FILES) == cache / "snapshots" / ("2" * 40)
    (tmp_path / "link").symlink_to(cache)
    assert snapshot_of(tmp_path / "link", FILES).samefile(cache / "snapshots" / ("2" * 40))


@pytest.mark.parametrize("main", [None, "3" * 40, "../../elsewhere"])
def test_without_main_the_only_snapshot_counts(cache: Path, main: str | None) -> None:
    (cache / "refs" / "main").unlink() if main is None else (cache / "refs" / "main").write_text(main)
    with pytest.raises(BundleError, match="with 2 snapshots, and refs/main names none of them") as caught:
        snapshot_of(cache, FILES)
    assert str(cache / "snapshots" / ("1" * 40)) in caught.value.remedy
    (cache / "snapshots" / ("1" * 40)).rmdir()
    assert snapshot_of(cache, FILES).name == "2" * 40
    (cache / "snapshots" / ("2" * 40)).rmdir()
    with pytest.raises(BundleError, match="with 0 snapshots"):
        snapshot_of(cache, FILES)


def test_any_other_folder_stands_for_itself(cache: Path, tmp_path: Path) -> None:
    assert snapshot_of(tmp_path, FILES) == tmp_path
    assert snapshot_of(tmp_path / "nowhere", FILES) == tmp_path / "nowhere"
    (cache / "config.json").write_text(os.linesep)
    assert snapshot_of(cache, FILES) == cache
