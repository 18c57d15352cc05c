"""`loraplex train` on the command line: what it reports, what it refuses, and how it ends."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tiny
from dialogues import TEMPLATE, write, write_rows
from loraplex import Loraplex
from loraplex.cli.main import app
from loraplex.cli.train import _Screen
from loraplex.training.settings import TrainSettings


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


@pytest.mark.parametrize("labels", [[True, False], [True] * 5 + [False] * 5, [True] + [False] * 9, ["a", "b", "c"] * 3])
def test_ten_lines_give_a_clear_result(tmp_path: Path, base: Path, labels: list[Any]) -> None:
    words = {True: "thanks", False: "no", "a": "order", "b": "seat", "c": "room"}
    rows = [{"text": f"Customer: {words[label]} {index}", "label": label} for index, label in enumerate(labels)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    options = ["--base", base, "--data", data, "--out", tmp_path / "out", "--classifier", "isDone", "--rank", 4]
    done = CliRunner().invoke(app, ["train", *map(str, options), "--template", TEMPLATE, "--learning-rate", "0.01"])
    assert done.exit_code == 0, done.output
    assert "nothing says how good they are" in done.output and "fewer than 10 conversations with" in done.output
    with Loraplex.load(tmp_path / "out", dtype="float32") as loraplex:
        right = [
            loraplex.classify(row["text"])["isDone"].label == {True: "yes", False: "no"}.get(row["label"], row["label"])
            for row in rows
        ]
    assert sum(right) >= 0.7 * len(right)


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_a_dry_run_reports_on_the_data_and_ends(tmp_path: Path, base: Path) -> None:
    draw = random.Random(0)
    rows = [
        {"text": f"Customer: {draw.random()}", "labels": {"isDone": index % 3 == 0, "mood": "calm" if index else "sad"}}
        for index in range(40)
    ]
    rows += [rows[0], {**rows[1], "labels": {"isDone": True}}, {"text": "x", "labels": {"other": True}}]
    rows += [{"text": "long " * 400, "labels": {"isDone": True}}]
    rows[3]["ids"] = ["cls-1"]
    data = write_rows(tmp_path / "data.jsonl", rows)
    code, said = invoke(
        "--base",
        base,
        "--data",
        data,
        "--dry-run",
        "--template",
        TEMPLATE,
        "--classifier",
        "isDone, mood,isDone",
        "--classifier",
        "mood",
    )
    assert code == 0, said
    for told in (
        "43 conversations: ",
        "labels, the positive first",
        "1 conversation comes from `loraplex routes export`, so its text becomes no golden example",
        "warning: 1 conversation without a label for these classifiers",
        "warning: 2 conversations like an earlier one",
        "warning: 1 label unlike that of the same conversation elsewhere",
        "warning: line 44: too long, and cut; of line 44, the prompt has ",
        " at most; its beginning was cut, and ",
        "warning: mood: fewer than 10 conversations with 'sad', and none with 'sad' in dev, 'sad' in calibration",
        "weights in the loss",
    ):
        assert told in said, said
    assert said.count("mood:") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("yaml_text", "options", "what"),
    [
        ("rank: 0\n", [], "train.yaml, key 'rank'"),
        (
            "rnak: 4\nover_write: true\n",
            [],
            "unknown key 'over_write'; did you mean overwrite?; unknown key 'rnak'; did",
        ),
        ("rnak: 4\n", [], "remedy: use: base, data, out, classifier"),
        ("rank: 4\n", ["--rank", "0"], "--rank 0"),
        ("device: gpu\n", [], "is no device"),
        ("dry_run: maybe\n", [], "dry_run"),
        ("dev: 0.5\ncalibration: 0.5\n", [], "leave nothing to train on"),
        ("", ["--kind", "lora", "--invocation", "x"], "no effect with kind lora"),
        ("targets: q_proj,nose\n", [], "has no layers 'nose'"),
        ("classifier: nobody\n", [], "no conversation has a label for it"),
        ("classifier: isfraud\n", [], "remedy: did you mean isFraud for isfraud? The data has: "),
        ("questions: none.yaml\n", [], "none.yaml"),
        ("base: null\n", ["--data", "x"], "--base: is missing"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path, base: Path, data: Path, yaml_text: str, options: list[str], what: str
) -> None:
    given = {"base": str(base), "data": str(data), "out": str(tmp_path / "out"), "template": TEMPLATE}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**given, **(yaml.safe_load(yaml_text) or {})}))
    code, said = invoke("--config", tmp_path / "train.yaml", *options)
    assert code == 1 and what in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--dry-run", "--load", "http://127.0.0.1:1"], "--load: has no effect with --dry-run"),
        (["--dry-run", "--resume"], "--resume: has no effect with --dry-run"),
        (["--dev", "0", "--golden", "2", "--select", "auc"], "'select', 'golden' has no effect with dev 0"),
        (["--dev", "0", "--patience", "3"], "'patience' has no effect with dev 0"),
    ],
)
def test_options_without_an_effect_are_refused(base: Path, data: Path, options: list[str], what: str) -> None:
    code, said = invoke("--base", base, "--data", data, "--out", "never", "--template", TEMPLATE, *options)
    assert code and what in said.replace("│ ", ""), said


def test_ctrl_c_during_the_load_says_what_is_there(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraplex.cli.train_load.check_server", lambda *_: None)
    monkeypatch.setattr("loraplex.cli.train_load.load_shadows", interrupted)
    monkeypatch.setattr("loraplex.training.run.train", lambda *_, **__: True)
    code, said = invoke(
        "--base", base, "--data", data, "--out", tmp_path, "--template", TEMPLATE, "--load", "http://127.0.0.1:1"
    )
    assert code == 130 and "holds the trained adapters" in said and "--adapter-root" in said and "interrupted" in said


def test_every_option_is_a_key_of_the_yaml_file_and_in_the_help() -> None:
    from loraplex.training.settings import TrainInputs

    code, said = invoke("--help")
    assert code == 0
    for name in (*TrainInputs.model_fields, *TrainSettings.model_fields):
        assert f"--{name.replace('_', '-')}" in said, name


def test_all_malformed_lines_are_told_before_the_base_is_looked_at(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a", "labels": {"mood": "x"}}\nno\n{"text": 3}\n{"text": "b", "labels": {"mood": "z"}}\n')
    (tmp_path / "questions.yaml").write_text("mood: {labels: [x, y]}\n")
    code, said = invoke(
        *("--base", tmp_path / "none", "--data", data, "--out", tmp_path / "out"),
        *("--questions", tmp_path / "questions.yaml"),
    )
    assert code == 1
    for told in ("line 2: is not JSON", "line 3: 'text' is a int", "line 4: label 'z' of 'mood'"):
        assert told in said


def test_ctrl_c_that_an_import_swallows_ends_the_run_before_its_first_step() -> None:
    screen = _Screen()
    with screen.stopping():
        with suppress(KeyboardInterrupt):  # as `except BaseException` in a library does
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        with pytest.raises(KeyboardInterrupt):
            screen.started(["isDone"], 10, 10, 0)


def test_a_result_of_no_use_is_told_and_so_is_a_slot_that_is_none(tmp_path: Path, base: Path) -> None:
    rows = [{"text": f"Customer: {index}", "labels": {"isDone": index % 2 == 0}} for index in range(60)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    arguments = ["--base", base, "--data", data, "--out", tmp_path / "out", "--template", "{foo} " + TEMPLATE]
    arguments += ["--epochs", "0.1", "--learning-rate", "1e-9", "--dtype", "float32", "--threshold", "none"]
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "--template holds '{foo}', which stays in every prompt as it is" in done.stderr
    assert "no better than chance on dev: 'isDone'; label more" in " ".join(done.stderr.split())
