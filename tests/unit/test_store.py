"""Adapters that come, change and go while they are asked, against a simulated disk and device."""

import asyncio
import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.host import HostTier
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.version import Lease
from loraplex.bundle import AdapterSource
from loraplex.errors import (
    AdapterError,
    ContractError,
    EngineError,
    LoraplexError,
    NotReadyError,
    QueueFullError,
    UnknownClassifierError,
)


def broken() -> LoraplexError:
    return AdapterError("there", "is broken", remedy="mend it")


def out_of_memory() -> Exception:
    return MemoryError("out of memory")


@dataclass(frozen=True)
class Files:
    """What a folder holds."""

    weights: str
    contract: str = ""
    num_bytes: int = 10
    error: Callable[[], Exception] | None = None


@dataclass(frozen=True)
class Version:
    """Equal to others of the same content, as the backend's are."""

    source: AdapterSource
    version: str
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

    def __init__(self, *, max_slots: int = 3, budget: int = 1000, host: int = 1000, seed: int | None = None) -> None:
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
        self.store: AdapterStore[Version] = AdapterStore(
            self, SlotTable(budget_bytes=budget, max_slots=max_slots), HostTier(host)
        )

    def write(self, name: str, files: Files | str) -> AdapterSource:
        self.disk[name] = Files(files) if isinstance(files, str) else files
        return source(name)

    # ------------------------------------------------------------------------------------------- the loader

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

    def place(self, slot: int, version: Version, weights: Weights) -> None:
        assert self.place_gate.wait(5)
        self._expect(slot not in self.slots, f"{weights.kv_id} placed where {self.slots.get(slot)} is")
        self._expect(weights.kv_id not in self.slots.values(), f"{weights.kv_id} is placed twice")
        self.slots[slot] = weights.kv_id
        if self.place_error is not None:
            raise self.place_error()

    def clear(self, slot: int) -> None:
        self._expect(all(lease.slot != slot for lease in self.leased), f"slot {slot} is leased")
        self.clears.append(slot)
        self.slots.pop(slot, None)

    async def prove(self, version: Version, slot: int) -> None:
        self._expect(self.slots.get(slot) == version.kv_id, f"{version.version} is not there to prove itself")
        await self.turns()
        await self.prove_gate.wait()
        self._expect(self.slots.get(slot) == version.kv_id, f"{version.version} is gone while it proves itself")
        if version.version in self.prove_errors:
            raise self.prove_errors[version.version]

    def _expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    async def turns(self) -> None:
        for _ in range(self.random.randrange(5) if self.random is not None else 0):
            await asyncio.sleep(0)

    # ------------------------------------------------------------------------------------------- the requests

    def state(self, name: str) -> str:
        return self.store.entry(name).state

    async def lease(self, name: str) -> Lease[Version]:
        return self.took(self.store.try_lease(name) or await self.store.lease(name))

    def took(self, lease: Lease[Version]) -> Lease[Version]:
        self._expect(self.slots.get(lease.slot) == lease.version.kv_id, f"{lease.version.version} is not in its slot")
        self.leased.append(lease)
        return lease

    def give_back(self, lease: Lease[Version]) -> None:
        self._expect(self.slots.get(lease.slot) == lease.version.kv_id, f"{lease.version.version} lost its slot")
        self.leased.remove(lease)
        lease.release()

    async def ask(self, name: str, num_turns: int = 0) -> str:
        """The version that answered."""
        lease = await self.lease(name)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        self.give_back(lease)
        return lease.version.version

    async def quiet(self) -> None:
        """Nothing runs any more, and nothing is lost."""
        assert not self.leased
        for _ in range(2000):
            if not self.store._tasks:
                break
            await asyncio.sleep(0.001)
        store = self.store
        assert not self.faults and not store._tasks and not store._waiting and not store._num_leases
        store.slots.check()
        live = {entry.loaded.kv_id: entry.loaded for entry in store.entries() if entry.loaded is not None}
        assert all(not store.slots.num_leases(kv_id) for kv_id in live)
        assert len(store.slots) == len(self.slots) and all(kv_id in store.slots for kv_id in self.slots.values())
        assert set(self.slots.values()) <= set(live)
        assert store.slots.num_bytes == sum(live[kv_id].num_bytes for kv_id in self.slots.values())
        held = [kv_id for kv_id in live if kv_id in store.host]
        assert store.host.num_bytes == sum(live[kv_id].num_bytes for kv_id in held) <= store.host.budget_bytes
        assert sum(map(len, store._versions.values())) == sum(one.loaded is not None for one in store.entries())
        pinned = {e.loaded.kv_id for e in store.entries() if e.is_pinned and e.loaded is not None}
        assert pinned == {kv_id for kv_id in self.slots.values() if store.slots.is_pinned(kv_id)}
        assert not any(place.is_leaving for place in store.slots._places.values())
        assert not any(entry.state in ("loading", "draining") for entry in store.entries())


