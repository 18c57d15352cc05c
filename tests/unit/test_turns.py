"""Kinds that are never in together, and nobody left outside."""

import asyncio
import random
from collections import Counter

import pytest

from loraplex.executors.turns import Turns


def test_one_kind_is_in_together_and_two_never() -> None:
    turns, inside, most = Turns(), Counter[str](), 0

    async def visit(kind: str, seed: int) -> None:
        nonlocal most
        draw = random.Random(seed)
        await asyncio.sleep(draw.random() / 100)
        async with turns.turn(kind):
            inside[kind] += 1
            most = max(most, inside[kind])
            assert set(+inside) == {kind}
            await asyncio.sleep(draw.random() / 200)
            inside[kind] -= 1

    async def run() -> None:
        async with asyncio.timeout(10):
            await asyncio.gather(*(visit("abc"[i % 3], i) for i in range(200)))

    asyncio.run(run())
    assert most > 1


def test_a_kind_that_keeps_coming_does_not_keep_another_out() -> None:
    turns, order = Turns(), list[str]()

    async def visit(kind: str) -> None:
        async with turns.turn(kind):
            order.append(kind)
            await asyncio.sleep(0.01)

    async def run() -> None:
        tasks = [asyncio.create_task(visit("many"))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(visit("one")))
        for _ in range(20):
            await asyncio.sleep(0.002)
            tasks.append(asyncio.create_task(visit("many")))
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order.index("one") == 1


@pytest.mark.parametrize("is_admitted", [False, True])
def test_who_is_cancelled_while_it_waits_takes_nobodys_place(is_admitted: bool) -> None:
    """is_admitted: in the same moment in which it was let in, before it could know."""
    turns = Turns()

    async def wait_inside() -> None:
        async with turns.turn("b"):
            await asyncio.Event().wait()

    async def run() -> None:
        async with turns.turn("a"):
            waiting = asyncio.create_task(wait_inside())
            await asyncio.sleep(0)
            if not is_admitted:
                waiting.cancel()
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        async with asyncio.timeout(1):
            for kind in "cab":
                async with turns.turn(kind):
                    pass

    asyncio.run(run())
