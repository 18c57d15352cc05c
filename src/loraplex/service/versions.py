"""Decides which version answers for a name. Loads, proves, replaces and unloads versions while requests lease them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic

from loraplex.adapters.names import Entry, Names
from loraplex.adapters.residence import Lease, Residence, Version, as_error, fresh
from loraplex.adapters.tasks import Tasks
from loraplex.bundle import AdapterSource
from loraplex.errors import AdapterExistsError, LoraplexError, NotReadyError

Prove = Callable[[Version, int], Awaitable[None]]


class Versions(Generic[Version]):
    """The names and their versions. All methods are called on the event loop's thread. After `close` they raise
    NotReadyError."""

    def __init__(self, residence: Residence[Version], prove: Prove[Version], tasks: Tasks) -> None:
        """prove: checks a version in a slot; raises LoraplexError where the version must not go live."""
        self.residence, self.names = residence, Names[Version]()
        self._prove, self._tasks = prove, tasks

    def entry(self, name: str) -> Entry[Version]:
        """Return the entry of a name. Raises UnknownClassifierError where there is none, or it is being unloaded."""
        self._tasks.check_open()
        return self.names.entry(name)

    def register(self, source: AdapterSource, error: LoraplexError | None = None) -> None:
        """Add a name without reading its adapter, which is read on first use. error: why the adapter cannot be read."""
        error = None if error is None else fresh(as_error(error, source.name))
        self.names.add(Entry(source.name, source, error=error, is_registered=True))

    async def load(
        self,
        source: AdapterSource,
        *,
        pin: bool | None = None,
        replace: bool = True,
        read: tuple[Version, Any] | None = None,
    ) -> Entry[Version]:
        """Read, place and prove the version that `source` holds now, then let it answer for the name.

        The old version is forgotten once its requests are answered. If anything fails or the caller is cancelled, the
        old version goes on, and the error is raised. Raises AdapterExistsError where the name is taken and `replace` is
        False.

        read:  the version and its weights, if they were read already.
        """
        self._tasks.check_open()
        entry = self.names.get(source.name)
        if entry is None:
            entry = self.names.add(Entry(source.name, source))
        elif not replace:
            raise AdapterExistsError(source.name)
        await self._load(entry, source, pin, read=read)
        return entry

    def unload(self, name: str) -> Coroutine[Any, Any, None]:
        """Unload a name: new requests do not find it from this call on.

        The coroutine ends when the requests in flight are answered and the memory is free. The work goes on even if the
        caller is cancelled. Raises UnknownClassifierError as `entry` does.
        """
        entry = self.entry(name)
        entry.is_leaving = True
        return self._tasks.finish(self._tasks.spawn(self._drain(entry)))

    async def pin(self, name: str, is_pinned: bool) -> Entry[Version]:
        """Pin or unpin a name. A pinned version keeps its slot; it is placed first if needed."""
        while is_pinned:
            lease = await self.lease(name)
            try:
                entry = self.entry(name)
                if entry.live is lease.version:  # else it was replaced meanwhile
                    return self._pin(entry, True)
            finally:
                lease.release()
        return self._pin(self.entry(name), False)

    def try_lease(self, name: str) -> Lease[Version] | None:
        """Lease the name's version if it is on the device; otherwise return None."""
        live = self.entry(name).live
        return None if live is None else self.residence.try_lease(live)

    async def lease(self, name: str) -> Lease[Version]:
        """Lease the name's version, loading and placing it first if needed. It is loaded once, however many wait."""
        while True:
            entry = self.entry(name)
            if entry.live is not None:
                return await self.residence.lease(entry.live)
            if entry.error is not None and entry.is_broken:
                raise fresh(entry.error)
            if entry.first_load is None:
                entry.first_load = self._tasks.spawn(self._load(entry, entry.source, None, is_first=True))
            await self._tasks.finish(entry.first_load)

    async def close(self) -> None:
        """Stop all work. Every call that waits raises NotReadyError. Safe to call twice."""
        self._tasks.is_closed = True
        await self.residence.close()
        self.names.clear()

    async def _load(
        self,
        entry: Entry[Version],
        source: AdapterSource,
        pin: bool | None,
        *,
        is_first: bool = False,
        read: tuple[Version, Any] | None = None,
    ) -> None:
        """Load a version for an entry, one load at a time. is_first: do nothing where the name was loaded or found
        broken meanwhile."""
        entry.num_loading += 1
        try:
            async with entry.lock:
                if entry.is_leaving:
                    raise NotReadyError(f"{entry.name!r} is being unloaded", remedy="load it again when that is done")
                if is_first and (entry.live is not None or entry.is_broken):
                    return
                if read is not None:
                    self.residence.add(*read)
                await self._go_live(entry, *(read or await self.residence.read(source)), pin)
        except Exception as exc:
            error = as_error(exc, entry.name)
            if entry.live is not None or source.path == entry.source.path:
                entry.error = fresh(error)
            raise error from None
        finally:
            entry.num_loading -= 1
            if is_first:
                entry.first_load = None
            if not entry.is_wanted:
                self.names.discard(entry)

    async def _go_live(self, entry: Entry[Version], version: Version, weights: Any, pin: bool | None) -> None:
        try:
            lease = await self.residence.lease(version, weights)
            del weights  # host memory decides whether to keep them
            try:
                await self._prove(version, lease.slot)
                self._tasks.check_open()
                old, entry.live, entry.source, entry.error = entry.live, version, version.source, None
                self._pin(entry, entry.is_pinned if pin is None else pin)
            finally:
                lease.release()
        except BaseException:
            await self.residence.forget(version)
            raise
        if old is not None:
            self._update_pin(old)
            task = self._tasks.spawn(self.residence.retire(old))
            entry.retiring.add(task)
            task.add_done_callback(entry.retiring.discard)

    async def _drain(self, entry: Entry[Version]) -> None:
        async with entry.lock:
            live, entry.live = entry.live, None
            try:
                if live is not None:
                    self._update_pin(live)
                    await self.residence.retire(live)
                if entry.retiring:
                    await asyncio.wait(entry.retiring)
            finally:
                self.names.discard(entry)

    def _pin(self, entry: Entry[Version], is_pinned: bool) -> Entry[Version]:
        entry.is_pinned = is_pinned
        if entry.live is not None:
            self._update_pin(entry.live)
        return entry

    def _update_pin(self, version: Version) -> None:
        self.residence.pin(version.kv_id, self.names.is_pinned(version.kv_id))