def run(work: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        loop_errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        async with asyncio.timeout(10):
            await work
        gc.collect(1)  # exceptions that nobody retrieved are found now
        await asyncio.sleep(0)
        assert not loop_errors

    asyncio.run(main())


async def settle(until: Callable[[], object]) -> None:
    for _ in range(5000):
        if until():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it does not come to pass")


async def a_while() -> None:
    """Long enough for what may happen to happen."""
    for _ in range(20):
        await asyncio.sleep(0.0005)


async def cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


# --------------------------------------------------------------------------------------------- loading


def test_it_is_loaded_once_however_many_wait() -> None:
    async def main() -> None:
        sim = Simulated()
        sim.store.register(sim.write("a", "w1"))
        assert sim.state("a") == "registered" and sim.num_reads == 0
        sim.read_gate.clear()
        asked = [asyncio.create_task(sim.ask("a")) for _ in range(50)]
        await settle(lambda: sim.state("a") == "loading")
        sim.read_gate.set()
        assert set(await asyncio.gather(*asked)) == {"w1/"}
        assert sim.num_reads == sim.store.num_loads == 1 and sim.state("a") == "ready"
        await sim.quiet()

    run(main())


def test_requests_wait_for_an_explicit_load_and_do_not_load_again() -> None:
    async def main() -> None:
        sim = Simulated()
        sim.read_gate.clear()
        load = asyncio.create_task(sim.store.load(sim.write("a", "w1")))
        await settle(lambda: sim.store.entries())
        asked = [asyncio.create_task(sim.ask("a")) for _ in range(5)]
        await a_while()
        sim.read_gate.set()
        await load
        assert set(await asyncio.gather(*asked)) == {"w1/"} and sim.num_reads == 1
        await sim.quiet()

    run(main())


def test_an_adapter_on_its_way_into_its_slot_is_not_leased() -> None:
    """Its slot is its own from the start, and empty: answers would be the base's."""

    async def main() -> None:
        sim = Simulated(max_slots=1)
        await sim.store.load(sim.write("a", "w1"))
        await sim.store.load(sim.write("b", "w2"))
        sim.place_gate.clear()
        first = asyncio.create_task(sim.ask("a"))
        await settle(lambda: "w1" in sim.store.slots)
        assert sim.store.try_lease("a") is None
        second = asyncio.create_task(sim.ask("a"))
        await a_while()
        assert not second.done()
        sim.place_gate.set()
        assert list(await asyncio.gather(first, second)) == ["w1/", "w1/"]
        await sim.quiet()

    run(main())


def break_read(sim: Simulated) -> None:
    sim.write("a", bad())


def break_prove(sim: Simulated) -> None:
    sim.write("a", "w2")
    sim.prove_errors["w2/"] = ContractError("golden", "is wrong", remedy="correct it")


def break_place(sim: Simulated) -> None:
    sim.write("a", "w2")
    sim.place_error = out_of_memory


def break_size(sim: Simulated) -> None:
    sim.write("a", Files("w2", num_bytes=2000))


def break_read_unforeseen(sim: Simulated) -> None:
    sim.write("a", bad(lambda: RuntimeError("unforeseen")))


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (break_read, AdapterError),
        (break_prove, ContractError),
        (break_place, EngineError),
        (break_size, AdapterError),
        (break_read_unforeseen, EngineError),
    ],
)
def test_a_failing_load_leaves_the_old_version(
    break_it: Callable[[Simulated], None], kind: type[LoraplexError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.store")  # pytest keeps what is logged, frames and all

    async def main() -> None:
        sim = Simulated()
        a = sim.write("a", "w1")
        await sim.store.load(a)
        break_it(sim)
        with pytest.raises(kind) as raised:
            await sim.store.load(a)
        entry = sim.store.entry("a")
        assert entry.state == "ready" and entry.error is not None and str(entry.error) == str(raised.value)
        sim.place_error = None
        assert await sim.ask("a") == "w1/" and list(sim.slots.values()) == ["w1"]
        await sim.quiet()
        del raised
        await a_while()  # the thread lets go of it, too
        gc.collect()
        assert [one.kv_id for one in sim.weights] == ["w1"], "the error holds the frames that hold the weights"
        sim.write("a", "w3")
        assert (await sim.store.load(a)).error is None and await sim.ask("a") == "w3/"
        await sim.quiet()

    run(main())


@pytest.mark.parametrize("break_it", [break_read, break_prove, break_place, break_size])
def test_a_name_whose_first_load_failed_is_unknown(break_it: Callable[[Simulated], None]) -> None:
    async def main() -> None:
        sim = Simulated()
        break_it(sim)
        with pytest.raises(LoraplexError):
            await sim.store.load(source("a"))
        with pytest.raises(UnknownClassifierError):
            await sim.store.lease("a")
        await sim.quiet()
        assert not sim.store.entries() and not sim.slots and not sim.store.host.num_bytes
        sim.place_error, sim.prove_errors = None, {}
        await sim.store.load(sim.write("a", "w1"))
        assert await sim.ask("a") == "w1/"
        await sim.quiet()

    run(main())


def test_a_second_load_of_a_new_name_outlives_the_failure_of_the_first() -> None:
    async def main() -> None:
        sim = Simulated()
        sim.read_gate.clear()
        sim.write("bad", bad())
        first = asyncio.create_task(sim.store.load(replace(source("a"), path=Path("bad"))))
        second = asyncio.create_task(sim.store.load(sim.write("a", "w1")))
        await a_while()
        sim.read_gate.set()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], AdapterError)
        assert await sim.ask("a") == "w1/" and results[1] is sim.store.entry("a")
        await sim.quiet()

    run(main())


