"""What an adapter takes on the device and in host memory, and how many of its weights each token passes through."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.adapters.checkpoint import read_entries
from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.bundle import AdapterSource
from loraplex.errors import ConfigurationError, listed, quoted
from loraplex.planning.work import num_lora_weights

ALL_LINEAR, ATTENTION = "all-linear", "attention"
FLOAT32_BYTES = 4  # PEFT saves adapters in float32, and host memory keeps them as they are saved


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """The size of one adapter.

    num_placed:     parameters that a slot holds, in the base's number format.
    host_bytes:     bytes in host memory, in the number format of the adapter's file.
    num_lora:       weights of LoRA on linear layers, which each adapted token is multiplied with.
    rank:           the largest rank of a layer.
    shares_prefix:  whether the base computes the conversation (aLoRA).
    """

    num_placed: int
    host_bytes: int
    num_lora: int
    rank: int
    shares_prefix: bool = False


def adapter_of(layers: BaseLayers, rank: int, targets: str, *, shares_prefix: bool = False) -> AdapterSize:
    """Return the size of plain LoRA of a rank. targets: `all-linear`, `attention`, or names of layers with commas.
    Raises ConfigurationError for a name that no linear layer has."""
    num_lora = num_lora_weights(layers, rank, target_paths(layers, targets))
    return AdapterSize(
        num_placed=num_lora,
        host_bytes=num_lora * FLOAT32_BYTES,
        num_lora=num_lora,
        rank=rank,
        shares_prefix=shares_prefix,
    )


def target_paths(layers: BaseLayers, targets: str) -> list[str]:
    """Return the linear layers that `targets` names."""
    paths = [path for path in layers.linear if path not in layers.beside_text]
    if targets == ALL_LINEAR:
        return paths
    if targets == ATTENTION:
        return [path for path in paths if "att" in path]
    names = [name.strip() for name in targets.split(",") if name.strip()]
    known = sorted({path.rpartition(".")[2] for path in paths})
    for name in names:
        if not any(_ends(path, name) for path in paths):
            raise ConfigurationError(
                f"--targets {targets}",
                f"the base has no linear layer {quoted(name)}",
                remedy=f"give {ALL_LINEAR}, {ATTENTION}, or some of {listed(known)} with commas",
            )
    if not names:
        raise ConfigurationError("--targets", "names no layer", remedy=f"give {ALL_LINEAR}, {ATTENTION}, or names")
    return [path for path in paths if any(_ends(path, name) for name in names)]


def read_adapter_size(source: AdapterSource, layers: BaseLayers) -> AdapterSize:
    """Return the size of the adapter in a folder. Reads the header of its weights, and not the weights. Raises
    AdapterError where the adapter is not for this base."""
    plan, entries = read_entries(source.path, layers)
    kept = {
        name: entry
        for name, entry in entries.items()
        if name not in plan.optional and name.partition(".lora_")[0] not in layers.beside_text
    }
    pairs = [entry.shape for name, entry in kept.items() if name.partition(".lora_")[0] in layers.linear]
    matrices = [shape for shape in pairs if len(shape) == 2]
    return AdapterSize(
        num_placed=sum(math.prod(entry.shape) for entry in kept.values()),
        host_bytes=sum(entry.end - entry.begin for entry in kept.values()),
        num_lora=sum(map(math.prod, matrices)),
        rank=max(map(min, matrices), default=0),
        shares_prefix=plan.config.invocation_tokens is not None,
    )


def adapter_in_memory(weights: AdapterWeights) -> AdapterSize:
    """Return the size of an adapter that was read."""
    return AdapterSize(
        num_placed=weights.num_placed,
        host_bytes=weights.num_bytes,
        num_lora=sum(lora.lora_A.numel() + lora.lora_B.numel() for lora in weights.modules.values()),
        rank=weights.rank,
        shares_prefix=weights.invocation_tokens is not None and not weights.changes_prefix,
    )


def largest(sizes: Sequence[AdapterSize]) -> int:
    """Return the parameters of the largest adapter in its slot; 0 where there is none."""
    return max((one.num_placed for one in sizes), default=0)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
