"""The files of an adapter: which are accepted, how large they may be, and which are refused."""

import math
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT, PROMPT_FILES
from loraplex.errors import AdapterError
from loraplex.io_yaml import IO_YAML

FILES = (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONTRACT,
    IO_YAML,
    *PROMPT_FILES,
)  # the only files that are read, fetched or unpacked
PICKLE = "adapter_model.bin"
ARCHIVE = ".tar.gz"
CHUNK = 2**20
TELL_EVERY_S = 5
CONVERT = "python -c " + shlex.quote(
    "import torch, safetensors.torch as s; "
    f'tensors = torch.load("{PICKLE}", map_location="cpu", weights_only=True); '
    # save_file refuses views and tensors that share memory; pickles may hold both
    "tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}; "
    f's.save_file(tensors, "{ADAPTER_WEIGHTS}", metadata={{"format": "pt"}})'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLimits:
    """Size limits of an adapter from any source. An archive may not unpack to more than `max_bytes`."""

    max_bytes: int = 8 * 2**30
    max_text_bytes: int = 4 * 2**20  # of the config, the contract and the like, which are parsed in memory
    max_vocabulary_bytes: int = 128 * 2**20  # of tokenizer.json; those of 250,000 tokens take about 35 MB
    max_members: int = 1000


LIMITS = SourceLimits()

SHAPES = "hf://org/name[/folder][@revision], s3://bucket/folder or s3://bucket/name.tar.gz"

Progress = Callable[[int, int | None], None]  # bytes so far, and in all (None: not known)


def telling(name: str, tell: Callable[[str], object], *, begins: bool = True) -> Progress:
    """Return a function that tells a download's progress at its begin (unless not `begins`), and every few seconds."""
    told = -math.inf if begins else math.nan

    def progress(num_bytes: int, total: int | None) -> None:
        nonlocal told
        if math.isnan(told):
            told = time.monotonic()
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            tell(f"{name}: {num_bytes >> 20} of {'?' if total is None else total >> 20} MiB")

    return progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSource:
    """A local folder with an adapter's config and safetensors file, and its contract if it has one.

    source:  names the adapter from any working directory and holds no credentials. It can be shown and resolved again.
             Symlinks in it are kept, so a link that is moved to the next version resolves to that version.
    remote:  whether the adapter was downloaded.
    """

    path: Path
    source: str
    remote: bool


def sizes_of(folder: Path) -> dict[str, int]:
    """Return name -> bytes of the adapter files (and the pickle) that `folder` holds as regular files."""
    return {name: (folder / name).stat().st_size for name in (*FILES, PICKLE) if os.path.isfile(folder / name)}


def check(source: str, sizes: Mapping[str, int], limits: SourceLimits) -> None:
    """Raise AdapterError where the files in `sizes` (name -> bytes) are not an adapter, or are too large."""
    if PICKLE in sizes and ADAPTER_WEIGHTS not in sizes:
        raise AdapterError(
            source,
            f"holds {PICKLE}, a pickle, which can run code and is never loaded",
            remedy=f"convert the pickle in its folder; this command runs no code from it: {CONVERT}",
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
            remedy="no setting raises this limit; "
            + (
                "shorten the file"
                if what in FILES and what != ADAPTER_WEIGHTS
                else "save the adapter alone, without the base"
            ),
        )


def limit_of(name: str, limits: SourceLimits) -> int:
    special = {ADAPTER_WEIGHTS: limits.max_bytes, "tokenizer.json": limits.max_vocabulary_bytes}
    return special.get(name, limits.max_text_bytes)


def reason_of(exc: Exception) -> str:
    return " ".join(str(exc).split())[:500] or type(exc).__name__
