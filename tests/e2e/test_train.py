"""From nothing to served verdicts: `loraplex train` on conversations written on the spot, then the bundle."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import tiny
from dialogues import CLUES, TEMPLATE, dialogue, write
from loraplex import Loraplex
from loraplex.classifier import read_contract
from loraplex.cli.main import app

OPTIONS = ["--template", TEMPLATE, "--epochs", 3, "--evaluations", 1, "--learning-rate", 0.01, "--rank", 8, "--seed", 1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraplex.cli.main", "train", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder, tiny.FAMILIES["llama"])
    return folder


@torch.inference_mode()
def ask_peft(base: Path, folder: Path, text: str) -> list[float]:
    """The scores of PEFT's answer, by the contract."""
    contract, tokenizer = read_contract(folder / "classifier.yaml"), AutoTokenizer.from_pretrained(base)
    assert contract.template is not None
    ids = tokenizer(contract.template.replace("{conversation}", text), return_tensors="pt")
    if "score" in (folder / "adapter_config.json").read_text():
        model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=2)
        log_probs = PeftModel.from_pretrained(model, folder).eval()(**ids).logits[0].log_softmax(-1)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        first = [tokenizer.encode(label)[0] for label in contract.labels]  # the labels' first tokens tell them apart
        log_probs = model(**ids).logits[0, -1].log_softmax(-1)[first]
    return [contract.decide(log_probs.tolist()).scores[label] for label in contract.labels]


@pytest.fixture(autouse=True)
def unchanged_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.training.run.choose_threads", lambda: None)


@pytest.mark.parametrize("kind", ["alora", "lora", "score"])
def test_trained_classifiers_answer(tmp_path: Path, base: Path, kind: str) -> None:
    data, out = write(tmp_path / "data.jsonl", 400), tmp_path / "bundle"
    arguments = ["--base", base, "--data", data, "--out", out, "--kind", kind, *OPTIONS]
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "isFraud" in done.stdout and "400 conversations: 320 train, 40 dev, 40 calibration" in done.stderr
    draw = random.Random(9)
    unseen = [dialogue(draw) for _ in range(60)]
    with Loraplex.load(out, dtype="float32") as loraplex:
        found = [loraplex.classify(text) for text, _ in unseen]
    for name in CLUES:
        right = sum((one[name].label == "yes") == labels[name] for one, (_, labels) in zip(found, unseen, strict=True))
        assert right >= 54, f"{name}: {right} of 60 right"
        scores = found[0][name].scores
        assert scores is not None
        assert list(scores.values()) == pytest.approx(ask_peft(base, out / name, unseen[0][0]), abs=1e-3)


@pytest.mark.slow
def test_ctrl_c_leaves_the_best_adapters_and_resume_goes_on(tmp_path: Path, base: Path) -> None:
    data, out = write(tmp_path / "data.jsonl", 120), tmp_path / "bundle"
    options = {"base": str(base), "data": str(data), "out": str(out), "epochs": 400, "patience": 9999}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**options, "template": TEMPLATE, "rank": 4}))
    log = out / ".training" / "log.csv"
    process = subprocess.Popen(command("--config", tmp_path / "train.yaml"), stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(3000):  # a busy machine takes long to import PyTorch
            if log.is_file() and len(log.read_text().splitlines()) > 12:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "--resume goes on" in said and "stopping after this step" in said
    with Loraplex.load(out, dtype="float32") as loraplex:
        assert {one.classifier for one in loraplex.classify("Customer: bravo").verdicts} == set(CLUES)
    steps = len(log.read_text().splitlines()) - 1
    changed = run("--config", tmp_path / "train.yaml", "--resume", "--seed", 5)
    assert changed.returncode == 1 and "a run with another --seed" in changed.stderr
    again = run("--config", tmp_path / "train.yaml")
    assert again.returncode == 1 and "--overwrite" in again.stderr
    process = subprocess.Popen(
        command("--config", tmp_path / "train.yaml", "--resume"), stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        for _ in range(3000):  # a busy machine takes long to import PyTorch
            if len(log.read_text().splitlines()) - 1 > steps:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and f"{steps} of them done" in said, said
    found = [int(line.partition(",")[0]) for line in log.read_text().splitlines()[1:]]
    assert found == list(range(1, len(found) + 1)) and len(found) > steps
