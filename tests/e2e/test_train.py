"""From nothing to served verdicts: `loraplex train` on conversations written on the spot, then the bundle."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from loraplex import Loraplex

WORDS = "order hotel room flight table booking seat ticket payment card city date time name".split()
CLUES = {"isThankful": "thanks", "isFraud": "stolen"}


def dialogue(draw: random.Random) -> tuple[str, dict[str, bool]]:
    labels = {name: draw.random() < 0.4 for name in CLUES}
    words = draw.choices(WORDS, k=draw.randint(4, 9)) + [CLUES[name] for name, found in labels.items() if found] * 2
    draw.shuffle(words)
    return f"Customer: {' '.join(words)}", labels


def write(path: Path, num: int) -> None:
    draw = random.Random(0)
    rows = [dict(zip(("text", "labels"), dialogue(draw), strict=True)) for _ in range(num)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraplex.cli.main", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("kind", ["alora", "lora"])
def test_trained_classifiers_answer(tmp_path: Path, kind: str) -> None:
    base, data, out = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "bundle"
    base.mkdir()
    tiny.save_base(base, tiny.FAMILIES["llama"])
    write(data, 400)
    options = ["--template", "{conversation}<|ask|>\n", "--epochs", 6, "--learning-rate", 0.01, "--rank", 8]
    done = run("--base", base, "--data", data, "--out", out, "--kind", kind, "--seed", 1, *options)
    assert done.returncode == 0, done.stderr
    assert "isFraud" in done.stdout and "400 conversations: 320 train, 40 dev, 40 calibration" in done.stderr
    draw = random.Random(9)
    unseen = [dialogue(draw) for _ in range(60)]
    with Loraplex.load(out, dtype="float32") as loraplex:
        found = [loraplex.classify(text) for text, _ in unseen]
    for name in CLUES:
        right = sum((one[name].label == "yes") == labels[name] for one, (_, labels) in zip(found, unseen, strict=True))
        assert right >= 54, f"{name}: {right} of 60 right"
    for name in CLUES:  # PEFT reads it
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / name)
        assert (model.peft_config["default"].alora_invocation_tokens is not None) == (kind == "alora")
    again = run("--base", base, "--data", data, "--out", out, "--kind", kind, *options)
    assert again.returncode == 1 and "--overwrite" in again.stderr
