"""Reads the tensors of a base's safetensors files, one by one."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import torch

from loraplex.adapters.tensor_file import TensorFile
from loraplex.bundle import read_json
from loraplex.errors import UnsupportedModelError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Protocol):
    """The tensors of a base, by name."""

    @property
    def names(self) -> frozenset[str]: ...

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the tensor in `dtype` on the device. Raises UnsupportedModelError where it is missing or has another
        shape."""
        ...


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the tensors of the base in a folder: one, or several shards."""
    index = folder / INDEX
    names = [FILE] if not index.is_file() else sorted(set(map(str, read_json(index)["weight_map"].values())))
    return [folder / name for name in names]


class BaseWeights:
    """The tensors of the base in a folder, by name, from one file or several shards. Any thread may read.

    All tensors are of one version of the files: reading a file that has changed raises UnsupportedModelError."""

    def __init__(self, folder: Path) -> None:
        """Raises UnsupportedModelError where a file is not readable as safetensors."""
        self._folder = folder
        self._shards: dict[str, TensorFile] = {}  # tensor -> the file that holds it
        for path in weight_files(folder):
            shard = TensorFile(path, UnsupportedModelError)
            self._shards |= dict.fromkeys(shard.entries, shard)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shards)

    def num_parameters(self, without: Collection[str] = ()) -> int:
        """Return how many numbers all tensors hold together. without: names that do not count."""
        return sum(math.prod(shard.entries[name].shape) for name, shard in self._shards.items() if name not in without)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        entries = [shard.entries[name] for name, shard in self._shards.items()]
        return sum(entry.end - entry.begin for entry in entries)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a copy, because the file may change. Otherwise as `Weights.read`."""
        self.check(name, shape)
        return self._shards[name].read([name])[name].to(device, dtype)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UnsupportedModelError where the tensor is missing or has another shape."""
        if name not in self._shards:
            raise UnsupportedModelError(
                self._folder, f"the weights lack {name!r}", remedy="copy all of the base's safetensors files"
            )
        found = self._shards[name].entries[name].shape
        if found != shape:
            raise UnsupportedModelError(
                self._folder,
                f"the base does not load: {name!r} has shape {list(found)}, config.json says {list(shape)}",
                remedy="copy config.json and the weights of one base",
            )

    def find(self, name: str) -> torch.Tensor | None:
        """Return the tensor as it is stored; None where no tensor has that name."""
        return None if name not in self._shards else self._shards[name].read([name])[name]
