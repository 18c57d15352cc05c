"""Moves the weights of adapter versions between disk, host memory and the device's slots. Runs on one event loop;
blocking work runs in threads. Knows no tensors."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from loraplex.adapters.host import HostTier
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.tasks import AdapterThreads, Tasks, closed
from loraplex.bundle import AdapterSource
from loraplex.errors import AdapterError, ConfigurationError, EngineError, LoraplexError, NotReadyError
from loraplex.exhaustion import exhaustion

logger = logging.getLogger(__name__)


class Resident(Protocol):
    """An adapter version, as far as Residence knows it."""

    @property
    def source(self) -> AdapterSource: ...

    @property
    def id(self) -> str:
        """Identity of the version, as answers show it."""
        ...

    @property
    def kv_id(self) -> str:
        """Identity of the weights. Versions that differ only in their contract share host memory and slot."""
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
        """Read a version and its weights from disk. Called from several threads. Raises LoraplexError on failure."""
        ...


class Device(Protocol):
    """Puts weights into slots. Called on one thread, in order."""

    def set_slot(self, slot: int, folder: Path, weights: Any) -> None: ...

    def clear_slot(self, slot: int) -> None: ...


class Lease(Generic[Version]):
    """Keeps a version in its slot until `release`. A second `release` does nothing."""

    def __init__(self, version: Version, slot: int, release: Callable[[Version], None]) -> None:
        self.version, self.slot, self._release = version, slot, release
        self._is_open = True

    def release(self) -> None:
        if self._is_open:
            self._is_open = False
            self._release(self.version)


class Residence(Generic[Version]):
    """Versions by their weights, and leases. A leased version stays in its slot and is not forgotten.

    All methods are called on the event loop's thread. After `close`, those that read or place raise NotReadyError."""

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
        # Versions by kv_id. Holding them here keeps the ids in `_num_leases` unique.
        self._versions: defaultdict[str, list[Version]] = defaultdict(list)
        self._num_leases: Counter[int] = Counter()  # by id() of the version; counts waiting callers, too
        # Callers that wait for a placement, by kv_id.
        self._waiting: dict[str, list[tuple[Version, asyncio.Future[Lease[Version]]]]] = {}
        self._reserving = asyncio.Lock()  # reservations are first come, first served
        self._changed = asyncio.Event()  # set when a lease, a slot or a pin changes
        self.num_reads = 0  # reads from disk since the start

    async def close(self) -> None:
        """Stop all work. Callers that wait for a lease get NotReadyError. Safe to call twice."""
        self._changed.set()
        for _, future in (one for waiting in self._waiting.values() for one in waiting):
            if not future.done():
                future.set_exception(closed())
                future.exception()
        await self._tasks.close()
        self._waiting.clear()  # of placements that were cancelled before they began
        await self._threads.close()

    # ------------------------------------------------------------------------------------------- versions

    async def read(self, source: AdapterSource) -> tuple[Version, Any]:
        """Read a version and its weights from disk. Host memory caches the weights."""
        self.num_reads += 1
        self._tasks.check_open()
        version, weights = await self._threads.read(self._reader.read, source)
        self.add(version, weights)
        return version, weights

    def add(self, version: Version, weights: Any) -> None:
        """Add a version that was read. Host memory caches its weights."""
        self._tasks.check_open()
        self._versions[version.kv_id].append(version)
        self.host.put(version.kv_id, weights, version.host_bytes)

    async def retire(self, version: Version) -> None:
        """Wait until the version has no lease, then forget it."""
        while self._num_leases[id(version)]:
            await self._next_change()
        await self.forget(version)

    async def forget(self, version: Version) -> None:
        """Free the memory and slot of a version without leases, unless another version has the same weights."""
        others = [one for one in self._versions[version.kv_id] if one is not version]
        self._versions[version.kv_id] = others
        if not others:
            del self._versions[version.kv_id]
            await self._tasks.finish(self._tasks.spawn(self._free(version.kv_id)))

    def pin(self, kv_id: str, is_pinned: bool) -> None:
        """Pin or unpin the slot of these weights. Does nothing where they have no slot."""
        if kv_id in self.slots:
            self.slots.pin(kv_id, is_pinned)
            self._changed.set()

    async def _free(self, kv_id: str) -> None:
        while kv_id in self._waiting:  # these weights are being placed, perhaps for a newer version
            await self._next_change()
        if kv_id in self._versions:
            return
        self.host.drop(kv_id)
        if kv_id in self.slots:
            await self._vacate(kv_id)

    # ------------------------------------------------------------------------------------------- leases

    def is_awaited(self, version: Version) -> bool:
        """Return whether the version's weights are being placed on the device now."""
        return version.kv_id in self._waiting

    def try_lease(self, version: Version) -> Lease[Version] | None:
        """Return a lease where the version is in its slot, else None. None also while the weights are being placed."""
        slot = None if self.is_awaited(version) else self.slots.lease(version.kv_id)
        return None if slot is None else self._new_lease(version, slot)

    async def lease(self, version: Version, weights: Any = None) -> Lease[Version]:
        """Return a lease of the version, after placing it where needed. Concurrent callers share one placement.

        weights:  saves a read, where the caller has them."""
        lease = self.try_lease(version)
        if lease is not None:
            return lease
        self._tasks.check_open()
        self._num_leases[id(version)] += 1  # a version that callers wait for must not be forgotten
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
        """Place the version, then give a lease to every caller that waits by then."""
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
                future.exception()  # marks it as retrieved: the caller may have left
        if error is None:
            self.slots.release(kv_id)
        self._changed.set()

    async def _place_in_slot(self, version: Version, weights: Any) -> None:
        """Place the version and lease its slot once. The caller releases that lease."""
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
                    return  # the version was about to be evicted, and keeps its slot
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
                f"needs {num_bytes} bytes on the device, and all adapters together may use {slots.budget_bytes}",
                remedy="raise --adapter-memory",
            )
        if version.kv_id not in slots and not slots.fits(num_bytes):
            raise NotReadyError(
                f"{version.source.name!r} needs {num_bytes} bytes on the device, but pinned adapters leave too little "
                f"room (the limits are {slots.budget_bytes} bytes and {slots.max_slots} adapters)",
                remedy="unpin others, or raise --adapter-memory or --max-adapters",
            )

    async def _vacate(self, kv_id: str) -> None:
        """Take the slot from these weights and clear it. The placer works in order: the next owner finds it empty."""
        slot = self.slots.drop(kv_id)
        self._changed.set()
        self._tasks.check_open()
        await self._threads.place(self._device.clear_slot, slot)

    async def _read_again(self, version: Version) -> Any:
        """Read weights that host memory has evicted. Raises AdapterError where the files have changed since."""
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


def as_error(exc: Exception, name: str) -> LoraplexError:
    """Return the error for the adapter of that name."""
    if isinstance(exc, ConfigurationError):
        exc.adapter = name
    if isinstance(exc, LoraplexError):
        return exc
    logger.error("%s cannot be loaded", name, exc_info=exc)
    return exhaustion(exc) or EngineError(
        f"{name!r} cannot be loaded: {type(exc).__name__}: {exc}",
        remedy="try again; the server's log has the details",
    )


def fresh(error: LoraplexError) -> LoraplexError:
    """Return a copy of the error without its traceback, whose frames hold weights. Keep or raise the copy."""
    found = type(error).__new__(type(error), *error.args)
    found.__dict__.update(error.__dict__)
    return found
