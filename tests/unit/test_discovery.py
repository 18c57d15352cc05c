"""Which folders of a bundle are adapters, and which are left out with a word."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex.bundle import open_adapter, open_bundle
from loraplex.discovery import MOST_DEEP, Found, find_adapters, lines_of
from loraplex.errors import BundleError

CONFIG = "adapter_config.json"


def make(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / CONFIG).write_text("{}")
        (root / folder / "adapter_model.safetensors").write_bytes(b"")


@pytest.fixture
def find(tmp_path: Path) -> Callable[[], tuple[list[str], dict[str, str]]]:
    def find() -> tuple[list[str], dict[str, str]]:
        found = find_adapters(tmp_path, CONFIG)
        skipped = {os.path.relpath(one.path, tmp_path): one.reason for one in found.skipped}
        return [str(folder.relative_to(tmp_path)) for folder in found.folders], skipped

    return find


Find = Callable[[], tuple[list[str], dict[str, str]]]


def test_peft_saves_the_second_adapter_of_a_model_in_the_folder_of_the_first(tmp_path: Path, find: Find) -> None:
    make(tmp_path, "run", "run/isFraud", "run/isAngry", "only/isDone")
    assert find() == (["only/isDone", "run", "run/isAngry", "run/isFraud"], {})


def test_checkpoints_and_hidden_folders_are_named_if_they_hold_an_adapter(tmp_path: Path, find: Find) -> None:
    make(tmp_path, "run", "run/checkpoint-100", "run/checkpoint-200/isFraud", "lost/checkpoint-7", ".old/a/isDone")
    (tmp_path / "run" / "checkpoint-300").mkdir()
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    folders, skipped = find()
    assert folders == ["run"]
    assert skipped.keys() == {"run/checkpoint-100", "run/checkpoint-200", "lost/checkpoint-7", ".old"}
    assert skipped["run/checkpoint-100"] == "a trainer's checkpoint"
    assert "--adapter NAME=FOLDER" in skipped["lost/checkpoint-7"] and "hidden" in skipped[".old"]


def test_a_folder_may_look_like_a_checkpoint(tmp_path: Path, find: Find) -> None:
    make(tmp_path, "checkpoint", "checkpoint-best", "checkpoint-1b")
    assert find() == (["checkpoint", "checkpoint-1b", "checkpoint-best"], {})


def test_an_adapter_in_the_bundles_own_folder_is_named(tmp_path: Path, find: Find) -> None:
    make(tmp_path, ".", "isFraud")
    folders, skipped = find()
    assert folders == ["isFraud"] and "a folder of its own" in skipped["."]


def test_links_that_lead_back_and_folders_without_an_end_do_no_harm(tmp_path: Path, find: Find) -> None:
    make(tmp_path, "isFraud", "x/" * (MOST_DEEP - 1) + "isDeep", "y/" * MOST_DEEP + "isTooDeep")
    (tmp_path / "isFraud" / "again").symlink_to(tmp_path)
    (tmp_path / "latest").symlink_to(tmp_path / "isFraud")
    folders, skipped = find()
    assert [Path(folder).name for folder in folders] == ["isFraud", "latest", "isDeep"]
    assert skipped.pop("isFraud/again") == skipped.pop("latest/again") == "a link to a folder above it"
    [(folder, reason)] = skipped.items()
    assert folder.endswith("isTooDeep") and "folders deep" in reason


def test_a_folder_that_may_not_be_read_is_left_out(tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "isFraud", "lost+found")
    (tmp_path / "lost+found" / CONFIG).unlink()
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root
    assert find() == (["isFraud"], {"lost+found": "not readable: Permission denied"})


def test_the_log_has_a_line_for_each_folder_and_reason(tmp_path: Path) -> None:
    make(tmp_path, "run", "run/checkpoint-1", "run/checkpoint-2", "run/.old")
    assert sorted(lines_of(find_adapters(tmp_path, CONFIG).skipped)) == [
        f"left out of {tmp_path}/run: .old (hidden: its name begins with '.')",
        f"left out of {tmp_path}/run: checkpoint-1, checkpoint-2 (a trainer's checkpoint)",
    ]


def test_a_bundle_names_what_it_leaves_out_and_refuses_a_name_that_comes_twice(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    make(tmp_path, "run", "run/isFraud", "run/checkpoint-1")
    opened = open_bundle(tmp_path)
    assert [source.name for source in opened.adapters] == ["run", "isFraud"]
    assert [Path(one.path).name for one in opened.skipped] == ["checkpoint-1"]
    make(tmp_path, "later", "later/isFraud")
    with pytest.raises(BundleError, match=r"run/isFraud: a second classifier named 'isFraud'.*later/isFraud") as caught:
        open_bundle(tmp_path)
    assert "rename one" in caught.value.remedy and "begins with '.'" in caught.value.remedy


def test_a_folder_of_folders_says_which_adapters_it_holds(tmp_path: Path) -> None:
    make(tmp_path, "run/isFraud", "run/isAngry")
    with pytest.raises(BundleError, match=r"no adapter_config\.json in it, but in folders in it") as caught:
        open_adapter("run", tmp_path / "run")
    assert f"'{tmp_path}/run/isAngry', '{tmp_path}/run/isFraud'" in caught.value.remedy


def test_nothing_is_found_in_nothing(tmp_path: Path) -> None:
    assert find_adapters(tmp_path, CONFIG) == Found((), ())
