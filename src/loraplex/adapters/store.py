"""Which adapters there are, which version of each answers, and where its weights are: on disk, in host memory, on the
device. Runs on one event loop; what blocks runs in threads. Knows no tensors: those are the loader's."""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from loraplex.adapters.slots import SlotTable
from loraplex.bundle import AdapterSource
from loraplex.errors import AdapterError, LoraplexError, NotReadyError, UnknownClassifierError

logger = logging.getLogger(__name__)

State = Literal["registered", "loading", "ready", "failed", "draining"]


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
    def num_bytes(self) -> int: ...


Version = TypeVar("Version", bound=Loaded)


class Loader(Protocol[Version]):
    """Does the work. `read` may run in several threads at once; `place` and `clear` run in one, in order."""

    def read(self, source: AdapterSource) -> tuple[Version, Any]:
        """A version and its weights, from disk. LoraplexError says what is wrong with it."""
        ...

    def place(self, slot: int, weights: Any) -> None: ...

    def clear(self, slot: int) -> None: ...

    async def prove(self, version: Version, slot: int) -> None:
        """LoraplexError where it must not go live."""
        ...


@dataclass(slots=True, eq=False)
class Entry(Generic[Version]):
    """A name. `loaded` answers until another has proved itself; `error` says why the last load failed."""

    name: str
    source: AdapterSource
    loaded: Version | None = None
    error: LoraplexError | None = None
    is_pinned: bool = False
    is_loading: bool = False
    is_leaving: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one load or unload at a time
    first_load: "asyncio.Task[None] | None" = None

    @property
    def state(self) -> State:
        if self.is_leaving:
            return "draining"
        if self.is_loading:
            return "loading"
        if self.loaded is not None:
            return "ready"
        return "registered" if self.error is None else "failed"


class Lease(Generic[Version]):
    """A version in its slot, until `release`, which may be called twice."""

    def __init__(self, version: Version, slot: int, release: Callable[[Version], None]) -> None:
        self.version, self.slot, self._release = version, slot, release
        self._is_open = True

    def release(self) -> None:
        if self._is_open:
            self._is_open = False
            self._release(self.version)


