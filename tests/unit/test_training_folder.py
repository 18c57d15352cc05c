"""What a run finds and leaves in its folder: nothing is lost by an interrupt, a kill or a second run."""

import csv
import os
from pathlib import Path

import pytest

import tiny
from dialogues import TEMPLATE, Recorder, prepared, write
from loraplex.errors import ConfigurationError
from loraplex.training.fit import Told
from loraplex.training.log import Log
from loraplex.training.output import check_out, locked
from loraplex.training.run import train
from loraplex.training.settings import TrainSettings
from loraplex.training.trainee import Trainee

SETTINGS = TrainSettings(template=TEMPLATE, epochs=1, rank=4, dtype="float32", evaluations=2)  # 8 steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder, tiny.FAMILIES["llama"])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "data.jsonl", 150)


@pytest.fixture(autouse=True)
def unchanged_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.training.run.choose_threads", lambda: None)


def rows_of(log: Path) -> list[dict[str, str]]:
    with log.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_is_not_forgotten_without_a_question(tmp_path: Path, base: Path, data: Path) -> None:
    run = prepared(base, data, SETTINGS)
    train(run, tmp_path / "out", SETTINGS, Recorder(3))
    state = tmp_path / "out" / ".training" / "state.pt"
    before = state.read_bytes()
    with pytest.raises(ConfigurationError, match="holds the state of an interrupted run"):
        train(run, tmp_path / "out", SETTINGS, Recorder())

    class Ended(Recorder):
        def step(self, told: Told) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "out", SETTINGS, Ended(), overwrite=True)
    assert state.read_bytes() == before, "the new run has no state yet"


def test_an_interrupt_before_the_first_evaluation_replaces_nothing(tmp_path: Path, base: Path, data: Path) -> None:
    folder = tmp_path / "out" / "isFraud"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("good")
    watcher = Recorder(2)
    assert not train(prepared(base, data, SETTINGS), tmp_path / "out", SETTINGS, watcher)
    assert (folder / "adapter_config.json").read_text() == "good" and not watcher.qualities
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [".training", "isFraud"]
    assert (tmp_path / "out" / ".training" / "state.pt").is_file()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_only_adapters_are_replaced(
    tmp_path: Path, base: Path, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainee, "load", None)
    path, elsewhere = tmp_path / "out" / "isFraud", tmp_path / "elsewhere"
    path.parent.mkdir()
    elsewhere.mkdir()
    (elsewhere / "adapter_config.json").write_text("{}")
    match kind:
        case "file":
            path.write_text("mine")
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to(elsewhere)
    with pytest.raises(ConfigurationError, match=r"isFraud: is there, and is no folder with adapter_config\.json"):
        train(prepared(base, data, SETTINGS), tmp_path / "out", SETTINGS, Recorder(), overwrite=True)
    assert os.path.lexists(path)


def test_a_kill_between_the_old_and_the_new_adapter_loses_none(tmp_path: Path, base: Path) -> None:
    old, part = tmp_path / ".done.old", tmp_path / ".done.part"
    for folder in (old, part):
        folder.mkdir()
    (old / "adapter_config.json").write_text("old")
    check_out(tmp_path, base, ["done"])
    assert (tmp_path / "done" / "adapter_config.json").read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["done"]


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, base: Path, data: Path) -> None:
    run = prepared(base, data, SETTINGS)
    with locked(tmp_path / ".training", tmp_path):
        with pytest.raises(ConfigurationError, match="another run writes there now"):
            train(run, tmp_path, SETTINGS, Recorder())
    train(run, tmp_path, SETTINGS, Recorder(1))


def test_a_log_keeps_what_is_whole(tmp_path: Path) -> None:
    def log(first_step: int) -> Log:
        return Log(tmp_path, ["a"], first_step)

    told = Told(
        step=1, num_steps=9, epoch=0.5, losses=[0.25], num_tokens=10, seconds=2.0, learning_rate=0.1, peak_bytes=7
    )
    first = log(0)
    for step in (1, 2, 3):
        told.step = step
        first.step(told)
    first.close()
    path = tmp_path / "log.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0" * 200_000 + b"\r\n", b"2,\r\n", b'"2\r\n', lines[3], b"3,0.5,0.1"]))
    log(3).close()
    assert [row["step"] for row in rows_of(path)] == ["1", "3"]
    path.write_text("epoch,loss\n1,2\n")
    log(3).close()
    assert rows_of(path) == []
