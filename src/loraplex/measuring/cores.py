"""Measures how busy this machine's cores are: with this process, with one that is measured, and with all others."""

import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from loraplex.measuring.memory import tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """How many cores were busy on average: 1.5 is one and a half.

    client:  with this process. system: with the process that is watched and its children. others: with everything else
             on the machine.
    """

    client: float
    system: float
    others: float


class BusyCores:
    """Counts the processor time of a `with` block. Its `busy` is known afterwards."""

    def __init__(self, pid: int | None = None) -> None:
        """pid: the process to watch; None watches none, and counts it among the others."""
        self._client, self._system = psutil.Process(), None
        with suppress(psutil.NoSuchProcess):
            self._system = None if pid is None else psutil.Process(pid)
        self.busy = Busy(client=0.0, system=0.0, others=0.0)

    def __enter__(self) -> Self:
        self._before = self._seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall, client, system, everything = (
            after - before for before, after in zip(self._before, self._seconds(), strict=True)
        )
        if wall > 0:
            others = everything - client - system
            self.busy = Busy(client=client / wall, system=max(0.0, system / wall), others=max(0.0, others / wall))

    def _seconds(self) -> tuple[float, float, float, float]:
        """Return the time, and the processor seconds of the client, the system and the whole machine until now."""
        system = 0.0
        for one in () if self._system is None else tree(self._system):
            with suppress(psutil.Error):
                found = one.cpu_times()
                system += found.user + found.system
        mine, machine = self._client.cpu_times(), psutil.cpu_times()
        busy = machine.user + machine.nice + machine.system  # guests are in `user`
        return time.monotonic(), mine.user + mine.system, system, busy
