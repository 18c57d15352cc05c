"""Versions that are replaced and unloaded while they are asked, against a simulated disk and device."""

import asyncio
import gc

import pytest

from loraplex.errors import (
    UnknownClassifierError,
)
from simulated import Files, Simulated, a_while, cancel, settle

pytestmark = pytest.mark.anyio


async def test_requests_in_flight_finish_on_the_version_they_started_with() -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", "w1"))
    leases = [await sim.lease("a") for _ in range(2)]
    await sim.versions.load(sim.write("a", "w2"))
    assert await sim.ask("a") == "w2/"
    sim.give_back(leases[0])
    await a_while()
    assert sim.clears == [] and set(sim.slots.values()) == {"w1", "w2"}
    sim.give_back(leases[1])
    leases[1].release()  # twice is once
    await settle(lambda: sim.clears == [leases[1].slot])
    assert list(sim.slots.values()) == ["w2"] and "w1" not in sim.residence.host._held
    await sim.quiet()


async def test_unloading_waits_for_the_last_request_and_frees_everything() -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", "w1"))
    lease = await sim.lease("a")
    entry = sim.versions.entry("a")
    unload = asyncio.create_task(sim.versions.unload("a"))
    await a_while()
    assert entry.state == "draining" and not unload.done() and sim.slots
    with pytest.raises(UnknownClassifierError):
        sim.versions.try_lease("a")
    with pytest.raises(UnknownClassifierError):
        await sim.versions.lease("a")
    with pytest.raises(UnknownClassifierError):
        await sim.versions.unload("a")
    sim.give_back(lease)
    await unload
    assert not sim.slots and not sim.residence.host.num_bytes and not sim.names.entries()
    gc.collect()
    assert not sim.weights
    await sim.quiet()


async def test_unloading_waits_for_older_versions_too() -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", "w1"))
    lease = await sim.lease("a")
    await sim.versions.load(sim.write("a", "w2"))
    unload = asyncio.create_task(sim.versions.unload("a"))
    await a_while()
    assert not unload.done()
    sim.give_back(lease)
    await unload
    assert not sim.slots and not sim.residence.host.num_bytes
    await sim.quiet()


@pytest.mark.parametrize("content", ["w1", "w2"])
async def test_a_name_is_loaded_again_while_the_old_one_drains(content: str) -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", "w1"))
    lease = await sim.lease("a")
    unload = asyncio.create_task(sim.versions.unload("a"))
    await a_while()
    await sim.versions.load(sim.write("a", content))
    assert await sim.ask("a") == f"{content}/"
    sim.give_back(lease)
    await unload
    assert await sim.ask("a") == f"{content}/" and list(sim.slots.values()) == [content]
    await sim.quiet()
    await sim.versions.unload("a")
    await sim.versions.load(sim.write("a", "w3"))
    assert await sim.ask("a") == "w3/"
    await sim.quiet()


async def test_who_leaves_an_unload_does_not_stop_it() -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", "w1"))
    lease = await sim.lease("a")
    unload = asyncio.create_task(sim.versions.unload("a"))
    await a_while()
    await cancel(unload)
    sim.give_back(lease)
    await sim.quiet()
    assert not sim.slots and not sim.names.entries()


async def test_unloading_waits_for_the_load_in_progress() -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", "w1"))
    sim.read_gate.clear()
    load = asyncio.create_task(sim.versions.load(sim.write("a", "w2")))
    await a_while()
    unload = asyncio.create_task(sim.versions.unload("a"))
    late = asyncio.create_task(sim.ask("a"))
    await a_while()
    assert isinstance(late.exception(), UnknownClassifierError)
    sim.read_gate.set()
    await asyncio.gather(load, unload)
    assert not sim.slots and not sim.names.entries() and not sim.residence.host.num_bytes
    await sim.quiet()


async def test_the_same_content_under_two_names_shares_a_slot_and_keeps_its_names() -> None:
    sim = Simulated(max_slots=1)
    for name in "ab":
        await sim.versions.load(sim.write(name, Files("w1", contract=name)))
    assert len(sim.slots) == 1 and sim.clears == []
    await sim.versions.load(sim.write("c", "w2"))
    sim.place_gate.clear()
    asked = [asyncio.create_task(sim.lease(name)) for name in "abab"]
    await a_while()
    sim.place_gate.set()
    leases = await asyncio.gather(*asked)
    assert [lease.version.source.name for lease in leases] == [*"abab"], "waiters for the same weights"
    assert [lease.version.id for lease in leases] == ["w1/a", "w1/b"] * 2
    for lease in leases:
        sim.give_back(lease)
    num_clears = len(sim.clears)
    await sim.versions.unload("a")
    assert len(sim.clears) == num_clears and await sim.ask("b") == "w1/b" and "w1" in sim.residence.host._held
    await sim.versions.unload("b")
    assert not sim.slots and "w1" not in sim.residence.host._held
    await sim.quiet()


async def test_another_contract_swaps_the_version_and_leaves_the_weights_where_they_are() -> None:
    sim = Simulated()
    await sim.versions.load(sim.write("a", Files("w1", "old")))
    lease = await sim.lease("a")
    await sim.versions.load(sim.write("a", Files("w1", "new")))
    assert await sim.ask("a") == "w1/new" and lease.version.id == "w1/old"
    sim.give_back(lease)
    await sim.quiet()
    assert sim.clears == [] and len(sim.slots) == 1 and "w1" in sim.residence.host._held
    await sim.versions.unload("a")
    assert not sim.slots
    await sim.quiet()


async def test_weights_that_are_being_placed_for_nobody_any_more_are_freed() -> None:
    sim = Simulated(max_slots=1, host=0)
    await sim.versions.load(sim.write("a", "w1"))
    await sim.versions.load(sim.write("b", "w2"))
    sim.residence.host.budget_bytes = 100
    sim.read_gate.clear()
    ask = asyncio.create_task(sim.ask("a"))
    await a_while()
    await cancel(ask)
    unload = asyncio.create_task(sim.versions.unload("a"))
    await a_while()
    sim.read_gate.set()
    await unload
    assert "w1" not in sim.residence.host._held and "w1" not in sim.slots.values()
    await sim.quiet()


async def test_weights_come_again_while_they_go() -> None:
    sim = Simulated(max_slots=1)
    await sim.versions.load(sim.write("a", "w1"))
    await sim.versions.load(sim.write("b", "w2"))
    sim.place_gate.clear()
    ask = asyncio.create_task(sim.ask("a"))
    await a_while()
    await cancel(ask)
    unload = asyncio.create_task(sim.versions.unload("a"))  # waits until it is placed
    await a_while()
    load = asyncio.create_task(sim.versions.load(sim.write("c", Files("w1", "c"))))
    await a_while()
    sim.place_gate.set()
    await asyncio.gather(unload, load)
    assert await sim.ask("c") == "w1/c" and "w1" in sim.residence.host._held
    await sim.quiet()
