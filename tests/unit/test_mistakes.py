"""What is wrong with an adapter is said by its cause, and the remedy fits the cause."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import serving
import tiny
from loraplex import Loraplex
from loraplex.adapters.checkpoint import read_unidentified
from loraplex.adapters.peft_config import read_peft_config
from loraplex.adapters.tensor_names import pefts_name
from loraplex.errors import AdapterError, BundleError, LoraplexError
from loraplex.model.loader import read_config, read_layers
from loraplex.service.repair import repair

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj.lora_A"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of it in the folder `good`."""
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder, tiny.FAMILIES["mistral"])
    tiny.save_adapter(folder, folder / "good", contract=tiny.CONTRACT)
    return folder


def made(base: Path, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """The adapter `good` with other tensors or another config."""
    folder.mkdir()
    good = base / "good"
    (folder / CONFIG).write_text(json.dumps(json.loads((good / CONFIG).read_text()) | config))
    (folder / "classifier.yaml").write_bytes((good / "classifier.yaml").read_bytes())
    save_file(dict(load_file(good / WEIGHTS) if tensors is None else tensors), folder / WEIGHTS)
    return folder


def error_of(base: Path, folder: Path) -> LoraplexError:
    layers, _ = read_layers(read_config(base), base)
    with pytest.raises(LoraplexError) as caught:
        read_unidentified(folder, layers)
    return caught.value


# ------------------------------------------------------------------------------------- heads and tensors


def test_a_save_under_zero_3_is_recognised(base: Path, tmp_path: Path) -> None:
    error = error_of(
        base, made(base, tmp_path / "x", {name: torch.empty(0) for name in load_file(base / "good" / WEIGHTS)})
    )
    assert "has shape [0] (42 such tensors in all): it was saved under DeepSpeed ZeRO-3" in error.message
    for way in ("accelerator.get_state_dict", "zero_to_fp32.py", "stage3_gather_16bit_weights_on_model_save"):
        assert way in error.remedy


def test_a_head_that_was_cut_to_the_labels_is_recognised_and_peft_cannot_read_it(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "good" / WEIGHTS) | {f"{P}lm_head.weight": torch.ones(4, 32)}
    folder = made(base, tmp_path / "x", tensors, modules_to_save=["lm_head"])
    error = error_of(base, folder)
    assert "has shape [4, 32], expected [320, 32]: the output head was cut to 4 rows" in error.message
    assert "PEFT cannot load it onto this base either" in error.message
    assert "the whole head (320 rows)" in error.remedy and "'SEQ_CLS'" in error.remedy
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("saved", [None, ["score"]])
def test_a_score_head_under_another_task_is_the_task_types_fault(
    base: Path, tmp_path: Path, task: str, saved: list[str] | None
) -> None:
    tensors = load_file(base / "good" / WEIGHTS) | {f"{P}score.weight": torch.ones(2, 32)}
    error = error_of(base, made(base, tmp_path / "x", tensors, task_type=task, modules_to_save=saved))
    assert "key 'task_type'" in error.message and f"is {task!r}, but" in error.message
    assert "set it to 'SEQ_CLS'" in error.remedy
    layers, _ = read_layers(read_config(base), base)
    read_unidentified(made(base, tmp_path / "y", tensors, task_type="SEQ_CLS", modules_to_save=saved), layers)


@pytest.mark.parametrize("name", ["mlp.experts.3.w1.lora_A.weight", "mlp.experts.base_layer.lora_A.weight"])
def test_lora_on_an_expert_is_named(base: Path, tmp_path: Path, name: str) -> None:
    """As transformers 4 named the experts, and as PEFT names them where they are one parameter."""
    tensors = load_file(base / "good" / WEIGHTS) | {f"{P}model.layers.0.{name}": torch.ones(4, 32)}
    error = error_of(base, made(base, tmp_path / "x", tensors))
    assert "is LoRA on an expert of a mixture" in error.message and "layers of attention" in error.remedy


# ------------------------------------------------------------------------------------------- task types


@pytest.mark.parametrize(
    ("task", "saved"),
    [
        ("SEQ_2_SEQ_LM", None),
        ("FEATURE_EXTRACTION", None),
        ("TOKEN_CLS", ["classifier", "score"]),  # PEFT adds the names for these two tasks
        ("QUESTION_ANS", ["qa_outputs"]),
        (None, None),
    ],
)
def test_a_task_type_whose_answers_are_the_same_is_served_with_a_warning(
    base: Path, tmp_path: Path, task: str | None, saved: list[str] | None
) -> None:
    folder = made(base, tmp_path / "x", task_type=task, modules_to_save=saved)
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = []
    for path in (base / "good", folder):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
        with torch.inference_mode():
            theirs.append(model(input_ids=ids).logits)
    assert torch.equal(*theirs)
    with Loraplex.load(base, adapters={"x": folder}, dtype="float32", device="cpu") as loraplex:
        [good, same] = loraplex.classify("is it done?", ["good", "x"]).verdicts
        assert same.scores == good.scores
        warnings = {one.name: one.warnings for one in loraplex.adapters()}
    expected = f"its task_type is {task!r}; it is served as 'CAUSAL_LM', which computes the same"
    assert warnings == {"good": None, "x": (expected,) if task else None}


@pytest.mark.parametrize(
    ("task", "head", "match"),
    [("TOKEN_CLS", "classifier", "labels each token"), ("QUESTION_ANS", "qa_outputs", "marks a part of the text")],
)
def test_a_task_with_a_head_that_gives_no_verdict_is_refused_with_the_reason(
    base: Path, tmp_path: Path, task: str, head: str, match: str
) -> None:
    tensors = load_file(base / "good" / WEIGHTS) | {f"{P}{head}.weight": torch.ones(2, 32)}
    error = error_of(base, made(base, tmp_path / "x", tensors, task_type=task, modules_to_save=[head]))
    assert f"is {task!r}, which {match}" in error.message and "'SEQ_CLS'" in error.remedy


# ------------------------------------------------------------------------------------------ tensor names

NAMES = {
    "_orig_mod": (f"_orig_mod.{P}{Q}.weight", "torch.compile added '_orig_mod'"),
    "_orig_mod inside": (f"{P}model.layers.0._orig_mod.self_attn.q_proj.lora_A.weight", "torch.compile"),
    "fsdp": (f"{P}_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight", "FSDP"),
    "checkpointing": (f"{P}model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight", "activation"),
    "ddp": (f"module.{P}{Q}.weight", "data parallelism added 'module'"),
    "ddp inside": (f"{P}module.{Q}.weight", "data parallelism added 'module'"),
    "doubled": (f"{P}{P}{Q}.weight", "is doubled"),
    "several": (f"module._orig_mod.{P}module.{P}{Q}.default.weight", "torch.compile"),
}


@pytest.mark.parametrize(("key", "reason"), NAMES.values(), ids=NAMES)
def test_a_changed_name_is_explained_and_repaired(base: Path, tmp_path: Path, key: str, reason: str) -> None:
    assert pefts_name(key) == f"{P}{Q}.weight"
    tensors = load_file(base / "good" / WEIGHTS)
    tensors[key] = tensors.pop(f"{P}{Q}.weight")
    folder = made(base, tmp_path / "a folder", tensors)
    error = error_of(base, folder)
    assert reason in error.message
    assert f"loraplex adapters repair '{folder}' --base BASE --out NEW_FOLDER" in error.remedy
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert repair(folder, tmp_path / "new" / "x", str(base)) == 1
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}, "edited in place"
    layers, _ = read_layers(read_config(base), base)
    read = [
        read_unidentified(one, layers).identify(lambda name: None) for one in (base / "good", tmp_path / "new" / "x")
    ]
    assert read[0].kv_id == read[1].kv_id
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"], "something is left over"


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_names_that_peft_reads_are_served_by_all_backends(base: Path, tmp_path: Path, backend: str) -> None:
    """PEFT itself would not find them in an adapter of another name than "default"."""
    tensors = {name.replace(".weight", ".default.weight"): t for name, t in load_file(base / "good" / WEIGHTS).items()}
    folder = made(base, tmp_path / "x", tensors)
    with Loraplex.load(base, adapters={"x": folder}, backend=backend, dtype="float32", device="cpu") as loraplex:
        good, same = loraplex.classify("is it done?", ["good", "x"]).verdicts
    assert same.scores == pytest.approx(good.scores, abs=1e-6)


