"""More adapters than places, against a simulated disk and device."""

import asyncio
import gc
import random
from typing import Any

import pytest

from loraplex.adapters.host import HostTier
from loraplex.errors import (
    AdapterError,
    EngineError,
)
from simulated import Files, Simulated, a_while, bad, cancel, out_of_memory, settle, source

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("max_slots", [1, 2, 3])
async def test_a_cold_one_gets_a_place_though_hot_ones_are_always_leased(max_slots: int) -> None:
    sim = Simulated(max_slots=max_slots)
    hot = [f"hot{i}" for i in range(max_slots)]
    for name in [*hot, "cold"]:
        sim.versions.register(sim.write(name, name))
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


async def test_a_cold_one_needs_the_places_of_an_idle_and_a_hot_one() -> None:
    """Beside a pinned one; the idle one's bytes are not counted twice."""
    sim = Simulated(max_slots=4, budget=100)
    for name, num_bytes in (("pinned", 10), ("idle", 30), ("hot", 60), ("cold", 70)):
        sim.write(name, Files(name, num_bytes=num_bytes))
    await sim.versions.load(source("pinned"), pin=True)
    sim.versions.register(source("cold"))
    for name in ("idle", "hot"):
        await sim.versions.load(source(name))
    lease = await sim.lease("hot")
    cold = asyncio.create_task(sim.ask("cold"))
    await a_while()
    later = asyncio.create_task(sim.ask("hot"))
    assert sim.versions.try_lease("hot") is None
    sim.give_back(lease)
    assert list(await asyncio.gather(cold, later)) == ["cold/", "hot/"]
    await sim.quiet()


async def test_one_that_was_to_leave_stays_where_another_place_became_free() -> None:
    sim = Simulated(max_slots=2)
    for name in "abc":
        await sim.versions.load(sim.write(name, name))
    held = [await sim.lease("b"), await sim.lease("c")]
    waits = asyncio.create_task(sim.ask("a"))
    await a_while()
    assert sim.versions.try_lease("b") is None
    sim.write("b", bad())  # it is not read again to stay
    sim.residence.host.drop("b")
    again = asyncio.create_task(sim.ask("b"))
    await a_while()
    sim.give_back(held[1])
    assert await waits == "a/" and await again == "b/"
    sim.give_back(held[0])
    assert await sim.ask("b") == "b/"
    await sim.quiet()


async def test_waiters_get_their_lease_though_their_place_is_wanted_already() -> None:
    sim = Simulated(max_slots=1)
    for name in "abc":
        await sim.versions.load(sim.write(name, name))
    sim.place_gate.clear()
    asked = [asyncio.create_task(sim.ask(name)) for name in "abab"]
    await a_while()
    sim.place_gate.set()
    assert await asyncio.gather(*asked) == ["a/", "b/", "a/", "b/"]
    await sim.quiet()


@pytest.mark.parametrize("gate", ["read", "place", "lease"])
async def test_a_waiter_that_leaves_takes_no_lease_with_it(gate: str) -> None:
    sim = Simulated(max_slots=1, host=0)
    for name in "ab":
        await sim.versions.load(sim.write(name, name))
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


async def test_a_waiter_that_leaves_as_its_lease_comes_gives_it_back() -> None:
    sim = Simulated(max_slots=1)
    for name in "ab":
        await sim.versions.load(sim.write(name, name))
    task = asyncio.create_task(sim.versions.lease("a"))
    await asyncio.sleep(0)
    version = sim.versions.entry("a").live
    assert version is not None
    while sim.residence.is_awaited(version):
        await asyncio.sleep(0)
    assert not task.done(), "its next step is to take the lease"
    await cancel(task)
    await sim.quiet()


async def test_a_load_whose_caller_leaves_changes_nothing() -> None:
    for gate in ("read", "place", "prove"):
        sim = Simulated()
        await sim.versions.load(sim.write("a", "w1"))
        gates: dict[str, Any] = {"read": sim.read_gate, "place": sim.place_gate, "prove": sim.prove_gate}
        gates[gate].clear()
        load = asyncio.create_task(sim.versions.load(sim.write("a", "w2")))
        await a_while()
        load.cancel()
        await a_while()
        load.cancel()  # while it cleans up
        await a_while()
        gates[gate].set()
        await asyncio.wait([load])
        assert await sim.ask("a") == "w1/" and sim.versions.entry("a").error is None
        await sim.quiet()
        assert list(sim.slots.values()) == ["w1"]


async def test_a_place_that_fails_loses_nothing() -> None:
    sim = Simulated(max_slots=1)
    for name in "ab":
        await sim.versions.load(sim.write(name, name))
    sim.place_error = out_of_memory
    asked = await asyncio.gather(*(sim.ask("a") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(one, EngineError) and "out of memory" in one.message for one in asked)
    assert not sim.slots and len({id(one) for one in asked}) == 3
    sim.place_error = None
    assert await sim.ask("b") == "b/" and await sim.ask("a") == "a/"
    await sim.quiet()


async def test_files_that_changed_since_are_not_taken_for_the_version_that_left_memory() -> None:
    sim = Simulated(max_slots=1, host=0)
    a = sim.write("a", "w1")
    await sim.versions.load(a)
    await sim.versions.load(sim.write("b", "w2"))
    assert await sim.ask("a") == "w1/" and sim.num_reads == 3
    await sim.ask("b")
    sim.write("a", "w9")
    with pytest.raises(AdapterError, match="changed on disk"):
        await sim.ask("a")
    assert await sim.ask("b") == "w2/"
    sim.write("a", "w1")
    assert await sim.ask("a") == "w1/"
    sim.write("a", "w9")
    await sim.versions.load(a)
    assert await sim.ask("a") == "w9/"
    await sim.quiet()


async def test_what_does_not_fit_at_all_is_refused_with_the_remedy() -> None:
    sim = Simulated(budget=50)
    with pytest.raises(AdapterError, match=r"needs 51 bytes.*--adapter-memory"):
        await sim.versions.load(sim.write("a", Files("w1", num_bytes=51)))
    await sim.versions.load(sim.write("a", Files("w1", num_bytes=50)))
    assert await sim.ask("a") == "w1/"
    await sim.quiet()


def test_host_memory_has_a_budget() -> None:
    tier = HostTier(30)
    for key in "abc":
        tier.put(key, key, 10)
    assert tier.get("a") == "a" and tier.num_bytes == 30
    tier.put("d", "d", 10)
    assert "b" not in tier._held and tier.get("b") is None and tier.num_bytes == 30
    tier.put("e", "e", 31)
    assert "e" not in tier._held and tier.num_bytes == 30, "what is not held puts nobody out"
    tier.put("a", "A", 20)
    assert tier.get("a") == "A" and tier.num_bytes == 30 and "d" in tier._held
    tier.put("a", "A", 31)
    tier.drop("d")
    tier.drop("d")
    assert tier.num_bytes == 0 and "a" not in tier._held


async def test_many_more_than_there_are_places() -> None:
    sim = Simulated(max_slots=8, budget=100, host=200)
    names = [f"n{i}" for i in range(300)]
    for name in names:
        sim.versions.register(sim.write(name, name))
    chosen = random.Random(0)

    async def client() -> None:
        for _ in range(60):
            name = names[min(int(chosen.paretovariate(0.7)), 300) - 1]
            assert await sim.ask(name, num_turns=chosen.randrange(3)) == f"{name}/"

    await asyncio.gather(*(client() for _ in range(20)))
    await sim.quiet()
    gc.collect()
    assert len(sim.weights) <= 20 and len(sim.slots) <= 8
