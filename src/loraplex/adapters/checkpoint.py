"""A PEFT folder -> validated AdapterWeights with a content hash. Knows the format, not the model that runs it."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from loraplex.errors import AdapterError

# Keys of LoraConfig that do not change what a trained adapter computes.
INERT_KEYS = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config lora_dropout "
    "lora_ga_config megatron_config megatron_core peft_version qalora_group_size revision runtime_config "
    "velora_config".split()
)
# Keys that are read below.
READ_KEYS = frozenset(
    "alpha_pattern exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha peft_type r "
    "rank_pattern target_modules task_type use_rslora".split()
)
# Keys that change the computation in a way that is not implemented: accepted only at their inert default.
REFUSED_KEYS = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "bias": "trained base biases",
    "ensure_weight_tying": "tied adapters",
    "fan_in_fan_out": "transposed (Conv1D) layers",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
# These initialisations change the base's own weights, which an adapter file alone cannot say.
BASE_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

PREFIX = "base_model.model."
TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
DTYPES = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAWeights:
    """One linear layer's update: delta = scaling * lora_B @ lora_A."""

    lora_A: torch.Tensor  # [rank, in_features]
    lora_B: torch.Tensor  # [out_features, rank]
    scaling: float

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """modules: path of a linear layer in the base -> its update. kv_id: hash of all that changes keys and values."""

    modules: Mapping[str, LoRAWeights]
    kv_id: str

    @property
    def rank(self) -> int:
        return max(weights.rank for weights in self.modules.values())

    @property
    def num_parameters(self) -> int:
        return sum(weights.lora_A.numel() + weights.lora_B.numel() for weights in self.modules.values())