def test_a_lazy_load_that_fails_keeps_its_error_until_somebody_loads_it() -> None:
    async def main() -> None:
        sim = Simulated()
        a = sim.write("a", bad())
        sim.store.register(a)
        for _ in range(3):
            with pytest.raises(AdapterError, match="is broken") as raised:
                await sim.store.lease("a")
        assert sim.num_reads == 1
        entry = sim.store.entry("a")
        assert sim.state("a") == "failed" and entry.error is not raised.value
        assert entry.error is not None and entry.error.__traceback__ is None, "it grows with every request"
        sim.write("a", "w1")
        await sim.store.load(a)
        assert sim.state("a") == "ready" and entry.error is None and await sim.ask("a") == "w1/"
        await sim.quiet()

    run(main())


def test_a_lazy_load_that_failed_for_the_moment_is_tried_again() -> None:
    async def main() -> None:
        sim = Simulated()
        sim.store.register(sim.write("a", "w1"))
        sim.prove_errors["w1/"] = QueueFullError("full", remedy="later")
        with pytest.raises(QueueFullError):
            await sim.ask("a")
        assert sim.store.entry("a").state == "failed"
        sim.prove_errors.clear()
        sim.place_error = out_of_memory
        with pytest.raises(EngineError, match="out of memory"):
            await sim.ask("a")
        sim.place_error = None
        assert await sim.ask("a") == "w1/" and sim.store.entry("a").error is None
        await sim.quiet()

    run(main())


def test_what_was_registered_with_an_error_is_not_read() -> None:
    async def main() -> None:
        sim = Simulated()
        sim.store.register(source("a"), broken())
        with pytest.raises(AdapterError, match="is broken"):
            await sim.store.lease("a")
        assert sim.state("a") == "failed" and sim.num_reads == 0
        await sim.quiet()

    run(main())


def test_a_failing_replacement_of_what_was_not_read_yet_does_not_break_it() -> None:
    async def main() -> None:
        sim = Simulated()
        sim.store.register(sim.write("a", "w1"))
        sim.write("bad", bad())
        with pytest.raises(AdapterError):
            await sim.store.load(replace(source("a"), path=Path("bad")))
        assert await sim.ask("a") == "w1/"
        await sim.quiet()

    run(main())


# --------------------------------------------------------------------------------------------- replacing and unloading


def test_requests_in_flight_finish_on_the_version_they_started_with() -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", "w1"))
        leases = [await sim.lease("a") for _ in range(2)]
        await sim.store.load(sim.write("a", "w2"))
        assert await sim.ask("a") == "w2/"
        sim.give_back(leases[0])
        await a_while()
        assert sim.clears == [] and set(sim.slots.values()) == {"w1", "w2"}
        sim.give_back(leases[1])
        leases[1].release()  # twice is once
        await settle(lambda: sim.clears == [leases[1].slot])
        assert list(sim.slots.values()) == ["w2"] and "w1" not in sim.store.host
        await sim.quiet()

    run(main())


def test_unloading_waits_for_the_last_request_and_frees_everything() -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", "w1"))
        lease = await sim.lease("a")
        entry = sim.store.entry("a")
        unload = asyncio.create_task(sim.store.unload("a"))
        await a_while()
        assert entry.state == "draining" and not unload.done() and sim.slots
        with pytest.raises(UnknownClassifierError):
            sim.store.try_lease("a")
        with pytest.raises(UnknownClassifierError):
            await sim.store.lease("a")
        with pytest.raises(UnknownClassifierError):
            await sim.store.unload("a")
        sim.give_back(lease)
        await unload
        assert not sim.slots and not sim.store.host.num_bytes and not sim.store.entries()
        gc.collect()
        assert not sim.weights
        await sim.quiet()

    run(main())


def test_unloading_waits_for_older_versions_too() -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", "w1"))
        lease = await sim.lease("a")
        await sim.store.load(sim.write("a", "w2"))
        unload = asyncio.create_task(sim.store.unload("a"))
        await a_while()
        assert not unload.done()
        sim.give_back(lease)
        await unload
        assert not sim.slots and not sim.store.host.num_bytes
        await sim.quiet()

    run(main())


