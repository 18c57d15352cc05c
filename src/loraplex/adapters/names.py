"""Adapter names: the version that answers for each, and the state of each. Loads nothing."""

import asyncio
from dataclasses import dataclass, field
from typing import Generic, Literal

from loraplex.adapters.residence import Version
from loraplex.bundle import AdapterSource
from loraplex.errors import ConfigurationError, LoraplexError, UnknownClassifierError

State = Literal["registered", "loading", "ready", "failed", "draining"]


@dataclass(slots=True, eq=False)
class Entry(Generic[Version]):
    """One adapter name.

    live:   the version that answers, until a new version is proven.
    error:  why the last load failed, whether of `source` or of its replacement.
    """

    name: str
    source: AdapterSource
    live: Version | None = None
    error: LoraplexError | None = None
    is_pinned: bool = False
    is_registered: bool = False  # known without having been loaded
    is_leaving: bool = False
    num_loading: int = 0  # loads that run or wait for `lock`
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one load or unload at a time
    first_load: "asyncio.Task[None] | None" = None  # set while it runs
    retiring: "set[asyncio.Task[None]]" = field(default_factory=set)  # wait for the last leases of older versions

    @property
    def is_broken(self) -> bool:
        """Whether the files are wrong. Requests do not load such an adapter again; only an explicit load does."""
        return self.live is None and isinstance(self.error, ConfigurationError)

    @property
    def is_wanted(self) -> bool:
        """Whether to keep the entry. False for a new name whose load failed: such a name is not known."""
        is_busy = self.num_loading > 0 or self.first_load is not None or self.is_leaving
        return self.is_registered or self.live is not None or is_busy

    @property
    def is_asked(self) -> bool:
        """Whether requests find the name."""
        return not self.is_leaving and (self.live is not None or self.is_registered)

    @property
    def state(self) -> State:
        if self.is_leaving:
            return "draining"
        if self.num_loading:
            return "loading"
        if self.live is not None:
            return "ready"
        return "registered" if self.error is None else "failed"


class Names(Generic[Version]):
    """All entries, in the order in which they were added."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry[Version]] = {}

    def entries(self) -> tuple[Entry[Version], ...]:
        return tuple(self._entries.values())

    def asked(self) -> tuple[str, ...]:
        """Return the names that requests find: live or registered, and not being unloaded."""
        return tuple(entry.name for entry in self._entries.values() if entry.is_asked)

    def knows(self, name: str) -> bool:
        """Return whether requests find the name."""
        entry = self._entries.get(name)
        return entry is not None and entry.is_asked

    def get(self, name: str) -> Entry[Version] | None:
        """Return the entry of a name; None where there is none, or it is being unloaded."""
        entry = self._entries.get(name)
        return None if entry is None or entry.is_leaving else entry

    def entry(self, name: str) -> Entry[Version]:
        """Return the entry of a name. Raises UnknownClassifierError where there is none, or it is being unloaded."""
        entry = self.get(name)
        if entry is None:
            raise UnknownClassifierError(name, [one.name for one in self.entries() if not one.is_leaving])
        return entry

    def add(self, entry: Entry[Version]) -> Entry[Version]:
        """Add the entry of a new name, or of a name whose entry is being unloaded."""
        assert self.get(entry.name) is None, f"{entry.name} is known"
        self._entries[entry.name] = entry
        return entry

    def discard(self, entry: Entry[Version]) -> None:
        """Remove the entry, unless another entry has its name by now."""
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]

    def is_pinned(self, kv_id: str) -> bool:
        """Return whether any name with these weights is pinned: several names may share weights."""
        pinned = (entry.live for entry in self._entries.values() if entry.is_pinned)
        return any(live is not None and live.kv_id == kv_id for live in pinned)

    def clear(self) -> None:
        self._entries.clear()
