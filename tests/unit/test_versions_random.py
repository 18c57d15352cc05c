"""Anything in any order, and closing at any time, against a simulated disk and device."""

import asyncio
import logging
import random

import pytest

from loraplex.bundle import AdapterSource
from loraplex.errors import (
    LoraplexError,
    NotReadyError,
)
from simulated import Files, Simulated, a_while, broken, out_of_memory, source
from sound import check_residence

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("gate", ["read", "place", "prove", "lease"])
async def test_closing_answers_everybody(gate: str) -> None:
    sim = Simulated(max_slots=1)
    await sim.versions.load(sim.write("a", "w1"))
    for name in "bc":
        sim.versions.register(sim.write(name, name))
    held = None
    if gate == "lease":
        held = await sim.lease("a")
    elif gate == "prove":
        sim.prove_gate.clear()
    else:
        (sim.read_gate if gate == "read" else sim.place_gate).clear()
    work = [sim.versions.load(sim.write("d", "w4")), *(sim.versions.lease(name) for name in "bcb")]
    tasks = [asyncio.create_task(one) for one in work]
    await a_while()
    unload = asyncio.create_task(sim.versions.unload("a" if held is not None else "b"))
    late = asyncio.create_task(sim.versions.lease("c"))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.02, sim.read_gate.set)
    asyncio.get_running_loop().call_later(0.02, sim.place_gate.set)
    await sim.versions.close()
    sim.prove_gate.set()
    results = await asyncio.gather(*tasks, unload, late, return_exceptions=True)
    assert all(isinstance(result, NotReadyError) for result in results), results
    with pytest.raises(NotReadyError):
        await sim.versions.lease("a")
    with pytest.raises(NotReadyError):
        await sim.versions.load(source("a"))
    if held is not None:
        sim.give_back(held)  # the engine's last
    await sim.versions.close()
    assert not sim.faults and not sim.tasks._tasks


class Actors:
    """Clients and operators on a few names. What each does, and how long everything takes, comes from the seed; some
    leave at any point."""

    NAMES = "abcd"

    def __init__(self, seed: int, *, in_turns: bool = False) -> None:
        self.random = random.Random(seed)
        self.sim = Simulated(
            max_slots=self.random.choice([1, 2, 3]),
            budget=60,
            host=self.random.choice([0, 25, 1000]),
            seed=seed + 1,
            in_turns=in_turns,
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
                await sim.versions.load(self.rewrite(name), pin=self.random.choice([None, None, True, False]))
            case 2:
                await sim.versions.unload(name)
            case 3:
                await sim.versions.pin(name, self.random.random() < 0.3)
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
            sim.versions.register(source(name))
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
            if any(entry.name == name for entry in sim.names.entries()):
                await sim.versions.pin(name, False) if sim.versions.entry(name).is_pinned else None
        for name in self.NAMES:
            await sim.versions.load(sim.write(name, f"new-{name}"))
            assert await sim.ask(name) == f"new-{name}/"
            await sim.versions.unload(name)
        await sim.quiet()
        assert not sim.slots and not sim.residence.host.num_bytes and not sim.names.entries()
        await sim.versions.close()


@pytest.mark.parametrize("seed", range(60))
async def test_anything_in_any_order(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.residence")
    await Actors(seed, in_turns=True).main()


@pytest.mark.parametrize("seed", range(10))
async def test_anything_in_any_order_in_threads(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.residence")
    await Actors(seed).main()


@pytest.mark.parametrize("seed", range(10))
async def test_closing_at_any_time(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.residence")
    actors = Actors(seed)
    tasks = [asyncio.create_task(actors.actor(100)) for _ in range(6)]
    for _ in range(random.Random(seed).randrange(300)):
        await asyncio.sleep(0)
    await actors.sim.versions.close()
    _, hanging = await asyncio.wait(tasks, timeout=5)
    assert not hanging and not any(task.exception() for task in tasks)
    assert not actors.sim.faults and not actors.sim.tasks._tasks
    check_residence(actors.sim.residence)
