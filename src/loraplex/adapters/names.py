"""The names of adapters: which version answers for each, and what state it is in."""

import asyncio
from dataclasses import dataclass, field
from typing import Generic, Literal

from loraplex.adapters.residence import Version
from loraplex.bundle import AdapterSource
from loraplex.errors import ConfigurationError, LoraplexError, UnknownClassifierError

State = Literal["registered", "loading", "ready", "failed", "draining"]


@dataclass(slots=True, eq=False)
class Entry(Generic[Version]):
    """A name. `live` answers until another version has proved itself; `error` says why the last load of its source, or
    of what was to replace it, failed."""

    name: str
    source: AdapterSource
    live: Version | None = None
    error: LoraplexError | None = None
    is_pinned: bool = False
    is_registered: bool = False  # known without having been loaded
    is_leaving: bool = False
    num_loading: int = 0  # loads that run or wait for the lock
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one load or unload at a time
    first_load: "asyncio.Task[None] | None" = None  # while it runs
    retiring: "set[asyncio.Task[None]]" = field(default_factory=set)  # until the last lease of an older version

    @property
    def is_broken(self) -> bool:
        """Its files are wrong, so it is not tried again unless somebody loads it."""
        return self.live is None and isinstance(self.error, ConfigurationError)

    @property
    def is_wanted(self) -> bool:
        """False for a new name whose load failed: such a name is not known."""
        is_busy = self.num_loading > 0 or self.first_load is not None or self.is_leaving
        return self.is_registered or self.live is not None or is_busy

    @property
    def is_asked(self) -> bool:
        """Whether requests find it."""
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
    """All entries, in the order in which they came."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry[Version]] = {}

    def entries(self) -> tuple[Entry[Version], ...]:
        return tuple(self._entries.values())

    def asked(self) -> tuple[str, ...]:
        """The names that can be asked: not those that are being unloaded, or loaded for the first time."""
        return tuple(entry.name for entry in self._entries.values() if entry.is_asked)

    def knows(self, name: str) -> bool:
        """Whether the name can be asked."""
        entry = self._entries.get(name)
        return entry is not None and entry.is_asked

    def get(self, name: str) -> Entry[Version] | None:
        """None where there is none, or it is being unloaded."""
        entry = self._entries.get(name)
        return None if entry is None or entry.is_leaving else entry

    def entry(self, name: str) -> Entry[Version]:
        """UnknownClassifierError where there is none, or it is being unloaded."""
        entry = self.get(name)
        if entry is None:
            raise UnknownClassifierError(name, [one.name for one in self.entries() if not one.is_leaving])
        return entry

    def add(self, entry: Entry[Version]) -> Entry[Version]:
        """A new name, or one whose entry is being unloaded."""
        assert self.get(entry.name) is None, f"{entry.name} is known"
        self._entries[entry.name] = entry
        return entry

    def discard(self, entry: Entry[Version]) -> None:
        """Unless another entry has its name by now."""
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]

    def is_pinned(self, kv_id: str) -> bool:
        """Whether some name that has these weights is pinned: several names may have the same."""
        pinned = (entry.live for entry in self._entries.values() if entry.is_pinned)
        return any(live is not None and live.kv_id == kv_id for live in pinned)

    def clear(self) -> None:
        self._entries.clear()
