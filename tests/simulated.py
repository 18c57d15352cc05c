"""A simulated disk and device for adapter versions, and clients that ask them."""

import asyncio
import gc
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.host import HostTier
from loraplex.adapters.residence import Lease, Residence
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.tasks import AdapterThreads, Tasks
from loraplex.bundle import AdapterSource
from loraplex.errors import AdapterError, LoraplexError
from loraplex.service.versions import Versions
from sound import check_residence, is_pinned


def broken() -> LoraplexError:
    return AdapterError("there", "is broken", remedy="correct it")


def out_of_memory() -> Exception:
    return MemoryError("out of memory")


@dataclass(frozen=True)
class Files:
    """The contents of a simulated folder."""

    weights: str
    contract: str = ""
    num_bytes: int = 10
    error: Callable[[], Exception] | None = None


@dataclass(frozen=True)
class Version:
    """Equal to others of the same content, as the service's are."""

    source: AdapterSource
    id: str
    kv_id: str
    num_bytes: int

    @property
    def host_bytes(self) -> int:
        return self.num_bytes


class Weights:
    """A tensor."""

    def __init__(self, kv_id: str) -> None:
        self.kv_id = kv_id


def source(name: str) -> AdapterSource:
    return AdapterSource(name=name, path=Path(name), contract=None)


def bad(error: Callable[[], Exception] = broken) -> Files:
    return Files("bad", error=error)


