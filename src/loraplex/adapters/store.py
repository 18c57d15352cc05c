"""Which adapters there are, which version of each answers, and where its weights are: on disk, in host memory, on the
device. Runs on one event loop; what blocks runs in threads. Knows no tensors: those are the loader's."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Literal

from loraplex.adapters.host import HostTier
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.version import Lease, Loader, Version
from loraplex.bundle import AdapterSource
from loraplex.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigurationError,
    EngineError,
    LoraplexError,
    NotReadyError,
    UnknownClassifierError,
)

logger = logging.getLogger(__name__)

State = Literal["registered", "loading", "ready", "failed", "draining"]


@dataclass(slots=True, eq=False)
class Entry(Generic[Version]):
    """A name. `loaded` answers until another has proved itself; `error` says why the last load of its source, or of
    what was to replace it, failed."""

    name: str
    source: AdapterSource
    loaded: Version | None = None
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
        """What is wrong lies in its files, so that it is not tried again unless somebody loads it."""
        return self.loaded is None and isinstance(self.error, ConfigurationError)

    @property
    def is_wanted(self) -> bool:
        """Else it is a new name whose load failed: it is not known."""
        is_busy = self.num_loading > 0 or self.first_load is not None or self.is_leaving
        return self.is_registered or self.loaded is not None or is_busy

    @property
    def is_asked(self) -> bool:
        """Whether requests find it."""
        return not self.is_leaving and (self.loaded is not None or self.is_registered)

    @property
    def state(self) -> State:
        if self.is_leaving:
            return "draining"
        if self.num_loading:
            return "loading"
        if self.loaded is not None:
            return "ready"
        return "registered" if self.error is None else "failed"


class AdapterStore(Generic[Version]):
    """Names, their versions and these versions' places. Requests lease a version: it stays on the device, and is not
    forgotten, until they give it back. All methods are called on the event loop's thread. After `close` they raise
    NotReadyError."""

    def __init__(
        self,
        loader: Loader[Version],
        slots: SlotTable,
        host: HostTier,
        start_thread: Callable[[], object] = lambda: None,
    ) -> None:
        """start_thread: called first on each of the threads on which the loader reads and places."""
        self._loader, self.slots, self.host = loader, slots, host
        self._entries: dict[str, Entry[Version]] = {}
        # Live versions by kv_id. They are held here, so that an id below is never another version's.
        self._versions: defaultdict[str, list[Version]] = defaultdict(list)
        self._num_leases: Counter[int] = Counter()  # by id of the version, counting those that wait for theirs
        self._waiting: dict[str, list[tuple[Version, asyncio.Future[Lease[Version]]]]] = {}  # by kv_id, while placed
        self._reserving = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()  # a lease, a place or a pin was given up
        self._tasks: set[asyncio.Task[None]] = set()
        self._placer = ThreadPoolExecutor(1, "loraplex-placer", start_thread)
        # Of their own: requests are tokenized in others.
        self._readers = ThreadPoolExecutor(4, "loraplex-reader", start_thread)
        self._is_closed = False
        self.num_loads = 0  # reads from disk so far

    # ------------------------------------------------------------------------------------------- names

    def entries(self) -> tuple[Entry[Version], ...]:
        return tuple(self._entries.values())

    def knows(self, name: str) -> bool:
        """Whether it can be asked: not one that is being unloaded, or loaded for the first time."""
        entry = self._entries.get(name)
        return entry is not None and entry.is_asked

    def entry(self, name: str) -> Entry[Version]:
        self._check_open()
        entry = self._entries.get(name)
        if entry is None or entry.is_leaving:
            raise UnknownClassifierError(name, [one.name for one in self.entries() if not one.is_leaving])
        return entry

    def register(self, source: AdapterSource, error: LoraplexError | None = None) -> None:
        """Know a name without reading it; it is read when it is first asked. `error`: why it cannot be."""
        assert source.name not in self._entries, f"{source.name} is known"
        error = None if error is None else _fresh(error)
        self._entries[source.name] = Entry(source.name, source, error=error, is_registered=True)

    async def load(self, source: AdapterSource, *, pin: bool | None = None, replace: bool = True) -> Entry[Version]:
        """Read, place and prove what `source` holds now, then let it answer instead of what did, which is forgotten
        once its requests are answered. Where anything fails, or the caller leaves, the old version goes on, and the
        error is raised. AdapterExistsError where there is one that must not be replaced."""
        self._check_open()
        entry = self._entries.get(source.name)
        if not replace and entry is not None and not entry.is_leaving:
            raise AdapterExistsError(source.name)
        if entry is None or entry.is_leaving:
            entry = self._entries[source.name] = Entry(source.name, source)
        await self._load(entry, source, pin)
        return entry

    async def unload(self, name: str) -> None:
        """New requests do not find it from now on; returns when those in flight are answered and its memory is free,
        which comes to pass also where the caller leaves."""
        entry = self.entry(name)
        entry.is_leaving = True
        await self._finish(self._spawn(self._drain(entry)))

    async def pin(self, name: str, is_pinned: bool) -> Entry[Version]:
        """A pinned adapter keeps its place on the device."""
        while is_pinned:
            lease = await self.lease(name)
            try:
                entry = self.entry(name)
                if entry.loaded is lease.version:  # else replaced since
                    return self._pin(entry, True)
            finally:
                lease.release()
        return self._pin(self.entry(name), False)

    async def close(self) -> None:
        """Whoever waits for anything here gets NotReadyError. Safe to call twice."""
        self._is_closed = True
        self._changed.set()
        for _, future in (one for waiting in self._waiting.values() for one in waiting):
            if not future.done():
                future.set_exception(_closed())
                future.exception()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._placer.shutdown)
        self._readers.shutdown(wait=False)
        self._entries.clear()

    # ------------------------------------------------------------------------------------------- leases

    def try_lease(self, name: str) -> Lease[Version] | None:
        """The name's version, where it is on the device already."""
        loaded = self.entry(name).loaded
        return None if loaded is None else self._try_lease(loaded)

    def is_awaited(self, version: Version) -> bool:
        """Whether its weights are on their way to the device."""
        return version.kv_id in self._waiting

    async def lease(self, name: str) -> Lease[Version]:
        """The name's version, loaded and placed if need be. However many wait for it, it is loaded once."""
        while True:
            entry = self.entry(name)
            if entry.loaded is not None:
                return await self._lease(entry.loaded)
            if entry.error is not None and entry.is_broken:
                raise _fresh(entry.error)
            if entry.first_load is None:
                entry.first_load = self._spawn(self._load(entry, entry.source, None, is_first=True))
            await self._finish(entry.first_load)

    def _try_lease(self, version: Version) -> Lease[Version] | None:
        """None also while its weights are on their way into the slot, which is its own from the start."""
        slot = None if self.is_awaited(version) else self.slots.lease(version.kv_id)
        return None if slot is None else self._new_lease(version, slot)

    def _new_lease(self, version: Version, slot: int) -> Lease[Version]:
        self._num_leases[id(version)] += 1
        return Lease(version, slot, self._release)

    async def _lease(self, version: Version, weights: Any = None) -> Lease[Version]:
        """weights: where they are at hand."""
        lease = self._try_lease(version)
        if lease is not None:
            return lease
        self._num_leases[id(version)] += 1  # it must not be forgotten while it is waited for
        future: asyncio.Future[Lease[Version]] = asyncio.get_running_loop().create_future()
        if version.kv_id not in self._waiting:
            self._waiting[version.kv_id] = []
            self._spawn(self._place(version, weights))
        self._waiting[version.kv_id].append((version, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise
        finally:
            self._end_lease(version)

    def _release(self, version: Version) -> None:
        self.slots.release(version.kv_id)
        self._end_lease(version)

    def _end_lease(self, version: Version) -> None:
        self._num_leases[id(version)] -= 1
        if not self._num_leases[id(version)]:
            del self._num_leases[id(version)]
        self._changed.set()

    # ------------------------------------------------------------------------------------------- coming and going

    async def _load(
        self, entry: Entry[Version], source: AdapterSource, pin: bool | None, *, is_first: bool = False
    ) -> None:
        """is_first: only where nobody else has loaded it by then, or found that it is broken."""
        entry.num_loading += 1
        try:
            async with entry.lock:
                if entry.is_leaving:
                    raise NotReadyError(f"{entry.name!r} is being unloaded", remedy="load it again when that is done")
                if is_first and (entry.loaded is not None or entry.is_broken):
                    return
                await self._go_live(entry, *await self._read(source), pin)
        except Exception as exc:
            error = _as_error(exc, entry.name)
            if entry.loaded is not None or source.path == entry.source.path:
                entry.error = _fresh(error)
            raise error from None
        finally:
            entry.num_loading -= 1
            if is_first:
                entry.first_load = None
            if not entry.is_wanted and self._entries.get(entry.name) is entry:
                del self._entries[entry.name]

    async def _read(self, source: AdapterSource) -> tuple[Version, Any]:
        self.num_loads += 1
        version, weights = await self._in_reader(source)
        self._check_open()
        self._versions[version.kv_id].append(version)
        self.host.put(version.kv_id, weights, version.host_bytes)
        return version, weights

    async def _go_live(self, entry: Entry[Version], version: Version, weights: Any, pin: bool | None) -> None:
        try:
            lease = await self._lease(version, weights)
            del weights  # host memory holds them, or does not
            try:
                await self._loader.prove(version, lease.slot)
                self._check_open()
                old, entry.loaded, entry.source, entry.error = entry.loaded, version, version.source, None
                self._pin(entry, entry.is_pinned if pin is None else pin)
            finally:
                lease.release()
        except BaseException:
            await self._forget(version)
            raise
        if old is not None:
            self._update_pin(old.kv_id)
            task = self._spawn(self._retire(old))
            entry.retiring.add(task)
            task.add_done_callback(entry.retiring.discard)

    async def _drain(self, entry: Entry[Version]) -> None:
        async with entry.lock:
            loaded, entry.loaded = entry.loaded, None
            try:
                if loaded is not None:
                    self._update_pin(loaded.kv_id)
                    await self._retire(loaded)
                if entry.retiring:
                    await asyncio.wait(entry.retiring)
            finally:
                if self._entries.get(entry.name) is entry:
                    del self._entries[entry.name]

    async def _retire(self, version: Version) -> None:
        while self._num_leases[id(version)]:
            await self._next_change()
        await self._forget(version)

    async def _forget(self, version: Version) -> None:
        """Nobody leases it. Free what it holds, unless another version has the same weights."""
        others = [one for one in self._versions[version.kv_id] if one is not version]
        self._versions[version.kv_id] = others
        if not others:
            del self._versions[version.kv_id]
            await self._finish(self._spawn(self._free(version.kv_id)))

    async def _free(self, kv_id: str) -> None:
        while kv_id in self._waiting:  # it is being placed for nobody, or for a version that came since
            await self._next_change()
        if kv_id in self._versions:
            return
        self.host.drop(kv_id)
        if kv_id in self.slots:
            await self._vacate(kv_id)

    # ------------------------------------------------------------------------------------------- places

    async def _place(self, version: Version, weights: Any) -> None:
        """Give it a slot, and a lease of it to everybody who waits by then."""
        kv_id = version.kv_id
        error: LoraplexError | None = None
        try:
            await self._place_in_slot(version, weights)
        except asyncio.CancelledError:
            error = _closed()
        except Exception as exc:
            error = _as_error(exc, version.source.name)
        for one, future in self._waiting.pop(kv_id):
            if future.done():
                continue
            if error is None:
                future.set_result(self._new_lease(one, self.slots.share(kv_id)))
            else:
                future.set_exception(_fresh(error))
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
                self._loader.clear(other)
            self._loader.place(slot, version, weights)

        try:
            await self._on_placer(place)
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
        await self._on_placer(self._loader.clear, slot)

    async def _read_again(self, version: Version) -> Any:
        """What had to leave host memory, if the files still hold it."""
        self.num_loads += 1
        found, weights = await self._in_reader(version.source)
        if found.kv_id != version.kv_id:
            raise AdapterError(
                version.source.path,
                f"changed on disk since version {version.version} was loaded from it",
                remedy="load it again, or put the old files back",
            )
        self.host.put(found.kv_id, weights, found.host_bytes)
        return weights

    def _pin(self, entry: Entry[Version], is_pinned: bool) -> Entry[Version]:
        entry.is_pinned = is_pinned
        if entry.loaded is not None:
            self._update_pin(entry.loaded.kv_id)
        return entry

    def _update_pin(self, kv_id: str) -> None:
        """Several names may have the same weights: they stay while one of them is pinned."""
        if kv_id in self.slots:
            pinned = (one.loaded for one in self._entries.values() if one.is_pinned)
            self.slots.pin(kv_id, any(one is not None and one.kv_id == kv_id for one in pinned))
            self._changed.set()

    # ------------------------------------------------------------------------------------------- tasks

    async def _in_reader(self, source: AdapterSource) -> tuple[Version, Any]:
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._loader.read, source)

    async def _on_placer(self, work: Callable[..., None], *args: int) -> None:
        """Once begun it is done, in order, also where whoever began it is cancelled."""
        self._check_open()
        done = asyncio.get_running_loop().run_in_executor(self._placer, work, *args)
        done.add_done_callback(lambda _: done.cancelled() or done.exception())  # nobody may be left to hear of it
        await asyncio.shield(done)

    async def _next_change(self) -> None:
        self._check_open()
        self._changed.clear()
        await self._changed.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._is_closed:
            raise _closed()

    async def _finish(self, task: "asyncio.Task[None]") -> None:
        """Wait for it. It goes on where the caller leaves."""
        await asyncio.wait([task])
        if task.cancelled():
            raise _closed()
        task.result()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), LoraplexError):
            logger.error("an adapter's task failed", exc_info=task.exception())


def _closed() -> NotReadyError:
    return NotReadyError("the server is stopping", remedy="send it to another server, or later")


def _as_error(exc: Exception, name: str) -> LoraplexError:
    if isinstance(exc, LoraplexError):
        return exc
    logger.error("%s cannot be loaded", name, exc_info=exc)
    return EngineError(
        f"{name!r} cannot be loaded: {type(exc).__name__}: {exc}",
        remedy="try again; the server's log has the details",
    )


def _fresh(error: LoraplexError) -> LoraplexError:
    """The same error to be kept, or raised again, without the frames that it came through, which hold weights."""
    found = type(error).__new__(type(error), *error.args)
    found.__dict__.update(error.__dict__)
    return found