def test_pefts_own_names_stay(base: Path) -> None:
    for key in (
        *load_file(base / "good" / WEIGHTS),
        f"{P}lm_head.modules_to_save.weight",
        f"{P}module_a.default.weight",
    ):
        assert pefts_name(key) == key


def test_a_repair_that_does_not_help_writes_nothing(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "good" / WEIGHTS)
    twice = made(base, tmp_path / "twice", tensors | {f"_orig_mod.{P}{Q}.weight": torch.ones(4, 32)})
    other = made(base, tmp_path / "other", {f"module.{name}": tensor[:1] for name, tensor in tensors.items()})
    for folder, match in [
        (twice, "have one name in PEFT"),
        (other, r"under PEFT's names.*has shape .*; nothing was written"),
        (base / "good", "all tensors have PEFT's names already"),
    ]:
        with pytest.raises(AdapterError, match=match):
            repair(folder, tmp_path / "out", str(base))
        assert {path.name for path in tmp_path.iterdir()} == {"twice", "other"}
    with pytest.raises(BundleError, match="exists already"):
        repair(twice, other, str(base))


def test_a_repair_to_where_nothing_can_be_written_says_so(base: Path) -> None:
    tiny.save_adapter(base, folder := base / "repaired")
    with pytest.raises(BundleError, match="/proc/nowhere/x: cannot be written"):
        repair(folder, Path("/proc/nowhere/x"), str(base))


def test_the_repair_command(base: Path, tmp_path: Path) -> None:
    folder = made(
        base, base / "bad", {f"_orig_mod.{name}": one for name, one in load_file(base / "good" / WEIGHTS).items()}
    )
    try:
        run = serving.loraplex("adapters", "repair", folder, "--out", tmp_path / "x")
        assert run.returncode == 0, run.stderr
        assert run.stdout == f"{tmp_path / 'x'}: 42 tensors renamed, and all of them fit the base\n"
        run = serving.loraplex("adapters", "repair", folder, "--out", tmp_path / "x")
        assert run.returncode == 1 and "exists already" in run.stderr
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    assert read_peft_config(tmp_path / "x").r == 4
