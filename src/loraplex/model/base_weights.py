"""Reads the tensors of a base's safetensors files, one by one."""

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

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


class BaseWeights:
    """The tensors of the base in a folder, by name, from one file or several shards. One file is open at a time,
    because the pages of an open file count as the process's memory."""

    def __init__(self, folder: Path) -> None:
        """Raises UnsupportedModelError where a file is not readable as safetensors."""
        self._folder = folder
        index = folder / INDEX
        shards = [FILE] if not index.is_file() else sorted(set(map(str, read_json(index)["weight_map"].values())))
        self._shards: dict[str, str] = {}  # tensor -> the file that holds it
        self._opened: tuple[str, Any] = "", None
        for shard in shards:
            self._shards |= dict.fromkeys(self._file(shard).keys(), shard)
        self._opened = "", None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shards)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a copy, because the file may change. Otherwise as `Weights.read`."""
        if name not in self._shards:
            raise UnsupportedModelError(
                self._folder, f"the weights lack {name!r}", remedy="copy all of the base's safetensors files"
            )
        tensor: torch.Tensor = self._file(self._shards[name]).get_tensor(name)
        if tensor.shape != shape:
            raise UnsupportedModelError(
                self._folder,
                f"the base does not load: {name!r} has shape {list(tensor.shape)}, config.json says {list(shape)}",
                remedy="copy config.json and the weights of one base",
            )
        return tensor.to(device, dtype, copy=True)

    def find(self, name: str) -> torch.Tensor | None:
        """Return the tensor as it is stored; None where no tensor has that name."""
        if name not in self._shards:
            return None
        found: torch.Tensor = self._file(self._shards[name]).get_tensor(name)
        return found

    def _file(self, shard: str) -> Any:
        if self._opened[0] != shard:
            self._opened = "", None  # close this file before the next one is mapped
            try:
                self._opened = shard, safe_open(self._folder / shard, framework="pt")
            except (SafetensorError, OSError) as exc:
                raise UnsupportedModelError(
                    self._folder / shard, f"the base does not load: {exc}", remedy="save or copy the base again"
                ) from None
        return self._opened[1]