@pytest.mark.parametrize("content", ["w1", "w2"])
def test_a_name_is_loaded_again_while_the_old_one_drains(content: str) -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", "w1"))
        lease = await sim.lease("a")
        unload = asyncio.create_task(sim.store.unload("a"))
        await a_while()
        await sim.store.load(sim.write("a", content))
        assert await sim.ask("a") == f"{content}/"
        sim.give_back(lease)
        await unload
        assert await sim.ask("a") == f"{content}/" and list(sim.slots.values()) == [content]
        await sim.quiet()
        await sim.store.unload("a")
        await sim.store.load(sim.write("a", "w3"))
        assert await sim.ask("a") == "w3/"
        await sim.quiet()

    run(main())


def test_who_leaves_an_unload_does_not_stop_it() -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", "w1"))
        lease = await sim.lease("a")
        unload = asyncio.create_task(sim.store.unload("a"))
        await a_while()
        await cancel(unload)
        sim.give_back(lease)
        await sim.quiet()
        assert not sim.slots and not sim.store.entries()

    run(main())


def test_unloading_waits_for_the_load_in_progress() -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", "w1"))
        sim.read_gate.clear()
        load = asyncio.create_task(sim.store.load(sim.write("a", "w2")))
        await a_while()
        unload = asyncio.create_task(sim.store.unload("a"))
        late = asyncio.create_task(sim.ask("a"))
        await a_while()
        assert isinstance(late.exception(), UnknownClassifierError)
        sim.read_gate.set()
        await asyncio.gather(load, unload)
        assert not sim.slots and not sim.store.entries() and not sim.store.host.num_bytes
        await sim.quiet()

    run(main())


def test_the_same_content_under_two_names_shares_a_slot_and_keeps_its_names() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        for name in "ab":
            await sim.store.load(sim.write(name, Files("w1", contract=name)))
        assert len(sim.slots) == 1 and sim.clears == []
        await sim.store.load(sim.write("c", "w2"))
        sim.place_gate.clear()
        asked = [asyncio.create_task(sim.lease(name)) for name in "abab"]
        await a_while()
        sim.place_gate.set()
        leases = await asyncio.gather(*asked)
        assert [lease.version.source.name for lease in leases] == [*"abab"], "waiters for the same weights"
        assert [lease.version.version for lease in leases] == ["w1/a", "w1/b"] * 2
        for lease in leases:
            sim.give_back(lease)
        num_clears = len(sim.clears)
        await sim.store.unload("a")
        assert len(sim.clears) == num_clears and await sim.ask("b") == "w1/b" and "w1" in sim.store.host
        await sim.store.unload("b")
        assert not sim.slots and "w1" not in sim.store.host
        await sim.quiet()

    run(main())


def test_another_contract_swaps_the_version_and_leaves_the_weights_where_they_are() -> None:
    async def main() -> None:
        sim = Simulated()
        await sim.store.load(sim.write("a", Files("w1", "old")))
        lease = await sim.lease("a")
        await sim.store.load(sim.write("a", Files("w1", "new")))
        assert await sim.ask("a") == "w1/new" and lease.version.version == "w1/old"
        sim.give_back(lease)
        await sim.quiet()
        assert sim.clears == [] and len(sim.slots) == 1 and "w1" in sim.store.host
        await sim.store.unload("a")
        assert not sim.slots
        await sim.quiet()

    run(main())


def test_weights_that_are_being_placed_for_nobody_any_more_are_freed() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1, host=0)
        await sim.store.load(sim.write("a", "w1"))
        await sim.store.load(sim.write("b", "w2"))
        sim.store.host.budget_bytes = 100
        sim.read_gate.clear()
        ask = asyncio.create_task(sim.ask("a"))
        await a_while()
        await cancel(ask)
        unload = asyncio.create_task(sim.store.unload("a"))
        await a_while()
        sim.read_gate.set()
        await unload
        assert "w1" not in sim.store.host and "w1" not in sim.slots.values()
        await sim.quiet()

    run(main())


def test_weights_come_again_while_they_go() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        await sim.store.load(sim.write("a", "w1"))
        await sim.store.load(sim.write("b", "w2"))
        sim.place_gate.clear()
        ask = asyncio.create_task(sim.ask("a"))
        await a_while()
        await cancel(ask)
        unload = asyncio.create_task(sim.store.unload("a"))  # waits until it is placed
        await a_while()
        load = asyncio.create_task(sim.store.load(sim.write("c", Files("w1", "c"))))
        await a_while()
        sim.place_gate.set()
        await asyncio.gather(unload, load)
        assert await sim.ask("c") == "w1/c" and "w1" in sim.store.host
        await sim.quiet()

    run(main())


# --------------------------------------------------------------------------------------------- pins


