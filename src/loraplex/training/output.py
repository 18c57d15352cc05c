"""Writes a trained adapter as a servable folder: PEFT's two files, the contract, and how it was made."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from loraplex.adapters.tensor_names import PREFIX
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT
from loraplex.classifier import Contract
from loraplex.training.trainee import Trainee

RECORD = "training.json"


def write_adapter(
    folder: Path,
    trainee: Trainee,
    adapter: int,
    contract: Contract,
    *,
    rank: int,
    alpha: float,
    invocation: tuple[int, ...] | None,
    base_name: str,
    dtype: torch.dtype,
    record: Mapping[str, Any],
) -> None:
    """Write one adapter's folder in one piece; a folder that was there is replaced.

    dtype:   of the weights in the file.
    record:  how it was trained, for training.json.
    """
    from peft import LoraConfig

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {
        f"{PREFIX}{path}.{name}.weight": getattr(lora, name)[adapter].detach().to("cpu", dtype).contiguous()
        for path, lora in trainee.loras.items()
        for name in ("lora_A", "lora_B")
    }
    save_file(tensors, part / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=sorted({path.rpartition(".")[2] for path in trainee.loras}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        alora_invocation_tokens=None if invocation is None else list(invocation),
        inference_mode=True,
    )
    config.save_pretrained(str(part))
    assert (part / ADAPTER_CONFIG).is_file()
    written = contract.model_dump(mode="json", exclude_defaults=True)
    (part / CONTRACT).write_text(
        yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110), encoding="utf-8"
    )
    (part / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
