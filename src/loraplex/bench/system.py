"""The seam between the benchmark and what it measures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from loraplex.bench.load import Load, Sample

Transport = Literal["http", "in-process"]
Tell = Callable[[], None]  # called after each conversation that has ended


class SystemEnded(Exception):
    """The system's process ended while it was measured. The message says how."""


class System(Protocol):
    """One system: started once, asked in slices, closed. It is a process of its own, or a server that already runs.

    A system that is asked over HTTP runs the load in this process (`generate(self.ask, load, tell)`); one that is asked
    in process runs the same load in its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def transport(self) -> Transport: ...

    @property
    def shares_prefix(self) -> bool:
        """Whether one computation of a conversation can serve several classifiers."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Distribution -> version, as the system's own interpreter has them. Known after `start`."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else a reader of its figures must know. `adapters: false`: its verdicts are the base's."""
        ...

    @property
    def pid(self) -> int | None:
        """The process whose memory counts, with its children; None for a server that was not started here."""
        ...

    async def start(self, classifiers: Sequence[str]) -> None:
        """Start the system. Returns when it answers. Raises LoraplexError where it cannot start, or does not serve all
        of the classifiers."""
        ...

    async def run(self, load: Load, tell: Tell) -> list[Sample]:
        """Ask as `load` says. Returns a sample of each request that has ended. Raises SystemEnded."""
        ...

    async def close(self) -> None:
        """End the process. Safe to call twice, and without `start`."""
        ...
