"""What the store knows of an adapter's version, and who reads, places and proves one."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from loraplex.bundle import AdapterSource


class Loaded(Protocol):
    """What the store needs to know of a version."""

    @property
    def source(self) -> AdapterSource: ...
    @property
    def version(self) -> str: ...
    @property
    def kv_id(self) -> str:
        """Of its weights: versions that differ in their contract only share host memory and slot."""
        ...

    @property
    def num_bytes(self) -> int:
        """On the device."""
        ...

    @property
    def host_bytes(self) -> int: ...


Version = TypeVar("Version", bound=Loaded)


class Loader(Protocol[Version]):
    """Does the work. `read` may run in several threads at once; `place` and `clear` run in one, in order."""

    def read(self, source: AdapterSource) -> tuple[Version, Any]:
        """A version and its weights, from disk. LoraplexError says what is wrong with it."""
        ...

    def place(self, slot: int, version: Version, weights: Any) -> None: ...

    def clear(self, slot: int) -> None: ...

    async def prove(self, version: Version, slot: int) -> None:
        """LoraplexError where it must not go live."""
        ...


class Lease(Generic[Version]):
    """A version in its slot, until `release`, which may be called twice."""

    def __init__(self, version: Version, slot: int, release: Callable[[Version], None]) -> None:
        self.version, self.slot, self._release = version, slot, release
        self._is_open = True

    def release(self) -> None:
        if self._is_open:
            self._is_open = False
            self._release(self.version)
