"""The files that an adapter consists of: which are let in, how large they may be, and what is refused."""

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT
from loraplex.errors import AdapterError

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT)  # all that is ever read, fetched or unpacked
PICKLE = "adapter_model.bin"
ARCHIVE = ".tar.gz"
CHUNK = 2**20
CONVERT = "python -c " + shlex.quote(
    "import torch, safetensors.torch as s; "
    f'tensors = torch.load("{PICKLE}", map_location="cpu", weights_only=True); '
    # save_file takes neither views nor tensors that share memory, which pickles may hold
    "tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}; "
    f's.save_file(tensors, "{ADAPTER_WEIGHTS}", metadata={{"format": "pt"}})'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLimits:
    """What an adapter from anywhere may weigh; an archive may neither hold nor unpack to more."""

    max_bytes: int = 8 * 2**30
    max_text_bytes: int = 4 * 2**20  # for its config and its contract, which are parsed in memory
    max_members: int = 1000


LIMITS = SourceLimits()

SHAPES = "hf://org/name[/folder][@revision], s3://bucket/folder or s3://bucket/name.tar.gz"

Progress = Callable[[int, int | None], None]  # bytes so far, and in all


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSource:
    """A folder that holds an adapter's config and safetensors, and perhaps its contract.

    `source` names it from any working directory and holds no credentials: to show, and to resolve again. Symlinks in
    it are kept, so that one which is moved to the next version leads there."""

    path: Path
    source: str
    remote: bool


def sizes_of(folder: Path) -> dict[str, int]:
    """The bytes of the files that count, of those that are there and regular."""
    return {name: (folder / name).stat().st_size for name in (*FILES, PICKLE) if os.path.isfile(folder / name)}


def check(source: str, sizes: Mapping[str, int], limits: SourceLimits) -> None:
    """Refuse what is no adapter or too large, of the files `sizes` (name -> bytes)."""
    if PICKLE in sizes and ADAPTER_WEIGHTS not in sizes:
        raise AdapterError(
            source,
            f"holds {PICKLE}, a pickle, which can run code and is never loaded",
            remedy=f"convert it in its folder, which runs none: {CONVERT}",
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if name not in sizes:
            raise AdapterError(source, f"no {name} in it", remedy="give the folder that PEFT's save_pretrained wrote")
    for name in FILES:
        check_size(source, name, sizes.get(name, 0), limit_of(name, limits))


def check_size(source: str, what: str, size: int, limit: int) -> None:
    if size > limit:
        raise AdapterError(
            source,
            f"{what} has {size:,} bytes or more, and {limit:,} are allowed",
            remedy="save the adapter alone, without the base, or raise the limit",
        )


def limit_of(name: str, limits: SourceLimits) -> int:
    return limits.max_bytes if name == ADAPTER_WEIGHTS else limits.max_text_bytes


def reason_of(exc: Exception) -> str:
    return " ".join(str(exc).split())[:500] or type(exc).__name__