def test_what_is_pinned_keeps_its_place() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=2)
        for name in "abc":
            await sim.store.load(sim.write(name, name))
        assert (await sim.store.pin("a", True)).is_pinned
        for name in "bcbcbc":
            await sim.ask(name)
            assert sim.store.try_lease("a") is not None and sim.store.slots.num_leases("a") == 1
            sim.store._release(sim.store._versions["a"][0])
        await sim.store.load(sim.write("a", "a2"))
        await sim.quiet()
        assert sim.store.slots.is_pinned("a2")
        await sim.store.pin("a", False)
        await sim.ask("b")
        await sim.ask("c")
        assert "a2" not in sim.slots.values()
        await sim.quiet()

    run(main())


def test_a_pin_ends_with_the_name_that_had_it() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=2)
        for name in "ab":
            await sim.store.load(sim.write(name, "w1"), pin=name == "a")
        await sim.store.load(sim.write("c", "w3"), pin=True)
        assert sim.store.slots.is_pinned("w1")
        await sim.store.unload("a")
        assert not sim.store.slots.is_pinned("w1")
        await sim.store.pin("b", True)
        await sim.store.pin("b", False)
        await sim.store.load(sim.write("c", "w4"), pin=False)
        assert not sim.store.slots.is_pinned("w4")
        await sim.quiet()

    run(main())


def test_pinning_follows_a_replacement_that_came_between() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=2)
        await sim.store.load(sim.write("a", "w1"))
        for name in "bc":
            await sim.store.load(sim.write(name, name))
        held = [await sim.lease(name) for name in "bc"]
        load = asyncio.create_task(sim.store.load(sim.write("a", "w2")))
        await a_while()
        pin = asyncio.create_task(sim.store.pin("a", True))
        await a_while()
        sim.give_back(held[0])
        await load
        assert not pin.done(), "it waits for the old version's place"
        sim.give_back(held[1])
        await pin
        assert sim.store.entry("a").is_pinned and sim.store.slots.is_pinned("w2")
        await sim.quiet()

    run(main())


def test_where_pins_leave_no_room_it_is_said_and_unpinning_helps_at_once() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=2)
        for name in "ab":
            await sim.store.load(sim.write(name, name), pin=True)
        sim.store.register(sim.write("c", "c"))
        with pytest.raises(NotReadyError, match="unpin"):
            await sim.ask("c")
        await sim.store.pin("b", False)
        assert await sim.ask("c") == "c/"
        held = await sim.lease("c")
        waits = asyncio.create_task(sim.ask("b"))
        await a_while()
        pin = asyncio.create_task(sim.store.pin("c", True))  # takes the place that it waits for
        await a_while()
        assert not pin.done() and not waits.done(), "c is to leave"
        sim.give_back(held)
        assert await waits == "b/"
        await pin
        waits = asyncio.create_task(sim.ask("b"))
        with pytest.raises(NotReadyError, match="unpin"):
            await waits
        await sim.quiet()

    run(main())


def test_unpinning_wakes_who_waits() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=2)
        for name in "abc":
            await sim.store.load(sim.write(name, name))
        await sim.store.pin("a", True)
        held = await sim.lease("b")
        waits = asyncio.create_task(sim.ask("c"))
        await a_while()
        assert not waits.done()
        await sim.store.pin("a", False)
        assert await waits == "c/"
        sim.give_back(held)
        await sim.quiet()

    run(main())


def test_whoever_waits_hears_that_the_last_place_was_pinned() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        for name in "ab":
            await sim.store.load(sim.write(name, name))
        sim.prove_gate.clear()
        load = asyncio.create_task(sim.store.load(sim.write("b", Files("b", "new")), pin=True))
        await a_while()
        waits = asyncio.create_task(sim.ask("a"))
        await a_while()
        sim.prove_gate.set()
        await load
        with pytest.raises(NotReadyError, match="unpin"):
            await waits
        assert await sim.ask("b") == "b/new"
        await sim.quiet()

    run(main())


def test_those_that_were_to_leave_stay_where_whoever_waited_gives_up() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=3, budget=30)
        for name, num_bytes in (("big", 30), ("b", 10), ("c", 10)):
            await sim.store.load(sim.write(name, Files(name, num_bytes=num_bytes)))
        held = await sim.lease("b")
        sim.prove_gate.clear()
        load = asyncio.create_task(sim.store.load(sim.write("c", Files("c", "new")), pin=True))
        await a_while()
        waits = asyncio.create_task(sim.ask("big"))
        await a_while()
        assert sim.store.try_lease("b") is None
        sim.prove_gate.set()
        await load
        with pytest.raises(NotReadyError, match="unpin"):
            await waits
        assert await sim.ask("b") == "b/"
        sim.give_back(held)
        await sim.quiet()

    run(main())


