"""The machine's memory and threads. Knows nothing of models."""

import ctypes
import math
import os
import resource
import sys
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController

KERNELS_KEPT = 64
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2's limits of a container, as it sees them from inside


def budget_bytes(budget: str, device: torch.device) -> int:
    """Return a budget in bytes: a share ("20%") of the memory that is free now, or a size ("2GiB")."""
    return budget_of(budget, free_bytes(device) if budget.endswith("%") else 0)


def budget_of(budget: str, free: int) -> int:
    """Return a budget in bytes where `free` bytes are free."""
    if budget.endswith("%"):
        return int(float(budget[:-1]) / 100 * free)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(budget[-3:-2], 1)
    return int(float(budget.removesuffix("iB").rstrip("KMG")) * unit)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on the device now; 0 where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_meminfo("MemAvailable"), container_bytes())


def total_bytes(device: torch.device) -> int:
    """Return the most bytes that could ever be free on the device, with the swap of a CPU's machine; 0 where nobody
    says. What other processes and the kernel's caches hold now counts, because they may give it back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machines = _meminfo("MemTotal")
    try:
        machines = min(machines, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return machines and machines + _meminfo("SwapTotal")


def swap_bytes() -> int:
    """Return the bytes that the machine can still swap out."""
    return _meminfo("SwapFree")


def _meminfo(key: str) -> int:
    """Return a figure of the machine's memory in bytes; 0 where the machine does not say."""
    for line in MEMINFO.read_text().splitlines() if MEMINFO.exists() else ():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def container_bytes() -> int:
    """Return the bytes of memory that a container may still take. Without a limit: more than any machine has.

    Files that the kernel has cached for the container count as its memory, but are dropped when it needs more."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])
        return max(1, limit - used + cached)  # 0 would mean that nobody says
    except (OSError, ValueError, KeyError):  # no such file, or "max"
        return sys.maxsize


def give_back(device: torch.device) -> None:
    """Return freed memory to the machine, as far as possible. The allocators would keep it for themselves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def bound_kernel_caches() -> None:
    """Let PyTorch keep fewer of oneDNN's compiled products, unless the environment says how many. Call it before the
    first product: PyTorch and oneDNN read their variables then.

    Each number of tokens gets a product of its own, and in bfloat16 on a CPU each keeps up to some MB of workspace. By
    default 1024 of them are kept in each of two caches, which takes more than a GB once lengths have varied."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def choose_threads() -> None:
    """Limit PyTorch's threads to the cores that this process may use, unless OMP_NUM_THREADS is set.

    PyTorch counts the cores of the machine, and does not know that a container's share may be smaller."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_threads = min(len(os.sched_getaffinity(0)), math.ceil(cpu_quota()))
    if num_threads < torch.get_num_threads():
        torch.set_num_threads(num_threads)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process ever took: on a CUDA device what PyTorch allocated there, else resident
    memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compute_alone() -> None:
    """Make PyTorch compute on the calling thread alone from now on, without OpenMP threads.

    OpenMP threads live as long as the thread that they belong to. When a process has more of them than cores, idle ones
    go to sleep immediately, and each parallel operation has to wake them. The engine's small operations then took four
    times as long."""
    torch.get_num_threads()  # sets the number on a thread's first call; a later first call would undo the limit
    ThreadpoolController().limit(limits=1, user_api="openmp")


def cpu_quota(path: Path = CGROUP / "cpu.max") -> float:
    """Return the CPU time that cgroup v2 allows the process, in cores. Without a quota: the number of cores."""
    try:
        quota, period = path.read_text().split()
        return max(1.0, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return float(os.cpu_count() or 1)
