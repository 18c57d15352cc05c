"""Reads a PEFT folder into validated AdapterWeights with a content hash, and writes plain LoRA back. Knows the format,
not the model that runs it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from loraplex.adapters.kinds import kinds_of
from loraplex.adapters.mistakes import check_experts, check_gathered, check_head, check_name, check_task, warn_of_task
from loraplex.adapters.peft_config import PeftConfig, read_peft_config
from loraplex.adapters.plan import SAVE_AGAIN, TRAIN_PLAINER, WRONG_BASE, Plan, assemble, explain, make_plan
from loraplex.adapters.tensor_file import Entry, TensorFile
from loraplex.adapters.tensor_names import PREFIX, pefts_name, read_name
from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loraplex.errors import AdapterError, quoted

DTYPES = ("F16", "BF16", "F32", "F64")
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
LARGEST = torch.finfo(torch.bfloat16).max  # the smallest maximum among the types that a base computes in


class Unidentified(NamedTuple):
    """An adapter that was read and checked, but not yet compared with the base's weights."""

    config: PeftConfig
    weights: AdapterWeights  # with an empty kv_id
    warnings: tuple[str, ...]  # what is odd about it, although it is served

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of adapter that a backend must serve for it. Includes "other_embedding" for a saved copy of an
        embedding or head, although the copy may turn out to equal the base's own."""
        return kinds_of(self.config, self.weights)

    def identify(self, parameter: Callable[[str], torch.Tensor | None]) -> AdapterWeights:
        """Return the adapter with its content hash and kinds, without the tensors that only copy the base's own.

        parameter:  returns the base's tensor of a name, such as "lm_head.weight"; None where the base has none."""
        weights = self.weights.without_base_copies(parameter)
        return replace(weights.with_content_id(), kinds=kinds_of(self.config, weights))


def read_unidentified(folder: Path, base: BaseLayers) -> Unidentified:
    """Read the adapter in `folder`, and check it against the layers of a base.

    Raises AdapterError where a tensor is unexpected, missing, of the wrong shape or not finite. The error names the
    file and the tensor or key. Names and shapes are checked on the header, before any tensor is read. The tensors
    are in memory of their own, so they do not change with the file.
    """
    plan, file, names = _plan(folder, base)
    wanted = {key: name for name, key in names.items() if name not in plan.unused}
    tensors = {wanted[key]: tensor for key, tensor in file.read(wanted).items()}
    _check_finite(plan, tensors, folder / ADAPTER_WEIGHTS)
    warnings = (*warn_of_task(plan.config), *_warn_of_fan_in_fan_out(plan), *_warn_of_vision(plan))
    return Unidentified(plan.config, assemble(plan, tensors), warnings)


def read_entries(folder: Path, base: BaseLayers) -> tuple[Plan, dict[str, Entry]]:
    """Return what `read_unidentified` would read of the adapter: its plan, and the tensors by their names without
    PEFT's prefix. Reads the header only. Raises AdapterError."""
    plan, file, names = _plan(folder, base)
    return plan, {name: file.entries[key] for name, key in names.items() if name not in plan.unused}


def _plan(folder: Path, base: BaseLayers) -> tuple[Plan, TensorFile, dict[str, str]]:
    """Return the checked plan of an adapter, its file, and name without PEFT's prefix -> name in the file."""
    config = read_peft_config(folder)
    path = folder / ADAPTER_WEIGHTS
    file = TensorFile(path, AdapterError, max_header_bytes=MAX_HEADER_BYTES)
    names = _read_names(file, path, base)
    found = {name: file.entries[key].shape for name, key in names.items()}
    check_gathered(path, found)
    check_experts(path, found)
    check_task(folder, config, found)
    plan = make_plan(folder, config, base, found)
    _check_shapes(plan, found, path)
    return plan, file, names


def _read_names(file: TensorFile, path: Path, base: BaseLayers) -> dict[str, str]:
    """Return name without PEFT's prefix -> name in the file. Raises AdapterError for a name or type not supported."""
    if not file.entries:
        raise AdapterError(path, "holds no tensors", remedy=SAVE_AGAIN)
    if len(file.entries) > MAX_TENSORS:
        raise AdapterError(path, f"holds {len(file.entries)} tensors, over {MAX_TENSORS}", remedy=SAVE_AGAIN)
    names: dict[str, str] = {}
    for key, entry in file.entries.items():
        if entry.dtype not in DTYPES:
            raise AdapterError(
                path, f"tensor {quoted(key)} is {quoted(entry.dtype)}", remedy="save it as float16, bfloat16 or float32"
            )
        known = read_name(key)
        check_name(path, known)
        name = known.removeprefix(PREFIX)
        if name == known:
            raise AdapterError(
                path, f"tensor {quoted(key)} is not named as PEFT does ({PREFIX}…)", remedy="save the adapter with PEFT"
            )
        former = next((begin for begin in base.former_names if name.startswith(begin) and ".lora_" in name), None)
        if former is not None:
            name = base.former_names[former] + name.removeprefix(former)
        if name in names:
            raise AdapterError(path, f"holds {quoted(name)} twice", remedy=SAVE_AGAIN)
        names[name] = key
    return names


