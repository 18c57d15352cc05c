"""What adapters that come and go cost: cold loads, swaps under traffic, and thousands of them on few places.

    python -m benchmarks.adapters --out DIR     writes DIR/report.json

A 6 M-parameter Mistral shape with random adapters, r=8 on all linear layers, asked through the native backend in this
process. Both sides of a comparison run in turn in the same run; the figures are medians over the rounds, and the report
has their spread.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bundles import save_adapters, save_words_base
from benchmarks.rounds import over_rounds
from benchmarks.shapes import SHAPES
from loraplex.bundle import open_bundle
from loraplex.config import EngineConfig
from loraplex.measuring.about import about
from loraplex.measuring.files import write_report
from loraplex.measuring.memory import rss_bytes
from loraplex.measuring.samples import percentile
from loraplex.model.loader import read_config
from loraplex.service.service import Service
from loraplex.service.start import start
from loraplex.types import ClassifyRequest

RANK, NUM_WORDS, ZIPF = 8, 96, 1.1


class Traffic:
    """Closed-loop clients, each of which asks one adapter at a time about a text of its own."""

    def __init__(self, service: Service, vocab_size: int) -> None:
        self._service, self._random, self._vocab_size = service, random.Random(0), vocab_size

    def text(self) -> str:
        return " ".join(f"w{self._random.randrange(self._vocab_size)}" for _ in range(NUM_WORDS))

    async def ask(self, name: str) -> float:
        """Seconds to the verdict."""
        started = time.perf_counter()
        await self._service.classify(ClassifyRequest(input=self.text(), classifiers=(name,)))
        return time.perf_counter() - started

    async def run(self, names: Seq[str], weights: Seq[float], num_requests: int, num_clients: int) -> list[float]:
        """Latencies."""
        todo = iter(self._random.choices(names, weights, k=num_requests))
        latencies: list[float] = []

        async def client() -> None:
            for name in todo:
                latencies.append(await self.ask(name))

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return latencies


def percentiles(latencies: Seq[float]) -> dict[str, float | None]:
    return {name: percentile([1000 * one for one in latencies], share) for name, share in (("p50", 0.5), ("p99", 0.99))}


async def cold_loads(folder: Path, rounds: int) -> dict[str, Any]:
    """First verdict of an adapter that nobody has read, beside its second and one that waits in host memory."""
    config = EngineConfig(dtype="float32", preload="none", max_adapters=4, host_memory="2GiB")
    service = await start(open_bundle(folder), config)
    try:
        traffic = Traffic(service, _vocab_size(folder))
        names = [info.name for info in service.adapters()]
        await traffic.ask(names[-1])
        disk, host, device = [], [], []
        for name in names[:rounds]:
            disk.append(await traffic.ask(name))
            device.append(await traffic.ask(name))
        for name in names[:rounds]:
            host.append(await traffic.ask(name))
    finally:
        await service.close()
    return {
        f"{tier}_ms": over_rounds(1000 * one for one in found)
        for tier, found in (("disk", disk), ("host", host), ("device", device))
    }


async def swaps(folder: Path, num_requests: int) -> dict[str, Any]:
    """Latency of 15 adapters before, while and after a 16th is replaced again and again."""
    service = await start(open_bundle(folder), EngineConfig(dtype="float32", preload="none", host_memory="2GiB"))
    try:
        traffic = Traffic(service, _vocab_size(folder))
        names = [info.name for info in service.adapters()][:16]
        for name in names:
            await traffic.ask(name)
        others, swapped, sources = names[1:], names[0], [str(folder / name) for name in names[:2]]
        num_swaps, is_over = 0, False

        async def swap() -> None:
            nonlocal num_swaps
            while not is_over:
                num_swaps += 1
                await service.load_adapter(swapped, sources[num_swaps % 2])

        found = {}
        for phase in ("before", "during", "after"):
            is_over = False
            task = asyncio.create_task(swap()) if phase == "during" else None
            started = time.perf_counter()
            latencies = await traffic.run(others, [1.0] * len(others), num_requests, 4)
            seconds = time.perf_counter() - started
            is_over = True
            if task is not None:
                await task
            found[phase] = {"latency_ms": percentiles(latencies), "requests_per_s": num_requests / seconds}
    finally:
        await service.close()
    return found | {"swaps": num_swaps}


async def many(folder: Path, num_requests: int, rounds: int, num_places: int) -> dict[str, Any]:
    """Requests/s with Zipf traffic over all adapters, on `num_places` places, against 16 adapters."""
    config = EngineConfig(dtype="float32", preload="none", max_adapters=num_places, host_memory="8GiB")
    service = await start(open_bundle(folder), config)
    try:
        traffic = Traffic(service, _vocab_size(folder))
        names = [info.name for info in service.adapters()]
        zipf = [1 / (rank + 1) ** ZIPF for rank in range(len(names))]
        for name in names:  # into host memory
            await service.version_of(name)
        rates: dict[str, list[float]] = {"16": [], "all": []}
        own = [psutil.Process()]
        loaded = rss_bytes(own)
        for _ in range(rounds):
            for key, some, weights in (("16", names[:16], zipf[:16]), ("all", names, zipf)):
                started = time.perf_counter()
                await traffic.run(some, weights, num_requests, 16)
                rates[key].append(num_requests / (time.perf_counter() - started))
        after = rss_bytes(own)
        for name in names:
            await service.unload_adapter(name)
        unloaded = rss_bytes(own)
    finally:
        await service.close()
    return {
        "adapters": len(names),
        "places": num_places,
        "requests_per_s_16": over_rounds(rates["16"]),
        "requests_per_s_all": over_rounds(rates["all"]),
        "ratio": over_rounds(b / a for a, b in zip(rates["16"], rates["all"], strict=True)),
        "memory": {"loaded_rss_bytes": loaded, "after_traffic_rss_bytes": after, "all_unloaded_rss_bytes": unloaded},
    }


def _vocab_size(folder: Path) -> int:
    return int(read_config(folder).vocab_size)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        layers = save_words_base(args.shape, folder)
        save_adapters(folder, layers, [f"a{index:04}" for index in range(args.adapters)], rank=RANK)
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        return {
            "format": 1,
            "kind": "adapters",
            "about": about(torch.device("cpu"), torch.float32) | {"settings": settings | {"rank": RANK, "zipf": ZIPF}},
            "adapter_bytes": (folder / "a0000" / "adapter_model.safetensors").stat().st_size,
            "many": await many(folder, args.requests, args.rounds, args.places),
            "cold": await cold_loads(folder, min(20, args.adapters - 1)),
            "swaps": await swaps(folder, args.requests),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/report.json")
    parser.add_argument("--shape", choices=list(SHAPES), default="6M")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--requests", type=int, default=400, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    report = asyncio.run(measure(args))
    _print(report)
    if args.out:
        write_report(args.out / "report.json", report)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    many, cold, swaps = report["many"], report["cold"], report["swaps"]
    all_s, some_s, ratio = (many[key]["median"] for key in ("requests_per_s_all", "requests_per_s_16", "ratio"))
    console.print(
        f"{many['adapters']} adapters of {report['adapter_bytes'] / 2**20:.2f} MiB on {many['places']} places, "
        f"Zipf {ZIPF}: {all_s:.1f} requests/s, 16 adapters: {some_s:.1f} ({ratio:.2f}x)"
    )
    memory = (f"{key.removesuffix('_rss_bytes')} {value / 2**20:.0f}" for key, value in many["memory"].items())
    console.print("resident MiB: " + ", ".join(memory))
    tiers = (f"{key.removesuffix('_ms')} {value['median']:.1f} ms" for key, value in cold.items())
    console.print("first verdict from " + ", ".join(tiers))
    table = Table("others' latency", "p50 ms", "p99 ms", "requests/s")
    for phase in ("before", "during", "after"):
        row = swaps[phase]
        table.add_row(phase, *(f"{one:.1f}" for one in (*row["latency_ms"].values(), row["requests_per_s"])))
    console.print(table)
    console.print(f"{swaps['swaps']} swaps during")


if __name__ == "__main__":
    main()