# --------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("max_slots", [1, 2, 3])
def test_a_cold_one_gets_a_place_though_hot_ones_are_always_leased(max_slots: int) -> None:
    async def main() -> None:
        sim = Simulated(max_slots=max_slots)
        hot = [f"hot{i}" for i in range(max_slots)]
        for name in [*hot, "cold"]:
            sim.store.register(sim.write(name, name))
        stopping = False
        counts = dict.fromkeys(hot, 0)

        async def traffic(name: str) -> None:
            while not stopping:
                await sim.ask(name, num_turns=3)
                counts[name] += 1

        # Three overlap on each, so that it is never idle.
        tasks = [asyncio.create_task(traffic(name)) for name in hot for _ in range(3)]
        for _ in range(3):
            await settle(lambda: all(count > 20 for count in counts.values()))
            assert await sim.ask("cold") == "cold/"
            counts.update(dict.fromkeys(hot, 0))
        await settle(lambda: all(count > 20 for count in counts.values()))
        stopping = True
        await asyncio.gather(*tasks)
        await sim.quiet()

    run(main())


def test_a_cold_one_needs_the_places_of_an_idle_and_a_hot_one() -> None:
    """Beside a pinned one; the idle one's bytes are not counted twice."""

    async def main() -> None:
        sim = Simulated(max_slots=4, budget=100)
        for name, num_bytes in (("pinned", 10), ("idle", 30), ("hot", 60), ("cold", 70)):
            sim.write(name, Files(name, num_bytes=num_bytes))
        await sim.store.load(source("pinned"), pin=True)
        sim.store.register(source("cold"))
        for name in ("idle", "hot"):
            await sim.store.load(source(name))
        lease = await sim.lease("hot")
        cold = asyncio.create_task(sim.ask("cold"))
        await a_while()
        later = asyncio.create_task(sim.ask("hot"))
        assert sim.store.try_lease("hot") is None
        sim.give_back(lease)
        assert list(await asyncio.gather(cold, later)) == ["cold/", "hot/"]
        await sim.quiet()

    run(main())


def test_one_that_was_to_leave_stays_where_another_place_became_free() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=2)
        for name in "abc":
            await sim.store.load(sim.write(name, name))
        held = [await sim.lease("b"), await sim.lease("c")]
        waits = asyncio.create_task(sim.ask("a"))
        await a_while()
        assert sim.store.try_lease("b") is None
        sim.write("b", bad())  # it is not read again to stay
        sim.store.host.drop("b")
        again = asyncio.create_task(sim.ask("b"))
        await a_while()
        sim.give_back(held[1])
        assert await waits == "a/" and await again == "b/"
        sim.give_back(held[0])
        assert await sim.ask("b") == "b/"
        await sim.quiet()

    run(main())


def test_waiters_get_their_lease_though_their_place_is_wanted_already() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        for name in "abc":
            await sim.store.load(sim.write(name, name))
        sim.place_gate.clear()
        asked = [asyncio.create_task(sim.ask(name)) for name in "abab"]
        await a_while()
        sim.place_gate.set()
        assert await asyncio.gather(*asked) == ["a/", "b/", "a/", "b/"]
        await sim.quiet()

    run(main())


