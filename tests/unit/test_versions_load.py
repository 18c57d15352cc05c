"""Versions that are loaded, proven and fail, against a simulated disk and device."""

import asyncio
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.errors import (
    AdapterError,
    ContractError,
    EngineError,
    LoraplexError,
    QueueFullError,
    UnknownClassifierError,
)
from simulated import Files, Simulated, a_while, bad, broken, out_of_memory, settle, source

pytestmark = pytest.mark.anyio


async def test_it_is_loaded_once_however_many_wait() -> None:
    sim = Simulated()
    sim.versions.register(sim.write("a", "w1"))
    assert sim.state("a") == "registered" and sim.num_reads == 0
    sim.read_gate.clear()
    asked = [asyncio.create_task(sim.ask("a")) for _ in range(50)]
    await settle(lambda: sim.state("a") == "loading")
    sim.read_gate.set()
    assert set(await asyncio.gather(*asked)) == {"w1/"}
    assert sim.num_reads == sim.residence.num_reads == 1 and sim.state("a") == "ready"
    await sim.quiet()


async def test_requests_wait_for_an_explicit_load_and_do_not_load_again() -> None:
    sim = Simulated()
    sim.read_gate.clear()
    load = asyncio.create_task(sim.versions.load(sim.write("a", "w1")))
    await settle(lambda: sim.names.entries())
    asked = [asyncio.create_task(sim.ask("a")) for _ in range(5)]
    await a_while()
    sim.read_gate.set()
    await load
    assert set(await asyncio.gather(*asked)) == {"w1/"} and sim.num_reads == 1
    await sim.quiet()


async def test_an_adapter_on_its_way_into_its_slot_is_not_leased() -> None:
    """Its slot is its own from the start, and empty: answers would be the base's."""
    sim = Simulated(max_slots=1)
    await sim.versions.load(sim.write("a", "w1"))
    await sim.versions.load(sim.write("b", "w2"))
    sim.place_gate.clear()
    first = asyncio.create_task(sim.ask("a"))
    await settle(lambda: "w1" in sim.residence.slots)
    assert sim.versions.try_lease("a") is None
    second = asyncio.create_task(sim.ask("a"))
    await a_while()
    assert not second.done()
    sim.place_gate.set()
    assert list(await asyncio.gather(first, second)) == ["w1/", "w1/"]
    await sim.quiet()


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
async def test_a_failing_load_leaves_the_old_version(
    break_it: Callable[[Simulated], None], kind: type[LoraplexError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "loraplex.adapters.residence")  # pytest keeps what is logged, frames and all
    sim = Simulated()
    a = sim.write("a", "w1")
    await sim.versions.load(a)
    break_it(sim)
    with pytest.raises(kind) as raised:
        await sim.versions.load(a)
    entry = sim.versions.entry("a")
    assert entry.state == "ready" and entry.error is not None and str(entry.error) == str(raised.value)
    sim.place_error = None
    assert await sim.ask("a") == "w1/" and list(sim.slots.values()) == ["w1"]
    await sim.quiet()
    del raised
    await a_while()  # the thread lets go of it, too
    gc.collect()
    assert [one.kv_id for one in sim.weights] == ["w1"], "the error holds the frames that hold the weights"
    sim.write("a", "w3")
    assert (await sim.versions.load(a)).error is None and await sim.ask("a") == "w3/"
    await sim.quiet()


@pytest.mark.parametrize("break_it", [break_read, break_prove, break_place, break_size])
async def test_a_name_whose_first_load_failed_is_unknown(break_it: Callable[[Simulated], None]) -> None:
    sim = Simulated()
    break_it(sim)
    with pytest.raises(LoraplexError):
        await sim.versions.load(source("a"))
    with pytest.raises(UnknownClassifierError):
        await sim.versions.lease("a")
    await sim.quiet()
    assert not sim.names.entries() and not sim.slots and not sim.residence.host.num_bytes
    sim.place_error, sim.prove_errors = None, {}
    await sim.versions.load(sim.write("a", "w1"))
    assert await sim.ask("a") == "w1/"
    await sim.quiet()


async def test_a_second_load_of_a_new_name_outlives_the_failure_of_the_first() -> None:
    sim = Simulated()
    sim.read_gate.clear()
    sim.write("bad", bad())
    first = asyncio.create_task(sim.versions.load(replace(source("a"), path=Path("bad"))))
    second = asyncio.create_task(sim.versions.load(sim.write("a", "w1")))
    await a_while()
    sim.read_gate.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert isinstance(results[0], AdapterError)
    assert await sim.ask("a") == "w1/" and results[1] is sim.versions.entry("a")
    await sim.quiet()


async def test_a_lazy_load_that_fails_keeps_its_error_until_somebody_loads_it() -> None:
    sim = Simulated()
    a = sim.write("a", bad())
    sim.versions.register(a)
    for _ in range(3):
        with pytest.raises(AdapterError, match="is broken") as raised:
            await sim.versions.lease("a")
    assert sim.num_reads == 1
    entry = sim.versions.entry("a")
    assert sim.state("a") == "failed" and entry.error is not raised.value
    assert entry.error is not None and entry.error.__traceback__ is None, "it grows with every request"
    sim.write("a", "w1")
    await sim.versions.load(a)
    assert sim.state("a") == "ready" and entry.error is None and await sim.ask("a") == "w1/"
    await sim.quiet()


async def test_a_lazy_load_that_failed_for_the_moment_is_tried_again() -> None:
    sim = Simulated()
    sim.versions.register(sim.write("a", "w1"))
    sim.prove_errors["w1/"] = QueueFullError("full", remedy="later")
    with pytest.raises(QueueFullError):
        await sim.ask("a")
    assert sim.versions.entry("a").state == "failed"
    sim.prove_errors.clear()
    sim.place_error = out_of_memory
    with pytest.raises(EngineError, match="out of memory"):
        await sim.ask("a")
    sim.place_error = None
    assert await sim.ask("a") == "w1/" and sim.versions.entry("a").error is None
    await sim.quiet()


async def test_what_was_registered_with_an_error_is_not_read() -> None:
    sim = Simulated()
    sim.versions.register(source("a"), broken())
    with pytest.raises(AdapterError, match="is broken"):
        await sim.versions.lease("a")
    assert sim.state("a") == "failed" and sim.num_reads == 0
    await sim.quiet()


async def test_a_failing_replacement_of_what_was_not_read_yet_does_not_break_it() -> None:
    sim = Simulated()
    sim.versions.register(sim.write("a", "w1"))
    sim.write("bad", bad())
    with pytest.raises(AdapterError):
        await sim.versions.load(replace(source("a"), path=Path("bad")))
    assert await sim.ask("a") == "w1/"
    await sim.quiet()
