"""Adapters that keep their places, against a simulated disk and device."""

import asyncio

import pytest

from loraplex.errors import (
    NotReadyError,
)
from simulated import Files, Simulated, a_while
from sound import is_pinned

pytestmark = pytest.mark.anyio


async def test_what_is_pinned_keeps_its_place() -> None:
    sim = Simulated(max_slots=2)
    for name in "abc":
        await sim.versions.load(sim.write(name, name))
    assert (await sim.versions.pin("a", True)).is_pinned
    for name in "bcbcbc":
        await sim.ask(name)
        lease = sim.versions.try_lease("a")
        assert lease is not None
        lease.release()
    await sim.versions.load(sim.write("a", "a2"))
    await sim.quiet()
    assert is_pinned(sim.residence.slots, "a2")
    await sim.versions.pin("a", False)
    await sim.ask("b")
    await sim.ask("c")
    assert "a2" not in sim.slots.values()
    await sim.quiet()


async def test_a_pin_ends_with_the_name_that_had_it() -> None:
    sim = Simulated(max_slots=2)
    for name in "ab":
        await sim.versions.load(sim.write(name, "w1"), pin=name == "a")
    await sim.versions.load(sim.write("c", "w3"), pin=True)
    assert is_pinned(sim.residence.slots, "w1")
    await sim.versions.unload("a")
    assert not is_pinned(sim.residence.slots, "w1")
    await sim.versions.pin("b", True)
    await sim.versions.pin("b", False)
    await sim.versions.load(sim.write("c", "w4"), pin=False)
    assert not is_pinned(sim.residence.slots, "w4")
    await sim.quiet()


async def test_pinning_follows_a_replacement_that_came_between() -> None:
    sim = Simulated(max_slots=2)
    await sim.versions.load(sim.write("a", "w1"))
    for name in "bc":
        await sim.versions.load(sim.write(name, name))
    held = [await sim.lease(name) for name in "bc"]
    load = asyncio.create_task(sim.versions.load(sim.write("a", "w2")))
    await a_while()
    pin = asyncio.create_task(sim.versions.pin("a", True))
    await a_while()
    sim.give_back(held[0])
    await load
    assert not pin.done(), "it waits for the old version's place"
    sim.give_back(held[1])
    await pin
    assert sim.versions.entry("a").is_pinned and is_pinned(sim.residence.slots, "w2")
    await sim.quiet()


async def test_where_pins_leave_no_room_it_is_said_and_unpinning_helps_at_once() -> None:
    sim = Simulated(max_slots=2)
    for name in "ab":
        await sim.versions.load(sim.write(name, name), pin=True)
    sim.versions.register(sim.write("c", "c"))
    with pytest.raises(NotReadyError, match="unpin"):
        await sim.ask("c")
    await sim.versions.pin("b", False)
    assert await sim.ask("c") == "c/"
    held = await sim.lease("c")
    waits = asyncio.create_task(sim.ask("b"))
    await a_while()
    pin = asyncio.create_task(sim.versions.pin("c", True))  # takes the place that it waits for
    await a_while()
    assert not pin.done() and not waits.done(), "c is to leave"
    sim.give_back(held)
    assert await waits == "b/"
    await pin
    waits = asyncio.create_task(sim.ask("b"))
    with pytest.raises(NotReadyError, match="unpin"):
        await waits
    await sim.quiet()


async def test_unpinning_wakes_who_waits() -> None:
    sim = Simulated(max_slots=2)
    for name in "abc":
        await sim.versions.load(sim.write(name, name))
    await sim.versions.pin("a", True)
    held = await sim.lease("b")
    waits = asyncio.create_task(sim.ask("c"))
    await a_while()
    assert not waits.done()
    await sim.versions.pin("a", False)
    assert await waits == "c/"
    sim.give_back(held)
    await sim.quiet()


async def test_whoever_waits_hears_that_the_last_place_was_pinned() -> None:
    sim = Simulated(max_slots=1)
    for name in "ab":
        await sim.versions.load(sim.write(name, name))
    sim.prove_gate.clear()
    load = asyncio.create_task(sim.versions.load(sim.write("b", Files("b", "new")), pin=True))
    await a_while()
    waits = asyncio.create_task(sim.ask("a"))
    await a_while()
    sim.prove_gate.set()
    await load
    with pytest.raises(NotReadyError, match="unpin"):
        await waits
    assert await sim.ask("b") == "b/new"
    await sim.quiet()


async def test_those_that_were_to_leave_stay_where_whoever_waited_gives_up() -> None:
    sim = Simulated(max_slots=3, budget=30)
    for name, num_bytes in (("big", 30), ("b", 10), ("c", 10)):
        await sim.versions.load(sim.write(name, Files(name, num_bytes=num_bytes)))
    held = await sim.lease("b")
    sim.prove_gate.clear()
    load = asyncio.create_task(sim.versions.load(sim.write("c", Files("c", "new")), pin=True))
    await a_while()
    waits = asyncio.create_task(sim.ask("big"))
    await a_while()
    assert sim.versions.try_lease("b") is None
    sim.prove_gate.set()
    await load
    with pytest.raises(NotReadyError, match="unpin"):
        await waits
    assert await sim.ask("b") == "b/"
    sim.give_back(held)
    await sim.quiet()
