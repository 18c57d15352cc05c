"""Where the weights of adapter versions are: on disk, in host memory, in a slot of the device. Runs on one event loop;
what blocks runs in threads. Knows no tensors."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from loraplex.adapters.host import HostTier
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.tasks import Tasks, closed
from loraplex.adapters.threads import AdapterThreads
from loraplex.bundle import AdapterSource
from loraplex.errors import AdapterError, EngineError, LoraplexError, NotReadyError

logger = logging.getLogger(__name__)


class Resident(Protocol):
    """What has to be known of an adapter's version."""

    @property
    def source(self) -> AdapterSource: ...

    @property
    def id(self) -> str:
        """Identity of the version, as answers show it."""
        ...

    @property
    def kv_id(self) -> str:
        """Identity of its weights: versions that differ in their contract only share host memory and slot."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        ...

    @property
    def host_bytes(self) -> int: ...


Version = TypeVar("Version", bound=Resident)
Read = TypeVar("Read", bound=Resident, covariant=True)


class Reader(Protocol[Read]):
    def read(self, source: AdapterSource) -> tuple[Read, Any]:
        """A version and its weights, from disk; several threads may read at once. LoraplexError says what is wrong."""
        ...


class Device(Protocol):
    """Called on one thread, in order."""

    def set_slot(self, slot: int, folder: Path, weights: Any) -> None: ...

    def clear_slot(self, slot: int) -> None: ...


class Lease(Generic[Version]):
    """A version in its slot, until `release`, which may be called twice."""

    def __init__(self, version: Version, slot: int, release: Callable[[Version], None]) -> None:
        self.version, self.slot, self._release = version, slot, release
        self._is_open = True

    def release(self) -> None:
        if self._is_open:
            self._is_open = False
            self._release(self.version)


class Residence(Generic[Version]):
    """Versions by their weights, and leases. A version that is leased stays in its slot and is not forgotten. All
    methods are called on the event loop's thread. After `close` they raise NotReadyError."""

    def __init__(
        self,
        reader: Reader[Version],
        device: Device,
        slots: SlotTable,
        host: HostTier,
        threads: AdapterThreads,
        tasks: Tasks,
    ) -> None:
        self._reader, self._device, self.slots, self.host = reader, device, slots, host
        self._threads, self._tasks = threads, tasks
        # Live versions by kv_id. They are held here, so that an id below is never another version's.
        self._versions: defaultdict[str, list[Version]] = defaultdict(list)
        self._num_leases: Counter[int] = Counter()  # by id() of the version, counting those that wait for theirs
        self._waiting: dict[str, list[tuple[Version, asyncio.Future[Lease[Version]]]]] = {}  # by kv_id, while placed
        self._reserving = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()  # a lease, a slot or a pin was given up
        self.num_reads = 0  # from disk, so far

    async def close(self) -> None:
        """Whoever waits for a lease gets NotReadyError. Safe to call twice."""
        self._changed.set()
        for _, future in (one for waiting in self._waiting.values() for one in waiting):
            if not future.done():
                future.set_exception(closed())
                future.exception()
        await self._tasks.close()
        await self._threads.close()

    # ------------------------------------------------------------------------------------------- versions

    async def read(self, source: AdapterSource) -> tuple[Version, Any]:
        """Read a version from disk; it is held in host memory from now on, until it is forgotten."""
        self.num_reads += 1
        self._tasks.check_open()
        version, weights = await self._threads.read(self._reader.read, source)
        self.add(version, weights)
        return version, weights

    def add(self, version: Version, weights: Any) -> None:
        """A version that was read."""
        self._tasks.check_open()
        self._versions[version.kv_id].append(version)
        self.host.put(version.kv_id, weights, version.host_bytes)

    async def retire(self, version: Version) -> None:
        """Forget the version when nobody leases it any more."""
        while self._num_leases[id(version)]:
            await self._next_change()
        await self.forget(version)

    async def forget(self, version: Version) -> None:
        """Nobody leases it. Free what it holds, unless another version has the same weights."""
        others = [one for one in self._versions[version.kv_id] if one is not version]
        self._versions[version.kv_id] = others
        if not others:
            del self._versions[version.kv_id]
            await self._tasks.finish(self._tasks.spawn(self._free(version.kv_id)))

    def pin(self, kv_id: str, is_pinned: bool) -> None:
        """A pinned version keeps its slot, where it has one."""
        if kv_id in self.slots:
            self.slots.pin(kv_id, is_pinned)
            self._changed.set()

    async def _free(self, kv_id: str) -> None:
        while kv_id in self._waiting:  # it is being placed for nobody, or for a version that came since
            await self._next_change()
        if kv_id in self._versions:
            return
        self.host.drop(kv_id)
        if kv_id in self.slots:
            await self._vacate(kv_id)

    # ------------------------------------------------------------------------------------------- leases

    def is_awaited(self, version: Version) -> bool:
        """Whether its weights are on their way to the device."""
        return version.kv_id in self._waiting

    def try_lease(self, version: Version) -> Lease[Version] | None:
        """None also while its weights are on their way into the slot, which is its own from the start."""
        slot = None if self.is_awaited(version) else self.slots.lease(version.kv_id)
        return None if slot is None else self._new_lease(version, slot)

    async def lease(self, version: Version, weights: Any = None) -> Lease[Version]:
        """The version in a slot, placed if need be. However many wait for it, it is placed once. weights: where the
        caller has them."""
        lease = self.try_lease(version)
        if lease is not None:
            return lease
        self._num_leases[id(version)] += 1  # it must not be forgotten while it is waited for
        future: asyncio.Future[Lease[Version]] = asyncio.get_running_loop().create_future()
        if version.kv_id not in self._waiting:
            self._waiting[version.kv_id] = []
            self._tasks.spawn(self._place(version, weights))
        self._waiting[version.kv_id].append((version, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise
        finally:
            self._end_lease(version)

    def _new_lease(self, version: Version, slot: int) -> Lease[Version]:
        self._num_leases[id(version)] += 1
        return Lease(version, slot, self._release)

    def _release(self, version: Version) -> None:
        self.slots.release(version.kv_id)
        self._end_lease(version)

    def _end_lease(self, version: Version) -> None:
        self._num_leases[id(version)] -= 1
        if not self._num_leases[id(version)]:
            del self._num_leases[id(version)]
        self._changed.set()

    # ------------------------------------------------------------------------------------------- slots

    async def _place(self, version: Version, weights: Any) -> None:
        """Give it a slot, and a lease of it to everybody who waits by then."""
        kv_id = version.kv_id
        error: LoraplexError | None = None
        try:
            await self._place_in_slot(version, weights)
        except asyncio.CancelledError:
            error = closed()
        except Exception as exc:
            error = as_error(exc, version.source.name)
        for one, future in self._waiting.pop(kv_id):
            if future.done():
                continue
            if error is None:
                future.set_result(self._new_lease(one, self.slots.share(kv_id)))
            else:
                future.set_exception(fresh(error))
                future.exception()  # whoever waited may leave before it hears of it
        if error is None:
            self.slots.release(kv_id)
        self._changed.set()

    async def _place_in_slot(self, version: Version, weights: Any) -> None:
        """Leased once, for the caller to release."""
        kv_id = version.kv_id
        reserved = None
        while reserved is None:
            self._check_fits(version)
            if weights is None and kv_id not in self.slots:
                weights = self.host.get(kv_id)
                if weights is None:
                    weights = await self._read_again(version)
            async with self._reserving:
                if self.slots.lease(kv_id) is not None:
                    return  # it was to leave, and stays
                if weights is not None:
                    reserved = await self._reserve(version)
        slot, evicted = reserved

        def place() -> None:
            for _, other in evicted:
                self._device.clear_slot(other)
            self._device.set_slot(slot, version.source.path, weights)

        try:
            self._tasks.check_open()
            await self._threads.place(place)
        except BaseException:
            self.slots.release(kv_id)
            await self._vacate(kv_id)
            raise

    async def _reserve(self, version: Version) -> tuple[int, list[tuple[str, int]]]:
        try:
            while True:
                self._check_fits(version)  # others may have been pinned meanwhile
                reserved = self.slots.reserve(version.kv_id, version.num_bytes)
                if reserved is not None:
                    return reserved
                await self._next_change()
        finally:
            self.slots.keep_all()

    def _check_fits(self, version: Version) -> None:
        num_bytes, slots = version.num_bytes, self.slots
        if num_bytes > slots.budget_bytes:
            raise AdapterError(
                version.source.path,
                f"needs {num_bytes} bytes on the device, where adapters have {slots.budget_bytes}",
                remedy="raise --adapter-memory",
            )
        if version.kv_id not in slots and not slots.fits(num_bytes):
            raise NotReadyError(
                f"{version.source.name!r} needs {num_bytes} bytes on the device, where pinned adapters leave no room "
                f"for it, of {slots.budget_bytes} bytes for {slots.max_slots} adapters at most",
                remedy="unpin others, or raise --adapter-memory or --max-adapters",
            )

    async def _vacate(self, kv_id: str) -> None:
        """The placer works in order: whoever is given the slot from now on finds it empty."""
        slot = self.slots.drop(kv_id)
        self._changed.set()
        self._tasks.check_open()
        await self._threads.place(self._device.clear_slot, slot)

    async def _read_again(self, version: Version) -> Any:
        """The weights of a version that had to leave host memory, if the files still hold them."""
        self.num_reads += 1
        self._tasks.check_open()
        found, weights = await self._threads.read(self._reader.read, version.source)
        if found.kv_id != version.kv_id:
            raise AdapterError(
                version.source.path,
                f"changed on disk since version {version.id} was loaded from it",
                remedy="load it again, or put the old files back",
            )
        self.host.put(found.kv_id, weights, found.host_bytes)
        return weights

    async def _next_change(self) -> None:
        self._tasks.check_open()
        self._changed.clear()
        await self._changed.wait()
        self._tasks.check_open()

    def check(self) -> None:
        """Assert that nothing is under way, and that every version is held once and none is leased."""
        self.slots.check()
        assert not self._waiting, "a version is being placed"
        assert not self._num_leases, "a version is leased"
        assert not any(self.slots.num_leases(kv_id) for kv_id in self._versions), "a slot is leased"
        assert self.host.num_bytes <= self.host.budget_bytes

    @property
    def num_versions(self) -> int:
        return sum(map(len, self._versions.values()))


def as_error(exc: Exception, name: str) -> LoraplexError:
    if isinstance(exc, LoraplexError):
        return exc
    logger.error("%s cannot be loaded", name, exc_info=exc)
    return EngineError(
        f"{name!r} cannot be loaded: {type(exc).__name__}: {exc}",
        remedy="try again; the server's log has the details",
    )


def fresh(error: LoraplexError) -> LoraplexError:
    """The same error to be kept, or raised again, without the frames that it came through, which hold weights."""
    found = type(error).__new__(type(error), *error.args)
    found.__dict__.update(error.__dict__)
    return found
