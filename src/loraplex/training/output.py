"""Writes a trained adapter as a servable folder: PEFT's two files, the contract, and how it was made."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from loraplex.adapters.peft_config import SCORE_HEADS
from loraplex.adapters.tensor_names import PREFIX
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT, SETTINGS, open_base
from loraplex.classifier import Contract
from loraplex.errors import ConfigurationError
from loraplex.evaluation.contract_file import text_of
from loraplex.hub_cache import in_cache
from loraplex.measuring.files import write_text
from loraplex.training.trainee import Trainee

RECORD = "training.json"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ConfigurationError where the block cannot write, such as on a full disk."""
    try:
        yield
    except OSError as exc:
        raise ConfigurationError(
            path,
            f"cannot be written: {exc.strerror or exc}",
            remedy="make room or give another folder; --resume goes on where the last evaluation was",
        ) from None


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Let no other run write into `out` while the block runs. Raises ConfigurationError where one does.

    folder:  of the lock; made where it is missing."""
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("wb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"--out {out}", "another run writes there now", remedy="wait for its end, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def check_out(out: Path, base: Path, names: Seq[str]) -> None:
    """Make the bundle's folder. Raises ConfigurationError where nothing can be written there, where it is a bundle of
    another base, or where something else than an adapter has the name of one of the classifiers."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".loraplex-probe"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    if (out / "config.json").exists() or (out / SETTINGS).exists():
        there = open_base(str(out)).base
        if there.resolve() != base.resolve():
            raise ConfigurationError(
                f"--out {out}",
                f"is a bundle of another base, {there}",
                remedy="give another folder, or the base of this one",
            )
    for folder in (out / name for name in names):
        part, old = _beside(folder)
        with writing(folder):
            if old.is_dir() and not os.path.lexists(folder):  # a kill while it was replaced
                os.replace(old, folder)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            part.rmdir()
        if os.path.lexists(folder) and (folder.is_symlink() or not (folder / ADAPTER_CONFIG).is_file()):
            raise ConfigurationError(
                folder, f"is there, and is no folder with {ADAPTER_CONFIG}", remedy="move it, or give another --out"
            )


def check_room(out: Path, num_parameters: int) -> None:
    """Raise ConfigurationError where the disk has no room for the adapters, and for two states to resume from: the new
    one is written beside the old one. Each has the weights, the best weights and the optimizer's two moments."""
    needed = 2 * 4 * 4 * num_parameters + 2 * num_parameters
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ConfigurationError(
            f"--out {out}",
            f"has {free / 1e9:.2f} GB of free space, and training writes {needed / 1e9:.2f} GB there",
            remedy="make room, give another folder, or train at a lower --rank or fewer classifiers at once",
        )


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
    """Write one adapter's folder in one piece; a folder that was there is replaced, when the new one is whole.

    dtype:   of the weights in the file.
    record:  how it was trained, for training.json.
    Raises ConfigurationError where the folder cannot be written.
    """
    from peft import LoraConfig

    tensors = {
        f"{PREFIX}{path}.{name}.weight": getattr(lora, name)[adapter]
        for path, lora in trainee.loras.items()
        for name in ("lora_A", "lora_B")
    }
    if trainee.score is not None:
        tensors[f"{PREFIX}{SCORE_HEADS[0]}.weight"] = trainee.score[adapter, : len(contract.labels)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=trainee.target_modules,
        task_type="CAUSAL_LM" if trainee.score is None else "SEQ_CLS",
        modules_to_save=None if trainee.score is None else list(SCORE_HEADS),
        base_model_name_or_path=base_name,
        alora_invocation_tokens=None if invocation is None else list(invocation),
        inference_mode=True,
    )
    written = contract.model_dump(mode="json", exclude_defaults=True)
    part, old = _beside(folder)
    with writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        saved = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        (part / ADAPTER_WEIGHTS).write_bytes(save(saved, {"format": "pt"}))
        config.save_pretrained(str(part))
        assert (part / ADAPTER_CONFIG).is_file()
        (part / CONTRACT).write_text(text_of(written), encoding="utf-8")
        (part / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where a folder is while it is written, and where the one is that it replaces."""
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


def write_bundle_settings(out: Path, base: Path, base_name: str) -> None:
    """Write where the bundle's base is, unless the folder says it already: an id on the hub for a base from its cache,
    else the path from the bundle."""
    if not (out / "config.json").exists() and not (out / SETTINGS).exists():
        named = base_name if in_cache(base) else os.path.relpath(base.resolve(), out.resolve())
        with writing(out):
            write_text(out / SETTINGS, f"base: {json.dumps(named)}\n")
