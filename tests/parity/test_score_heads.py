"""A SEQ_CLS adapter with its own head and label count, asked together with adapters that answer by label tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from loraplex import Loraplex
from loraplex.errors import AdapterError, ContractError, InvalidRequestError

TEXT = "Customer: hello, I would like to book a table"
LABELS = ["open", "closed", "it depends"]


def save_classifier(
    base: Path, folder: Path, seed: int, contract: dict[str, Any] | None = None, num_labels: int = 3
) -> None:
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, pad_token_id=2)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="SEQ_CLS")
    peft = get_peft_model(model, config)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1.0 / parameter.shape[-1] ** 0.5)
    peft.save_pretrained(str(folder))
    if contract is not None:
        (folder / "classifier.yaml").write_text(yaml.safe_dump(contract))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_bundle(tmp_path_factory.mktemp("scores"))
    save_classifier(folder, folder / "bare", 5)
    # These labels have no tokens of their own and begin one another: a head knows them by number.
    contract = {"labels": LABELS, "template": "{conversation}", "calibration": {"temperature": 2.0}}
    save_classifier(folder, folder / "contracted", 6, contract)
    return folder


@torch.inference_mode()
def ask_peft(bundle: Path, name: str, text: str) -> torch.Tensor:
    model: Any = AutoModelForSequenceClassification.from_pretrained(bundle, num_labels=len(LABELS), pad_token_id=2)
    peft = PeftModel.from_pretrained(model, bundle / name).eval()
    logits: torch.Tensor = peft(**AutoTokenizer.from_pretrained(bundle)(text, return_tensors="pt")).logits[0]
    return logits


def test_score_heads_equal_peft_beside_label_tokens(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        result = loraplex.classify(TEXT)
        alone = loraplex.classify(TEXT, "task0")
    assert len(result.verdicts) == 6 and all(verdict.error is None for verdict in result.verdicts)
    assert result["task0"].scores == pytest.approx(alone["task0"].scores, abs=1e-4)
    bare = ask_peft(bundle, "bare", TEXT).softmax(-1).tolist()
    assert result["bare"].scores == pytest.approx(
        dict(zip(["LABEL_0", "LABEL_1", "LABEL_2"], bare, strict=True)), abs=1e-4
    )
    contracted = (ask_peft(bundle, "contracted", TEXT) / 2.0).softmax(-1).tolist()
    assert result["contracted"].scores == pytest.approx(dict(zip(LABELS, contracted, strict=True)), abs=1e-4)
    assert result["contracted"].label_mass == pytest.approx(1.0)
    assert max(bare) > 0.4 and max(contracted) > 0.36, "the answers are too flat to tell"


def test_labels_are_as_many_as_the_head_has(bundle: Path, tmp_path: Path) -> None:
    save_classifier(bundle, tmp_path / "few", 7, {"labels": LABELS[:2], "template": "{conversation}"})
    with pytest.raises(ContractError, match="names 2 labels, the adapter's score head has 3"):
        Loraplex.load(bundle, adapters={"few": tmp_path / "few"})


def test_a_score_head_generates_no_text(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex, pytest.raises(InvalidRequestError, match="score head"):
        loraplex.generate(TEXT, "bare")


def test_padding_at_the_end_is_not_looked_at_as_in_transformers(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        result = loraplex.classify(TEXT + "<pad><pad>", "bare")["bare"]
    expected = ask_peft(bundle, "bare", TEXT + "<pad><pad>").softmax(-1).tolist()
    assert result.scores is not None
    assert list(result.scores.values()) == pytest.approx(expected, abs=1e-4)


def test_a_head_with_one_output_is_no_classifier(bundle: Path, tmp_path: Path) -> None:
    save_classifier(bundle, tmp_path / "number", 8, num_labels=1)
    with pytest.raises(AdapterError, match="one output"):
        Loraplex.load(bundle, adapters={"number": tmp_path / "number"})