@pytest.mark.parametrize("gate", ["read", "place", "lease"])
def test_a_waiter_that_leaves_takes_no_lease_with_it(gate: str) -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1, host=0)
        for name in "ab":
            await sim.store.load(sim.write(name, name))
        held = await sim.lease("b")
        if gate != "lease":
            sim.give_back(held)
            (sim.read_gate if gate == "read" else sim.place_gate).clear()
        stays = asyncio.create_task(sim.ask("a"))
        leaves = [asyncio.create_task(sim.ask("a")) for _ in range(3)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await sim.lease("a")
        for task in leaves:
            await cancel(task)
        sim.read_gate.set()
        sim.place_gate.set()
        if gate == "lease":
            sim.give_back(held)
        assert await stays == "a/"
        await sim.quiet()

    run(main())


def test_a_waiter_that_leaves_as_its_lease_comes_gives_it_back() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        for name in "ab":
            await sim.store.load(sim.write(name, name))
        task = asyncio.create_task(sim.store.lease("a"))
        await asyncio.sleep(0)
        [(_, future)] = sim.store._waiting["a"]
        while not future.done():
            await asyncio.sleep(0)
        assert not task.done(), "its next step is to take the lease"
        await cancel(task)
        await sim.quiet()

    run(main())


def test_a_load_whose_caller_leaves_changes_nothing() -> None:
    async def main() -> None:
        for gate in ("read", "place", "prove"):
            sim = Simulated()
            await sim.store.load(sim.write("a", "w1"))
            gates: dict[str, Any] = {"read": sim.read_gate, "place": sim.place_gate, "prove": sim.prove_gate}
            gates[gate].clear()
            load = asyncio.create_task(sim.store.load(sim.write("a", "w2")))
            await a_while()
            load.cancel()
            await a_while()
            load.cancel()  # while it cleans up
            await a_while()
            gates[gate].set()
            await asyncio.wait([load])
            assert await sim.ask("a") == "w1/" and sim.store.entry("a").error is None
            await sim.quiet()
            assert list(sim.slots.values()) == ["w1"]

    run(main())


def test_a_place_that_fails_loses_nothing() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        for name in "ab":
            await sim.store.load(sim.write(name, name))
        sim.place_error = out_of_memory
        asked = await asyncio.gather(*(sim.ask("a") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(one, EngineError) and "out of memory" in one.message for one in asked)
        assert not sim.slots and len({id(one) for one in asked}) == 3
        sim.place_error = None
        assert await sim.ask("b") == "b/" and await sim.ask("a") == "a/"
        await sim.quiet()

    run(main())


def test_files_that_changed_since_are_not_taken_for_the_version_that_left_memory() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1, host=0)
        a = sim.write("a", "w1")
        await sim.store.load(a)
        await sim.store.load(sim.write("b", "w2"))
        assert await sim.ask("a") == "w1/" and sim.num_reads == 3
        await sim.ask("b")
        sim.write("a", "w9")
        with pytest.raises(AdapterError, match="changed on disk"):
            await sim.ask("a")
        assert await sim.ask("b") == "w2/"
        sim.write("a", "w1")
        assert await sim.ask("a") == "w1/"
        sim.write("a", "w9")
        await sim.store.load(a)
        assert await sim.ask("a") == "w9/"
        await sim.quiet()

    run(main())


def test_what_does_not_fit_at_all_is_refused_with_the_remedy() -> None:
    async def main() -> None:
        sim = Simulated(budget=50)
        with pytest.raises(AdapterError, match=r"needs 51 bytes.*--adapter-memory"):
            await sim.store.load(sim.write("a", Files("w1", num_bytes=51)))
        await sim.store.load(sim.write("a", Files("w1", num_bytes=50)))
        assert await sim.ask("a") == "w1/"
        await sim.quiet()

    run(main())


def test_host_memory_has_a_budget() -> None:
    tier = HostTier(30)
    for key in "abc":
        tier.put(key, key, 10)
    assert tier.get("a") == "a" and tier.num_bytes == 30
    tier.put("d", "d", 10)
    assert "b" not in tier and tier.get("b") is None and tier.num_bytes == 30
    tier.put("e", "e", 31)
    assert "e" not in tier and tier.num_bytes == 30, "what is not held puts nobody out"
    tier.put("a", "A", 20)
    assert tier.get("a") == "A" and tier.num_bytes == 30 and "d" in tier
    tier.put("a", "A", 31)
    tier.drop("d")
    tier.drop("d")
    assert tier.num_bytes == 0 and "a" not in tier


def test_many_more_than_there_are_places() -> None:
    async def main() -> None:
        sim = Simulated(max_slots=8, budget=100, host=200)
        names = [f"n{i}" for i in range(300)]
        for name in names:
            sim.store.register(sim.write(name, name))
        chosen = random.Random(0)

        async def client() -> None:
            for _ in range(60):
                name = names[min(int(chosen.paretovariate(0.7)), 300) - 1]
                assert await sim.ask(name, num_turns=chosen.randrange(3)) == f"{name}/"

        await asyncio.gather(*(client() for _ in range(20)))
        await sim.quiet()
        gc.collect()
        assert len(sim.weights) <= 20 and len(sim.slots) <= 8

    run(main())


# --------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("gate", ["read", "place", "prove", "lease"])
def test_closing_answers_everybody(gate: str) -> None:
    async def main() -> None:
        sim = Simulated(max_slots=1)
        await sim.store.load(sim.write("a", "w1"))
        for name in "bc":
            sim.store.register(sim.write(name, name))
        held = None
        if gate == "lease":
            held = await sim.lease("a")
        elif gate == "prove":
            sim.prove_gate.clear()
        else:
            (sim.read_gate if gate == "read" else sim.place_gate).clear()
        work = [sim.store.load(sim.write("d", "w4")), *(sim.store.lease(name) for name in "bcb")]
        tasks = [asyncio.create_task(one) for one in work]
        await a_while()
        unload = asyncio.create_task(sim.store.unload("a" if held is not None else "b"))
        late = asyncio.create_task(sim.store.lease("c"))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.02, sim.read_gate.set)
        asyncio.get_running_loop().call_later(0.02, sim.place_gate.set)
        await sim.store.close()
        sim.prove_gate.set()
        results = await asyncio.gather(*tasks, unload, late, return_exceptions=True)
        assert all(isinstance(result, NotReadyError) for result in results), results
        with pytest.raises(NotReadyError):
            await sim.store.lease("a")
        with pytest.raises(NotReadyError):
            await sim.store.load(source("a"))
        if held is not None:
            sim.give_back(held)  # the engine's last
        await sim.store.close()
        assert not sim.faults and not sim.store._tasks

    run(main())