def read_adapter(folder: Path, linear_shapes: Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """Read the adapter in `folder` for a base whose linear layers are `linear_shapes` (path -> (out, in)).

    Every tensor is used and every layer that the config targets has its tensors, else AdapterError names the file and
    the tensor or key. Shapes are checked against the header before anything is allocated.
    """
    config_path, weights_path = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    config = _checked_config(read_json(config_path, AdapterError), config_path)
    try:
        with safe_open(weights_path, framework="pt") as file:
            sides = _checked_header(file, weights_path, linear_shapes)
            modules = {}
            for module in sorted(sides):
                rank = sides[module]["A"][0]
                expected, scaling = _rank_and_scaling(module, config)
                if rank != expected:
                    raise AdapterError(
                        weights_path,
                        f"{module} has rank {rank}, but {ADAPTER_CONFIG} says {expected}",
                        remedy="save the adapter again, config and weights together",
                    )
                lora_A, lora_B = (file.get_tensor(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB")
                for side, tensor in (("A", lora_A), ("B", lora_B)):
                    if not torch.isfinite(tensor).all():
                        raise AdapterError(
                            weights_path,
                            f"{module}.lora_{side} holds NaN or infinity",
                            remedy="train the adapter again",
                        )
                modules[module] = LoRAWeights(lora_A=lora_A, lora_B=lora_B, scaling=scaling)
    except (SafetensorError, OSError) as exc:
        raise AdapterError(
            weights_path, f"not readable as safetensors: {exc}", remedy="save or copy the file again"
        ) from None
    missing = [module for module in linear_shapes if _is_targeted(module, config) and module not in modules]
    if missing:
        raise AdapterError(
            weights_path,
            f"{ADAPTER_CONFIG} targets {missing[0]}, which has no tensors here ({len(missing)} such layers)",
            remedy="save the adapter again; the file is not complete, or it belongs to another base",
        )
    return AdapterWeights(modules=modules, kv_id=_content_hash(modules))


def _checked_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    def refuse(key: str, message: str, remedy: str) -> AdapterError:
        return AdapterError(f"{path}, key {key!r}", message, remedy=remedy)

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", f"{config.get('peft_type')!r} is not served", "use a LoRA adapter")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise refuse("task_type", f"{config['task_type']!r} is not served", "train the classifier as CAUSAL_LM")
    for key, value in config.items():
        if key in REFUSED_KEYS:
            if value and value != "none":
                raise refuse(key, f"{REFUSED_KEYS[key]} is not supported", "train the adapter without it")
        elif key not in INERT_KEYS | READ_KEYS:
            raise refuse(key, f"unknown, and it may change the answers (value {value!r})", "remove it if it is inert")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_MUTATING_INITS):
        raise refuse(
            "init_lora_weights",
            f"{init!r} changes the base's weights",
            "convert the adapter: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise refuse(key, f"must be a positive number, got {config.get(key)!r}", "save the adapter again")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(
            _is_regex(pattern) and isinstance(value, int | float) and value > 0 for pattern, value in patterns.items()
        ):
            raise refuse(key, f"must map patterns to positive numbers, got {patterns!r}", "save the adapter again")
    for key, kind in (
        ("target_modules", str),
        ("exclude_modules", str),
        ("layers_pattern", str),
        ("layers_to_transform", int),
    ):
        value = config.get(key)
        each = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(one, kind) for one in each):
            raise refuse(key, f"must be a {kind.__name__} or a list of them, got {value!r}", "save the adapter again")
        if isinstance(value, str) and not _is_regex(value):
            raise refuse(key, f"is not a regular expression: {value!r}", "save the adapter again")
    return config


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _checked_header(
    file: Any, path: Path, linear_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """module -> {"A": shape, "B": shape}; every tensor of the file is accounted for and fits the base."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for key in file.keys():
        match = TENSOR.fullmatch(key)
        if match is None:
            raise AdapterError(
                path,
                f"tensor {key!r} is not a LoRA weight that is supported",
                remedy="train the adapter as plain LoRA on linear layers",
            )
        header = file.get_slice(key)
        if header.get_dtype() not in DTYPES:
            raise AdapterError(
                path,
                f"tensor {key!r} is {header.get_dtype()}",
                remedy="save it as float16, bfloat16 or float32",
            )
        sides.setdefault(match["module"], {})[match["side"]] = tuple(header.get_shape())
    if not sides:
        raise AdapterError(path, "holds no tensors", remedy="save the adapter again")
    for module, shapes in sides.items():
        if module not in linear_shapes:
            raise AdapterError(
                path,
                f"the base has no linear layer {module!r}",
                remedy="serve the adapter on the base it was trained on",
            )
        if set(shapes) != {"A", "B"}:
            raise AdapterError(
                path, f"{module} has no lora_{'B' if 'A' in shapes else 'A'}", remedy="save the adapter again"
            )
        out_features, in_features = linear_shapes[module]
        lora_A, lora_B = shapes["A"], shapes["B"]
        rank = lora_A[0] if len(lora_A) == 2 else 0
        if lora_A != (rank, in_features) or lora_B != (out_features, rank) or rank < 1:
            raise AdapterError(
                path,
                f"{module} has lora_A {list(lora_A)} and lora_B {list(lora_B)}, "
                f"but the base's layer is {out_features} x {in_features}",
                remedy="serve the adapter on the base it was trained on",
            )
    return sides


def _rank_and_scaling(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """PEFT's rule: the first pattern that matches the path's end wins, else r and lora_alpha."""

    def pick(patterns: Mapping[str, float] | None, default: float) -> float:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = int(pick(config.get("rank_pattern"), config["r"]))
    alpha = pick(config.get("alpha_pattern"), config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _is_targeted(module: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule for `target_modules`, `exclude_modules` and `layers_to_transform`."""

    def named(names: Any) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets is None or targets == "all-linear":  # the model type's own list, which PEFT resolves: the tensors say it
        return False
    if config.get("exclude_modules") and named(config["exclude_modules"]):
        return False
    if not named(targets):
        return False
    if layers is None or isinstance(targets, str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf".*\.{pattern}\.(\d+)\.", module)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _content_hash(modules: Mapping[str, LoRAWeights]) -> str:
    digest = hashlib.sha256()
    for module, weights in sorted(modules.items()):
        for tensor in (weights.lora_A, weights.lora_B):
            digest.update(json.dumps([module, str(tensor.dtype), list(tensor.shape), weights.scaling]).encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