class Simulated:
    """A disk of folders and a device of slots, which holds that a slot is empty when it is set, that nobody leases it
    when it is cleared, and that what is leased is what was asked."""

    def __init__(
        self,
        *,
        max_slots: int = 3,
        budget: int = 1000,
        host: int = 1000,
        seed: int | None = None,
        in_turns: bool = False,
    ) -> None:
        """seed: of how long everything takes. in_turns: without threads, so that the seed says all."""
        self.disk: dict[str, Files] = {}
        self.slots: dict[int, str] = {}
        self.leased: list[Lease[Version]] = []
        self.clears: list[int] = []
        self.num_reads = 0
        self.read_gate, self.place_gate, self.prove_gate = threading.Event(), threading.Event(), asyncio.Event()
        self.read_gate.set()
        self.place_gate.set()
        self.prove_gate.set()
        self.place_error: Callable[[], Exception] | None = None
        self.prove_errors: dict[str, Exception] = {}  # by version
        self.faults: list[str] = []  # what came up in other threads
        self.weights: weakref.WeakSet[Weights] = weakref.WeakSet()
        self.random = None if seed is None else random.Random(seed)
        self.tasks = Tasks()
        threads = InTurns(self) if in_turns else AdapterThreads()
        slots = SlotTable(budget_bytes=budget, max_slots=max_slots)
        self.residence: Residence[Version] = Residence(self, self, slots, HostTier(host), threads, self.tasks)
        self.versions = Versions(self.residence, self.prove, self.tasks)
        self.names = self.versions.names

    def write(self, name: str, files: Files | str) -> AdapterSource:
        self.disk[name] = Files(files) if isinstance(files, str) else files
        return source(name)

    # ------------------------------------------------------------------------------------------- reader and device

    def read(self, source: AdapterSource) -> tuple[Version, Weights]:
        assert self.read_gate.wait(5)
        self.num_reads += 1
        files = self.disk.get(str(source.path))
        if files is None:
            raise AdapterError(source.path, "no such folder", remedy="make it")
        weights = Weights(files.weights)
        self.weights.add(weights)
        if files.error is not None:
            raise files.error()
        return Version(source, f"{files.weights}/{files.contract}", files.weights, files.num_bytes), weights

    def set_slot(self, slot: int, folder: Path, weights: Weights) -> None:
        assert self.place_gate.wait(5)
        self._expect(slot not in self.slots, f"{weights.kv_id} placed where {self.slots.get(slot)} is")
        self._expect(weights.kv_id not in self.slots.values(), f"{weights.kv_id} is placed twice")
        self.slots[slot] = weights.kv_id
        if self.place_error is not None:
            raise self.place_error()

    def clear_slot(self, slot: int) -> None:
        self._expect(all(lease.slot != slot for lease in self.leased), f"slot {slot} is leased")
        self.clears.append(slot)
        self.slots.pop(slot, None)

    async def prove(self, version: Version, slot: int) -> None:
        self._expect(self.slots.get(slot) == version.kv_id, f"{version.id} is not there to prove itself")
        await self.turns()
        await self.prove_gate.wait()
        self._expect(self.slots.get(slot) == version.kv_id, f"{version.id} is gone while it proves itself")
        if version.id in self.prove_errors:
            raise self.prove_errors[version.id]

    def _expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    async def turns(self) -> None:
        for _ in range(self.random.randrange(5) if self.random is not None else 0):
            await asyncio.sleep(0)

    # ------------------------------------------------------------------------------------------- the requests

    def state(self, name: str) -> str:
        return self.versions.entry(name).state

    async def lease(self, name: str) -> Lease[Version]:
        return self.took(self.versions.try_lease(name) or await self.versions.lease(name))

    def took(self, lease: Lease[Version]) -> Lease[Version]:
        self._expect(self.slots.get(lease.slot) == lease.version.kv_id, f"{lease.version.id} is not in its slot")
        self.leased.append(lease)
        return lease

    def give_back(self, lease: Lease[Version]) -> None:
        self._expect(self.slots.get(lease.slot) == lease.version.kv_id, f"{lease.version.id} lost its slot")
        self.leased.remove(lease)
        lease.release()

    async def ask(self, name: str, num_turns: int = 0) -> str:
        """The version that answered."""
        lease = await self.lease(name)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        self.give_back(lease)
        return lease.version.id

    async def quiet(self) -> None:
        """Nothing runs any more, and nothing is lost."""
        assert not self.leased
        await settle(lambda: not self.tasks._tasks)
        await collect_exceptions()
        residence, entries = self.residence, self.names.entries()
        assert not self.faults
        check_residence(residence)
        live = {entry.live.kv_id: entry.live for entry in entries if entry.live is not None}
        assert len(residence.slots) == len(self.slots)
        assert all(kv_id in residence.slots for kv_id in self.slots.values())
        assert set(self.slots.values()) <= set(live)
        assert residence.slots.num_bytes == sum(live[kv_id].num_bytes for kv_id in self.slots.values())
        held = [kv_id for kv_id in live if kv_id in residence.host._held]
        assert residence.host.num_bytes == sum(live[kv_id].num_bytes for kv_id in held)
        assert sum(map(len, residence._versions.values())) == sum(entry.live is not None for entry in entries)
        pinned = {entry.live.kv_id for entry in entries if entry.is_pinned and entry.live is not None}
        assert pinned == {kv_id for kv_id in self.slots.values() if is_pinned(residence.slots, kv_id)}
        assert not any(occupant.is_leaving for occupant in residence.slots._occupants.values())
        assert not any(entry.state in ("loading", "draining") for entry in entries)


class InTurns(AdapterThreads):
    """Threads, as turns of the loop: what runs in one is done at once some turns later."""

    def __init__(self, sim: Simulated) -> None:
        self._sim, self._placer_turn = sim, asyncio.Lock()

    async def read(self, work: Callable[..., Any], *args: object) -> Any:
        await self._sim.turns()
        return work(*args)

    async def place(self, work: Callable[..., None], *args: int) -> None:
        async def in_order() -> None:
            async with self._placer_turn:
                await self._sim.turns()
                work(*args)

        await asyncio.shield(asyncio.ensure_future(in_order()))

    async def close(self) -> None:
        """There is nothing to end."""


async def collect_exceptions() -> None:
    """Exceptions that nobody retrieved reach the loop's handler now, and anyio fails the test."""
    gc.collect(1)
    await asyncio.sleep(0)


async def settle(until: Callable[[], object]) -> None:
    for _ in range(5000):
        if until():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it does not happen")


async def a_while() -> None:
    """Long enough for what may happen to happen."""
    for _ in range(20):
        await asyncio.sleep(0.0005)


async def cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
