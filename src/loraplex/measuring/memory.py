"""Measures the memory that processes take, from outside."""

import re
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

INTERVAL_S = 0.1
STATUS = Path("/proc/self/status")
CHILDREN_S = 1.0  # how often it looks for new children, which takes longer than to look at known ones


class PeakMemory:
    """Watches a process and its children while a `with` block runs, and keeps the most memory that they had.

    rss_bytes:     resident memory of all of them together, at its highest. Pages that several of them share count once:
                   what is shared is measured at the end.
    device_bytes:  what all processes of the machine took on the device, at its highest; None for a CPU.
    """

    def __init__(self, pid: int | None = None, device: torch.device | None = None) -> None:
        """pid: None watches this process. One that has ended already has no memory."""
        self._process: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)
        self._device = device
        self._known: list[psutil.Process] = []
        self._looked_s = -CHILDREN_S
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.rss_bytes = 0
        self.device_bytes: int | None = None

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._looked_s = -CHILDREN_S
        self._look()
        self.rss_bytes -= shared_bytes(self._known)

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        if self._process is not None:
            if time.monotonic() - self._looked_s >= CHILDREN_S:
                self._looked_s = time.monotonic()
                self._known = tree(self._process)
            self.rss_bytes = max(self.rss_bytes, rss_bytes(self._known))
        if self._device is not None and (used := used_device_bytes(self._device)) is not None:
            self.device_bytes = max(self.device_bytes or 0, used)


def tree(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and its children, and theirs; of one that has ended, itself."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def rss_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the resident memory of processes in bytes. One that has ended has none. Shared pages count for each."""
    total = 0
    for one in processes:
        with suppress(psutil.Error):
            total += int(one.memory_info().rss)
    return total


def shared_bytes(processes: Sequence[psutil.Process]) -> int:
    """Return by how much the processes' resident memory is less than their sum, because they share pages. 0 where the
    system does not say."""
    total = 0
    if len(processes) > 1:
        for one in processes:
            with suppress(psutil.Error, AttributeError):  # `pss` is Linux's
                found = one.memory_full_info()
                total += max(0, int(found.rss) - int(found.pss))
    return total


def peak_rss_bytes() -> int:
    """Return the most resident memory that this process ever had, as Linux keeps it: nothing watches, nothing is
    disturbed. Elsewhere what it has now."""
    if not STATUS.exists():
        return rss_bytes([psutil.Process()])
    [peak] = re.findall(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.M)
    return int(peak) * 1024


def used_device_bytes(device: torch.device) -> int | None:
    """Return the bytes that all processes together take on the device; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free
