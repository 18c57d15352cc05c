"""What the machine has to give: memory, and threads."""

import ctypes
import math
import os
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController


def budget_bytes(budget: str, device: torch.device) -> int:
    """ "20%" of the memory that is free now, or "2GiB"."""
    if budget.endswith("%"):
        return int(float(budget[:-1]) / 100 * free_bytes(device))
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(budget[-3:-2], 1)
    return int(float(budget.removesuffix("iB").rstrip("KMG")) * unit)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now; 0 where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def give_back(device: torch.device) -> None:
    """What was freed goes back to the machine, as far as the allocators let it: they keep it for themselves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def choose_threads() -> None:
    """As many as this process may use at once, unless OMP_NUM_THREADS says otherwise: PyTorch counts the cores
    of the machine and does not know that a container's share may be smaller."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_threads = min(len(os.sched_getaffinity(0)), math.ceil(_cpu_quota()))
    if num_threads < torch.get_num_threads():
        torch.set_num_threads(num_threads)


def compute_alone() -> None:
    """From now on PyTorch computes on the calling thread itself, without OpenMP threads of its own, which would live as
    long as it does. When all of these in the process are more than the cores, OpenMP's waiting threads go to sleep at
    once, and each parallel operation has to wake its own: the engine's small ones took four times as long."""
    torch.get_num_threads()  # which sets it, the first time on a thread
    ThreadpoolController().limit(limits=1, user_api="openmp")


def _cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores' worth of time that cgroup v2 gives the process; infinity's stand-in is the number of cores."""
    try:
        quota, period = path.read_text().split()
        return max(1.0, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return float(os.cpu_count() or 1)