class HostTier:
    """Weights by their identity in host memory, up to a budget, least recently used first out."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.num_bytes = budget_bytes, 0
        self._held: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def get(self, key: str) -> Any | None:
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: str, weights: Any, num_bytes: int) -> None:
        """What is larger than the budget is not held."""
        self.drop(key)
        self._held[key] = (weights, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.budget_bytes:
            self.drop(next(iter(self._held)))

    def drop(self, key: str) -> None:
        _, num_bytes = self._held.pop(key, (None, 0))
        self.num_bytes -= num_bytes


class AdapterStore(Generic[Version]):
    """Names, their versions and these versions' places. Requests lease a version: it stays on the device, and is not
    forgotten, until they give it back. All methods are called on the event loop's thread."""

    def __init__(self, loader: Loader[Version], slots: SlotTable, host: HostTier) -> None:
        self._loader, self.slots, self.host = loader, slots, host
        self._entries: dict[str, Entry[Version]] = {}
        self._users: Counter[str] = Counter()  # live versions by kv_id
        self._num_leases: Counter[int] = Counter()  # by id of the version
        self._waiting: dict[str, list[asyncio.Future[Lease[Version]]]] = {}  # by kv_id, while it is being placed
        self._reserving = asyncio.Lock()  # first come, first served
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._placer = ThreadPoolExecutor(1, "loraplex-placer")
        self.num_loads = 0  # reads from disk so far

    # ------------------------------------------------------------------------------------------- names

    def entries(self) -> tuple[Entry[Version], ...]:
        return tuple(self._entries.values())

    def entry(self, name: str) -> Entry[Version]:
        entry = self._entries.get(name)
        if entry is None or entry.is_leaving:
            raise UnknownClassifierError(name, [one.name for one in self.entries() if not one.is_leaving])
        return entry

    def register(self, source: AdapterSource, error: LoraplexError | None = None) -> None:
        """Know a name without reading it; it is read when it is first asked. `error`: why it cannot be."""
        self._entries[source.name] = Entry(source.name, source, error=error)

    async def load(self, source: AdapterSource, *, pin: bool | None = None) -> Entry[Version]:
        """Read, place and prove what `source` holds now, then let it answer instead of what did, which is forgotten
        once its requests are answered. Where anything fails the old version goes on, and the error is raised."""
        entry = self._entries.get(source.name)
        is_new = entry is None or entry.is_leaving
        if entry is None or entry.is_leaving:
            entry = self._entries[source.name] = Entry(source.name, source)
        try:
            await self._load(entry, source, pin)
        except BaseException:
            if is_new and entry.loaded is None and self._entries.get(entry.name) is entry:
                del self._entries[entry.name]
            raise
        return entry

    async def unload(self, name: str) -> None:
        """New requests do not find it from now on; returns when those in flight are answered and its memory is free."""
        entry = self.entry(name)
        entry.is_leaving = True
        async with entry.lock:
            loaded, entry.loaded = entry.loaded, None
            if loaded is not None:
                while self._num_leases[id(loaded)]:
                    await self._next_change()
                await self._forget(loaded)
            if self._entries.get(name) is entry:
                del self._entries[name]

    async def pin(self, name: str, is_pinned: bool) -> Entry[Version]:
        """A pinned adapter keeps its place on the device."""
        entry = self.entry(name)
        if is_pinned:
            lease = await self.lease(name)
            try:
                self._pin(lease.version, True)
            finally:
                lease.release()
        elif entry.loaded is not None and entry.loaded.kv_id in self.slots:
            self._pin(entry.loaded, False)
        entry.is_pinned = is_pinned
        return entry

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._placer.shutdown)
        self._entries.clear()

    # ------------------------------------------------------------------------------------------- leases

    def try_lease(self, name: str) -> Lease[Version] | None:
        """The name's version, where it is on the device already."""
        loaded = self.entry(name).loaded
        return None if loaded is None else self._try_lease(loaded)

    async def lease(self, name: str) -> Lease[Version]:
        """The name's version, loaded and placed if need be. However many wait for it, it is loaded once."""
        entry = self.entry(name)
        if entry.loaded is None:
            await self._first_load(entry)
        if entry.loaded is None:  # unloaded meanwhile
            return await self.lease(name)
        return await self._lease(entry.loaded)

    def _try_lease(self, version: Version) -> Lease[Version] | None:
        slot = self.slots.lease(version.kv_id)
        if slot is None:
            return None
        self._num_leases[id(version)] += 1
        return Lease(version, slot, self._release)

    async def _lease(self, version: Version) -> Lease[Version]:
        lease = self._try_lease(version)
        if lease is not None:
            return lease
        self._num_leases[id(version)] += 1  # it must not be forgotten while it is waited for
        try:
            future: asyncio.Future[Lease[Version]] = asyncio.get_running_loop().create_future()
            waiting = self._waiting.get(version.kv_id)
            if waiting is None:
                waiting = self._waiting[version.kv_id] = []
                self._spawn(self._place(version))
            waiting.append(future)
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

    # ------------------------------------------------------------------------------------------- loading

    async def _first_load(self, entry: Entry[Version]) -> None:
        if entry.error is not None:
            raise entry.error
        if entry.first_load is None:
            entry.first_load = self._spawn(self._load(entry, entry.source, None))
        await asyncio.shield(entry.first_load)

    async def _load(self, entry: Entry[Version], source: AdapterSource, pin: bool | None) -> None:
        async with entry.lock:
            if entry.is_leaving:
                raise NotReadyError(f"{entry.name!r} is being unloaded", remedy="load it again when that is done")
            entry.is_loading = True
            try:
                version = await self._read(source)
                await self._go_live(entry, version, source, pin)
            except LoraplexError as exc:
                entry.error = exc
                raise
            finally:
                entry.is_loading = False

    async def _read(self, source: AdapterSource) -> Version:
        self.num_loads += 1
        version, weights = await asyncio.to_thread(self._loader.read, source)
        self._users[version.kv_id] += 1
        self.host.put(version.kv_id, weights, version.num_bytes)
        return version

    async def _go_live(self, entry: Entry[Version], version: Version, source: AdapterSource, pin: bool | None) -> None:
        try:
            lease = await self._lease(version)
            try:
                await self._loader.prove(version, lease.slot)
                old, entry.loaded, entry.source, entry.error = entry.loaded, version, source, None
                entry.is_pinned = entry.is_pinned if pin is None else pin
                self._pin(version, entry.is_pinned)
            finally:
                lease.release()
        except BaseException:
            await self._forget(version)
            raise
        if old is not None:
            self._spawn(self._retire(old))

    async def _retire(self, version: Version) -> None:
        while self._num_leases[id(version)]:
            await self._next_change()
        await self._forget(version)

    async def _forget(self, version: Version) -> None:
        """Nobody leases it. Free what it holds, unless another version has the same weights."""
        kv_id = version.kv_id
        self._users[kv_id] -= 1
        if self._users[kv_id]:
            return
        del self._users[kv_id]
        self.host.drop(kv_id)
        while kv_id in self._waiting:  # it is being placed for nobody
            await self._next_change()
        if kv_id in self.slots and not self._users[kv_id]:
            slot = self.slots.drop(kv_id)
            await asyncio.get_running_loop().run_in_executor(self._placer, self._loader.clear, slot)
            self._changed.set()

    async def _place(self, version: Version) -> None:
        """Give it a slot, and a lease of it to everybody who waits by then."""
        kv_id = version.kv_id
        error: BaseException | None = None
        is_placed = False
        try:
            is_placed = await self._place_in_slot(version)
        except BaseException as exc:
            error = exc
        for future in self._waiting.pop(kv_id):
            if future.done():
                continue
            lease = self._try_lease(version) if is_placed else None
            if lease is not None:
                future.set_result(lease)
            else:
                future.set_exception(error or NotReadyError("the adapter lost its place", remedy="send it again"))
                future.exception()  # somebody may have left; the others raise it
        if is_placed:
            self.slots.release(kv_id)
        self._changed.set()

    async def _place_in_slot(self, version: Version) -> bool:
        kv_id, num_bytes = version.kv_id, version.num_bytes
        if not self.slots.fits(num_bytes):
            raise AdapterError(
                version.source.path,
                f"needs {num_bytes} bytes on the device, of {self.slots.budget_bytes} for {self.slots.max_slots} "
                "adapters at most, less those that are pinned",
                remedy="unpin others, or raise --adapter-memory or --max-adapters",
            )
        weights = self.host.get(kv_id)
        if weights is None:
            weights = await self._read_again(version)
        async with self._reserving:
            while True:
                if kv_id in self.slots:  # it was to leave, and nobody took its place yet
                    if self.slots.lease(kv_id) is not None:
                        return True
                    reserved = None
                else:
                    reserved = self.slots.reserve(kv_id, num_bytes)
                if reserved is not None:
                    break
                await self._next_change()
        slot, evicted = reserved

        def place() -> None:
            for _, other in evicted:
                self._loader.clear(other)
            self._loader.place(slot, weights)

        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._placer, place)
        except BaseException:
            await loop.run_in_executor(self._placer, self._loader.clear, slot)
            self.slots.release(kv_id)
            self.slots.drop(kv_id)
            raise
        return True

    async def _read_again(self, version: Version) -> Any:
        """What had to leave host memory, if the files still hold it."""
        self.num_loads += 1
        found, weights = await asyncio.to_thread(self._loader.read, version.source)
        if found.kv_id != version.kv_id:
            raise AdapterError(
                version.source.path,
                f"changed on disk since version {version.version} was loaded from it",
                remedy="load it again, or put the old files back",
            )
        self.host.put(found.kv_id, weights, found.num_bytes)
        return weights

    def _pin(self, version: Version, is_pinned: bool) -> None:
        """Two names may have the same weights: they stay while one of them is pinned."""
        others = (one for one in self.entries() if one.is_pinned and one.loaded is not version)
        shared = any(one.loaded is not None and one.loaded.kv_id == version.kv_id for one in others)
        self.slots.pin(version.kv_id, is_pinned or shared)

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), LoraplexError):
            logger.error("an adapter's task failed", exc_info=task.exception())