# --------------------------------------------------------------------------------------------- anything in any order


class Actors:
    """Clients and operators on a few names. What each does, and how long everything takes, comes from the seed; some
    leave at any point."""

    NAMES = "abcd"

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sim = Simulated(
            max_slots=self.random.choice([1, 2, 3]), budget=60, host=self.random.choice([0, 25, 1000]), seed=seed + 1
        )
        for name in self.NAMES:
            self.rewrite(name)

    def rewrite(self, name: str) -> AdapterSource:
        """Few contents, so that names share them and they come back."""
        number = self.random.randrange(6)
        error = broken if self.random.random() < 0.15 else None
        contract = str(self.random.randrange(2))
        return self.sim.write(name, Files(f"w{number}", contract, num_bytes=(5, 10, 30)[number % 3], error=error))

    async def act(self) -> None:
        sim, name = self.sim, self.random.choice(self.NAMES)
        match self.random.randrange(12):
            case 0 | 1:
                await sim.store.load(self.rewrite(name), pin=self.random.choice([None, None, True, False]))
            case 2:
                await sim.store.unload(name)
            case 3:
                await sim.store.pin(name, self.random.random() < 0.3)
            case 4:
                self.rewrite(name)
                sim.place_error = out_of_memory if self.random.random() < 0.2 else None
            case 5:
                number = f"w{self.random.randrange(6)}/{self.random.randrange(2)}"
                sim.prove_errors = {number: broken()} if self.random.random() < 0.5 else {}
            case _:
                lease = await sim.lease(name)
                try:
                    for _ in range(self.random.randrange(8)):
                        await asyncio.sleep(0)
                finally:
                    sim.give_back(lease)

    async def actor(self, num_acts: int) -> None:
        for _ in range(num_acts):
            try:
                if self.random.random() < 0.25:
                    await self.leaving(asyncio.create_task(self.act()))
                else:
                    await self.act()
            except LoraplexError:
                pass

    async def leaving(self, task: "asyncio.Task[None]") -> None:
        for _ in range(self.random.randrange(12)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def main(self) -> None:
        sim = self.sim
        for name in self.NAMES[:2]:
            sim.store.register(source(name))
        actors = [asyncio.create_task(self.actor(25)) for _ in range(6)]
        _, hanging = await asyncio.wait(actors, timeout=5)
        for task in hanging:
            task.print_stack()
        assert not hanging, "it hangs"
        for task in actors:
            task.result()
        await sim.quiet()
        # And everything still works.
        sim.place_error, sim.prove_errors = None, {}
        for name in self.NAMES:
            if any(entry.name == name for entry in sim.store.entries()):
                await sim.store.pin(name, False) if sim.store.entry(name).is_pinned else None
        for name in self.NAMES:
            await sim.store.load(sim.write(name, f"new-{name}"))
            assert await sim.ask(name) == f"new-{name}/"
            await sim.store.unload(name)
        await sim.quiet()
        assert not sim.slots and not sim.store.host.num_bytes and not sim.store.entries()
        await sim.store.close()


class InTurns:
    """Threads, as turns of the loop: what runs in one is done at once some turns later, so that a seed says all."""

    def __init__(self, sim: Simulated) -> None:
        self.sim = sim
        self.placer = asyncio.Lock()

    async def to_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        await self.sim.turns()
        return work(*args)


@pytest.mark.parametrize("seed", range(60))
def test_anything_in_any_order(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.store")

    async def main() -> None:
        actors = Actors(seed)
        sim, store = actors.sim, actors.sim.store
        in_turns = InTurns(sim)

        async def on_placer(work: Callable[..., None], *args: int) -> None:
            """Once begun it is done, in order, also where whoever began it leaves."""
            store._check_open()

            async def in_order() -> None:
                async with in_turns.placer:
                    await in_turns.to_thread(work, *args)

            await asyncio.shield(asyncio.ensure_future(in_order()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "_on_placer", on_placer)
            patch.setattr("loraplex.adapters.store.asyncio.to_thread", in_turns.to_thread)
            await actors.main()

    run(main())


@pytest.mark.parametrize("seed", range(10))
def test_anything_in_any_order_in_threads(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.store")
    run(Actors(seed).main())


@pytest.mark.parametrize("seed", range(10))
def test_closing_at_any_time(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.store")

    async def main() -> None:
        actors = Actors(seed)
        tasks = [asyncio.create_task(actors.actor(100)) for _ in range(6)]
        for _ in range(random.Random(seed).randrange(300)):
            await asyncio.sleep(0)
        await actors.sim.store.close()
        _, hanging = await asyncio.wait(tasks, timeout=5)
        assert not hanging and not any(task.exception() for task in tasks)
        assert not actors.sim.faults and not actors.sim.store._tasks and not actors.sim.store._num_leases

    run(main())
