"""A run in one process: it goes on where it ended, and keeps the best."""

import csv
import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import tiny
from dialogues import CLUES, TEMPLATE, Recorder, prepared, write, write_rows
from families import config_of
from loraplex import Loraplex
from loraplex.classifier import Contract
from loraplex.errors import ConfigurationError, UnsupportedModelError
from loraplex.evaluation.quality import Quality
from loraplex.training.fit import Fit, Told
from loraplex.training.log import Log
from loraplex.training.run import train
from loraplex.training.settings import TrainSettings
from loraplex.training.trainee import Trainee

SETTINGS = TrainSettings(template=TEMPLATE, epochs=2, rank=4, learning_rate=0.01, dtype="float32", evaluations=2)


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


@pytest.mark.parametrize("kind", ["alora", "score"])
@pytest.mark.parametrize("last_step", [3, 8])  # before the first evaluation, and after one
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, base: Path, data: Path, kind: Any, last_step: int
) -> None:
    settings = SETTINGS.model_copy(update={"kind": kind})
    run = prepared(base, data, settings)
    whole, cut = Recorder(), Recorder(last_step)
    assert train(run, tmp_path / "whole", settings, whole)
    assert not train(run, tmp_path / "cut", settings, cut)
    assert cut.steps[-1].step == last_step and set(cut.qualities) == (set(CLUES) if last_step > 3 else set())
    going_on = Recorder()
    assert train(run, tmp_path / "cut", settings, going_on, resume=True)
    assert going_on.first_step == last_step and going_on.steps[0].step == last_step + 1
    for name in CLUES:
        for file in ("adapter_model.safetensors", "classifier.yaml", "adapter_config.json"):
            assert (tmp_path / "whole" / name / file).read_bytes() == (tmp_path / "cut" / name / file).read_bytes()
    logs = [rows_of(tmp_path / one / ".training" / "log.csv") for one in ("whole", "cut")]
    ignored = ("seconds", "tokens_per_s", "peak_bytes")
    assert [[value for key, value in row.items() if key not in ignored] for row in logs[0]] == [
        [value for key, value in row.items() if key not in ignored] for row in logs[1]
    ]
    assert [int(row["step"]) for row in logs[0]] == list(range(1, 1 + whole.steps[-1].num_steps))
    assert logs[0][0]["isFraud loss"] and not logs[0][0]["isFraud f1"] and logs[0][-1]["isFraud f1"]
    assert not (tmp_path / "cut" / ".training" / "state.pt").exists()
    with pytest.raises(ConfigurationError, match=r"there is no .*state\.pt"):
        train(run, tmp_path / "cut", settings, Recorder(), resume=True)


def test_a_state_of_other_settings_or_a_broken_one_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    run = prepared(base, data, SETTINGS)
    train(run, tmp_path / "out", SETTINGS, Recorder(2))
    other = SETTINGS.model_copy(update={"learning_rate": 0.02})
    with pytest.raises(
        ConfigurationError, match=r"state\.pt belongs to a run with another --learning-rate \(give what"
    ):
        train(run, tmp_path / "out", other, Recorder(), resume=True)
    (tmp_path / "out" / ".training" / "state.pt").write_bytes(b"no state")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        train(run, tmp_path / "out", SETTINGS, Recorder(), resume=True)