def _check_shapes(plan: Plan, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in found.items():
        if name in plan.required:
            expected = plan.required[name].shape
        elif name in plan.optional:
            expected = plan.optional[name]
        elif name in plan.unused:
            continue
        else:
            raise AdapterError(
                path, f"tensor {quoted(PREFIX + name)} is not expected: {explain(plan, name)}", remedy=TRAIN_PLAINER
            )
        if shape == expected:
            continue
        check_head(plan, name, shape, expected, path)
        message = f"tensor {quoted(PREFIX + name)} has shape {list(shape)}, expected {list(expected)}"
        if name.endswith("weight") and len(shape) == 2 and shape[1:] == expected[1:] and "lora_" not in name:
            raise AdapterError(
                path,
                f"{message}: the embedding was resized",
                remedy="add the tokens to the base, save it and train on that, or train without new tokens",
            )
        raise AdapterError(path, message, remedy=WRONG_BASE)
    missing = [name for name in plan.required if name not in found]
    if missing:
        raise AdapterError(
            path,
            f"tensor {quoted(PREFIX + missing[0])} is missing ({len(missing)} in all): "
            f"{plan.required[missing[0]].reason}",
            remedy=f"{SAVE_AGAIN}; the file is not complete, or it belongs to another base",
        )


def _check_finite(plan: Plan, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".lora_")
        factor = plan.scaling[layer] if part in ("B.weight", "B.bias", "embedding_B") else 1.0
        low, high = (extreme.item() for extreme in tensor.aminmax())  # both are NaN where any element is
        if not (factor <= LARGEST and max(-low, high) * factor <= LARGEST):
            raise AdapterError(
                path,
                f"tensor {quoted(PREFIX + name)} holds NaN or infinity, or overflows when scaled by {factor:g}",
                remedy="train the adapter again",
            )


def _warn_of_fan_in_fan_out(plan: Plan) -> tuple[str, ...]:
    """Return a warning where fan_in_fan_out does not fit the types of the layers. The types decide, as in PEFT."""
    linear = {path for path in plan.scaling if path in plan.layers.linear}
    is_conv1d = bool(linear) and linear <= plan.layers.conv1d
    given = plan.config.fan_in_fan_out
    if (given and linear.isdisjoint(plan.layers.conv1d)) or (
        is_conv1d and not given and plan.output not in plan.scaling
    ):
        return (f"its fan_in_fan_out is {given}, which does not fit the base's layers; their type decides",)
    return ()


def _warn_of_vision(plan: Plan) -> tuple[str, ...]:
    num = len(plan.scaling.keys() & plan.layers.beside_text)
    return (f"its LoRA on {num} layers of the base's vision part changes no answer to a text",) if num else ()


def write_lora(folder: Path, weights: AdapterWeights) -> None:
    """Write the linear layers' LoRA as a plain PEFT adapter in float32, for another library to read. The scaling is
    multiplied into lora_B, because libraries differ in how they read patterns of ranks and alphas."""
    tensors = {}
    for path, lora in weights.modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = lora.lora_A.float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = (lora.lora_B.float() * lora.scaling).contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    names = sorted({path.rpartition(".")[2] for path in weights.modules})
    config = {"peft_type": "LORA", "r": weights.rank, "lora_alpha": weights.rank, "target_modules": names}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")


def rename_tensors(source: Path, target: Path) -> int:
    """Write the weights in the folder `source` to the folder `target` under PEFT's names. Return how many were renamed;
    where none was, nothing is written.

    Raises AdapterError where two tensors would get one name."""
    file = TensorFile(source / ADAPTER_WEIGHTS, AdapterError, max_header_bytes=MAX_HEADER_BYTES)
    names: dict[str, str] = {}
    for key in file.entries:
        if (other := names.setdefault(pefts_name(key), key)) != key:
            raise AdapterError(
                source / ADAPTER_WEIGHTS,
                f"tensors {quoted(other)} and {quoted(key)} have one name in PEFT",
                remedy="save the unwrapped model again",
            )
    num_renamed = sum(name != key for name, key in names.items())
    if num_renamed:
        tensors = file.read(names.values())
        renamed = {name: tensors[key] for name, key in names.items()}
        save_file(renamed, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return num_renamed
