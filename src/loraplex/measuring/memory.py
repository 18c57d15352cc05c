"""Measures the memory that processes take, from outside."""

import re
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

INTERVAL_S = 0.1
STATUS = Path("/proc/self/status")


class PeakMemory:
    """Watches a process and its children while a `with` block runs, and keeps the most memory that they had.

    rss_bytes:  resident memory of all of them together, at its highest. Pages that they share count for each of them.
    """

    def __init__(self, pid: int | None = None) -> None:
        """pid: None watches this process. One that has ended already has no memory."""
        self._process: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):
            self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.rss_bytes = 0

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        if self._process is not None:
            self.rss_bytes = max(self.rss_bytes, rss_bytes(self._process))


def rss_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and its children in bytes; 0 once it has ended."""
    total = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += int(one.memory_info().rss)
    return total


def peak_rss_bytes() -> int:
    """Return the most resident memory that this process ever had, as Linux keeps it: nothing watches, nothing is
    disturbed. Elsewhere what it has now."""
    if not STATUS.exists():
        return rss_bytes(psutil.Process())
    [peak] = re.findall(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text(), re.M)
    return int(peak) * 1024


def used_device_bytes(device: torch.device) -> int | None:
    """Return the bytes that all processes together take on the device; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free