@pytest.mark.parametrize("kind", ["alora", "lora"])
def test_the_size_of_a_pass_changes_no_gradient_and_is_kept(
    base: Path, data: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain adapters share nothing, so even one conversation's questions may be in several passes."""
    settings = SETTINGS.model_copy(update={"kind": kind, "epochs": 1, "dev": 0.0, "calibration": 0.0})
    run = prepared(base, data, settings)
    sizes: list[int] = []
    found = []

    def counting(losses: Any) -> Any:
        def counted(some: Any) -> Any:
            sizes.append(sum(len(one.token_ids) + sum(len(asked.token_ids) for asked in one.questions) for one in some))
            return losses(some)

        return counted

    for step_tokens in (100_000, 64):
        torch.manual_seed(0)
        trainee = Trainee.load(
            run.base, run.config, run.layers, torch.float32, torch.device("cpu"),
            num_adapters=len(run.tasks), rank=2, alpha=4, targets={"q_proj", "down_proj"}, kv_memory="1GiB",
        )  # fmt: skip
        monkeypatch.setattr(trainee, "losses", counting(trainee.losses))
        loop = Fit(
            trainee,
            settings.model_copy(update={"step_tokens": step_tokens}),
            run.of("train")[:30], [], [task.label_ids for task in run.tasks], run.weights,
        )  # fmt: skip
        steps: list[Told] = []
        loop.run(steps.append)
        found.append([parameter.detach() for parameter in trainee.parameters()])
    longest = max(len(one.prefix) + len(one.suffix) for one in run.asked)
    assert len(sizes) > 3 * len(steps) and max(sizes[len(steps) :]) <= max(
        64, 3 * longest if kind == "alora" else longest
    )
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_what_changes_no_weights_may_change_in_a_resumed_run(tmp_path: Path, base: Path, data: Path) -> None:
    run = prepared(base, data, SETTINGS)
    train(run, tmp_path / "out", SETTINGS, Recorder(5))
    free: dict[str, Any] = {"golden": 0, "threshold": "none", "patience": 9, "step_tokens": 512, "kv_memory": "1MiB"}
    assert train(run, tmp_path / "out", SETTINGS.model_copy(update=free), Recorder(), resume=True)


def test_a_base_of_the_same_name_and_shape_is_another_one(tmp_path: Path) -> None:
    from loraplex.training.identity import base_hash

    for seed, name in enumerate(("one", "other", "copy")):
        tiny.save_base(tmp_path / name / "base", tiny.FAMILIES["llama"], seed=seed % 2)
    one, other, copy = (base_hash(tmp_path / name / "base") for name in ("one", "other", "copy"))
    assert one == copy != other


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_step_of_many_passes_is_the_step_of_one(base: Path, data: Path, is_kept: bool) -> None:
    """Whether or not the conversations' keys and values are kept between the passes."""

    def after_steps(step_tokens: int, kv_memory: str) -> list[torch.Tensor]:
        settings = SETTINGS.model_copy(update={"step_tokens": step_tokens})
        run = prepared(base, data, settings)
        torch.manual_seed(0)
        trainee = Trainee.load(
            base,
            run.config,
            run.layers,
            torch.float32,
            torch.device("cpu"),
            num_adapters=2,
            rank=4,
            alpha=8,
            targets={"q_proj", "v_proj"},
            kv_memory=kv_memory,
        )
        loop = Fit(trainee, settings, run.of("train"), run.of("dev"), [one.label_ids for one in run.tasks], run.weights)
        found: list[torch.Tensor] = []

        def gradients(told: Told) -> bool:
            found.extend(one.detach().clone() for one in trainee.parameters())
            return told.step == 2

        loop.run(gradients)
        return found

    whole = after_steps(8192, "16MiB")
    for one, other in zip(whole, after_steps(64, "16MiB" if is_kept else "0"), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_tensorboard_gets_what_the_file_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for TensorBoard's writer, which need not be installed."""
    seen: dict[str, tuple[float, int]] = {}
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: seen.update({name: (value, step)}),
        close=lambda: seen.update(closed=(0, 0)),
    )
    board: Any = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder, purge_step: writer if purge_step == 4 else None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("loraplex.training.log.find_spec", lambda name: name)
    log = Log(tmp_path, ["a", "b"], 3)
    told = Told(
        step=4, num_steps=9, epoch=0.5, losses=[0.25, None], num_tokens=10, seconds=2.0, learning_rate=0.1, peak_bytes=7
    )
    told.quality = [Quality(n=9, accuracy=0.5, f1=0.75, auc=None, log_loss=0.5), None]
    log.step(told)
    log.close()
    assert seen["a/loss"] == (0.25, 4) and seen["a/f1"] == (0.75, 4) and seen["tokens_per_s"] == (5.0, 4)
    assert not {"b/loss", "b/f1", "a/auc"} & set(seen) and "closed" in seen
    [row] = rows_of(tmp_path / "log.csv")
    assert (row["a loss"], row["b loss"], row["a auc"], row["peak_bytes"]) == ("0.25", "", "", "7")


def test_the_record_says_how_an_adapter_was_made(tmp_path: Path, base: Path, data: Path) -> None:
    run = prepared(base, data, SETTINGS)
    watcher = Recorder()
    train(run, tmp_path / "out", SETTINGS, watcher, log_dir=tmp_path / "log")
    record = json.loads((tmp_path / "out" / "isFraud" / "training.json").read_text())
    assert record["settings"] == SETTINGS.model_dump() and record["about"]["versions"]["torch"] == torch.__version__
    assert len(record["data"]["sha256"]) == 64 and record["data"]["split"] == {
        "train": 120,
        "dev": 15,
        "calibration": 15,
    }
    assert record["best_step"] <= record["steps"] == watcher.steps[-1].step
    assert rows_of(tmp_path / "log" / "log.csv") and not (tmp_path / "out" / ".training" / "log.csv").exists()
    dev = {run.rows[index].input for index in run.split.dev}
    golden = yaml.safe_load((tmp_path / "out" / "isFraud" / "classifier.yaml").read_text()).get("golden", [])
    assert {one["text"] for one in golden} <= dev
    assert (tmp_path / "out" / "loraplex.yaml").is_file()
    with pytest.raises(ConfigurationError, match="another base"):
        tiny.save_base(tmp_path / "other", tiny.FAMILIES["llama"])
        train(prepared(tmp_path / "other", data, SETTINGS), tmp_path / "out", SETTINGS, Recorder())


def test_what_cannot_be_written_is_told_before_anything_is_loaded(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(base, data, SETTINGS)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "load", None)
        with pytest.raises(ConfigurationError, match="cannot be written"):
            train(run, tmp_path / "file" / "out", SETTINGS, Recorder())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    watcher = Recorder()
    with pytest.raises(ConfigurationError, match="GB of free space"):
        train(run, tmp_path / "full", SETTINGS, watcher)
    assert not watcher.steps


def test_a_disk_that_fills_up_is_an_error_that_resume_cures(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(base, data, SETTINGS)

    save, num = torch.save, 0

    def full(*given: Any) -> None:
        nonlocal num
        num += 1
        if num > 1:
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        save(*given)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(ConfigurationError, match="cannot be written: PytorchStreamWriter"):
            train(run, tmp_path / "out", SETTINGS, Recorder())
    assert not (tmp_path / "out" / ".training" / "state.part").exists()
    going_on = Recorder()
    assert train(run, tmp_path / "out", SETTINGS, going_on, resume=True)
    assert going_on.first_step == 4 and set(going_on.qualities) == set(CLUES)


@pytest.mark.parametrize("bad_step", [1, 9])
def test_an_adapter_that_diverges_is_stopped_with_its_best_weights_and_the_others_go_on(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    right, num = Trainee.losses, 0

    def losses(self: Trainee, conversations: Any) -> Any:
        nonlocal num
        num += 1
        found, weights = right(self, conversations)
        return (found * torch.tensor([1.0, float("nan")]) if num >= bad_step else found), weights

    monkeypatch.setattr(Trainee, "losses", losses)
    watcher = Recorder()
    with pytest.raises(ConfigurationError, match=f"'{list(CLUES)[1]}' is no number at step {bad_step} of 16"):
        train(prepared(base, data, SETTINGS), tmp_path / "out", SETTINGS, watcher)
    assert len(watcher.steps) == 16 and watcher.steps[-1].losses[1] is None
    assert (tmp_path / "out" / "isFraud").is_dir() == (bad_step > 1)
    with Loraplex.load(tmp_path / "out", dtype="float32") as loraplex:
        assert loraplex.classify("Customer: bravo")["isThankful"].scores is not None


def test_each_adapter_stops_by_itself_and_keeps_its_best_weights(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    settings = SETTINGS.model_copy(update={"patience": 2, "epochs": 4})
    scores = {0: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.7], 1: [0.5, 0.6, 0.4, 0.3, 0.4, 0.4, 0.9, 0.9]}
    log_losses = {0: [0.5] * 8, 1: [0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.1, 0.1]}  # a falling one is no miss

    def evaluate(self: Fit, asked: Any) -> list[Quality]:
        seen.append([one.detach().clone() for one in self._trainee.parameters()])
        return [
            Quality(
                n=9,
                accuracy=0.5,
                f1=scores[adapter][len(seen) - 1],
                auc=0.5,
                log_loss=log_losses[adapter][len(seen) - 1],
            )
            for adapter in (0, 1)
        ]

    monkeypatch.setattr(Fit, "evaluate", evaluate)
    run = prepared(base, data, settings)
    label_ids = [task.label_ids for task in run.tasks]
    trainee = Trainee.load(
        base,
        run.config,
        run.layers,
        torch.float32,
        torch.device("cpu"),
        num_adapters=2,
        rank=4,
        alpha=8,
        targets={"q_proj", "v_proj"},
    )
    loop = Fit(trainee, settings, run.of("train"), run.of("dev"), label_ids, run.weights)
    told: list[Told] = []
    loop.run(lambda one: told.append(one))
    assert [one.stopped for one in told if one.quality] == [[False, False]] * 5 + [[False, True]] * 3
    assert [loop.best_step(0), loop.best_step(1)] == [32, 8]
    assert all(one.losses[1] is None for one in told[24:]) and told[23].losses[1] is not None
    loop.restore_best()
    for parameter, last, second in zip(trainee.parameters(), seen[7], seen[1], strict=True):
        assert torch.equal(parameter[0], last[0]) and torch.equal(parameter[1], second[1])
    for sixth, last in zip(seen[5], seen[7], strict=True):
        assert torch.equal(sixth[1], last[1]), "a stopped adapter is not trained on"


def test_weights_against_imbalance_are_taken_off_again(tmp_path: Path, base: Path) -> None:
    """Words say nothing about the label, so the truth is its share, whatever it counted in the loss."""
    draw = random.Random(0)
    labels = [True] * 90 + [False] * 510
    draw.shuffle(labels)
    rows = [
        {"text": f"Customer: {' '.join(draw.choices('order room seat'.split(), k=3))} {index}", "label": label}
        for index, label in enumerate(labels)
    ]
    settings = SETTINGS.model_copy(
        update={"calibration": 0.0, "select": "log_loss", "learning_rate": 0.003, "epochs": 4}
    )
    run = prepared(base, write_rows(tmp_path / "data.jsonl", rows), settings, classifiers=["isRare"])
    assert run.label_weights["isRare"]["yes"] > 1.7 > 1 > run.label_weights["isRare"]["no"]
    train(run, tmp_path / "out", settings, Recorder())
    with Loraplex.load(tmp_path / "out", dtype="float32") as loraplex:
        texts = [f"Customer: {word} {index}" for word in ("order", "room room") for index in range(700, 715)]
        found = [(loraplex.classify(text)["isRare"].scores or {})["yes"] for text in texts]
    mean = sum(found) / len(found)
    assert mean == pytest.approx(0.15, abs=0.06), "with the weights still on, it would be 0.29"


def test_a_base_that_cannot_be_trained_is_refused_before_its_weights_are_read(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["gemma2"])
    monkeypatch.setattr("loraplex.training.attention._INERT", frozenset())
    monkeypatch.setattr("loraplex.training.trainee.load_transformers_model", None)
    with pytest.raises(UnsupportedModelError, match="Gemma2Attention: its attention uses 'position_ids'"):
        prepared(tmp_path, data, SETTINGS)


def test_an_expert_s_layer_is_no_target(tmp_path: Path, data: Path) -> None:
    tiny.save_base(tmp_path, config_of("qwen2_moe"))
    settings = SETTINGS.model_copy(update={"targets": "q_proj,shared_expert_gate,gate"})
    with pytest.raises(ConfigurationError, match="no layers 'gate'"):
        prepared(tmp_path, data, settings)


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ([True] * 10, "fewer than two of its labels are among the 8 conversations to train on: yes 10, no 0"),
        (["x"] * 10, "only the label 'x'"),
        ([True], "fewer than two of its labels"),
        ([None] * 10, "no conversation has a label"),
        (["a", {"a": 1.0, "b": 0.0}, "a"], "fewer than two of its labels"),
    ],
)
def test_a_file_that_is_too_small_is_a_clear_error(tmp_path: Path, base: Path, labels: list[Any], what: str) -> None:
    rows = [{"text": f"Customer: hello {index}", "label": label} for index, label in enumerate(labels)]
    with pytest.raises(ConfigurationError, match=what):
        prepared(base, write_rows(tmp_path / "data.jsonl", rows), SETTINGS, classifiers=["isDone"])


def test_messages_with_an_unknown_role_are_told_by_their_lines(tmp_path: Path, base: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": "hi"}], "label": True} for role in ("user", "narrator", "narrator")
    ]
    rows.append({"text": "no", "label": False})
    with pytest.raises(ConfigurationError, match="lines 2-3: unknown role 'narrator'"):
        prepared(base, write_rows(tmp_path / "data.jsonl", rows), SETTINGS, classifiers=["isDone"])


def test_golden_examples_of_messages_are_texts(tmp_path: Path, base: Path) -> None:
    from loraplex.training.asked import Asked
    from loraplex.training.finish import _golden

    rows = [
        {"messages": [{"role": "user", "content": "thanks"}], "label": True},
        {"text": "Customer: no", "label": False},
    ] * 2
    run = prepared(base, write_rows(tmp_path / "data.jsonl", rows), SETTINGS, classifiers=["isDone"])
    contract = run.tasks[0].contract
    asked = Asked(row=0, classifier=0, prefix=(), suffix=(1,), shares={0: 1.0})
    decision = contract.decide([-0.01, -9.0])
    assert [one.text for one in _golden(run.rows, [(asked, decision)], contract, 2)] == ["Customer: thanks"]
    assert not _golden(run.rows, [(asked, decision)], contract.model_copy(update={"threshold": 0.95}), 2)
    exported = [replace(one, is_exported=True) for one in run.rows]
    assert not _golden(exported, [(asked, decision)], contract, 2), "it would stay for longer than the server keeps it"
    unsure = replace(decision, confidence=0.6)
    assert not _golden(run.rows, [(asked, unsure)], contract, 2)


def test_a_threshold_is_chosen_as_calibrate_does_where_there_is_enough_to_choose_it_on() -> None:
    from loraplex.training.finish import _with_threshold

    contract = Contract(labels=("yes", "no"))
    scores, truth = [0.9] * 10 + [0.6] * 10 + [0.1] * 20, [0] * 10 + [1] * 30
    log_probs = [[math.log(score), math.log(1 - score)] for score in scores]
    # By the labels alone, which may be chance, it would be 0.75. The scores say that six in ten at 0.6 are positive.
    assert _with_threshold(contract, log_probs, truth).threshold == 0.35
    assert _with_threshold(contract, log_probs[1:], truth[1:]).threshold is None


def test_what_diverged_stays_stopped_whatever_the_resumed_runs_patience_is(base: Path, data: Path) -> None:
    run = prepared(base, data, SETTINGS)

    def loop(patience: int) -> Fit:
        trainee = Trainee.load(
            run.base, run.config, run.layers, torch.float32, torch.device("cpu"),
            num_adapters=len(run.tasks), rank=2, alpha=4, targets={"q_proj"},
        )  # fmt: skip
        settings = SETTINGS.model_copy(update={"patience": patience})
        return Fit(trainee, settings, run.of("train"), [], [task.label_ids for task in run.tasks], run.weights)

    first, second = loop(2), loop(50)
    first._freeze([1])
    second.load_state(first.state())
    assert second.stopped == [False, True]
