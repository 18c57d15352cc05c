"""What adapters that come and go cost: cold loads, swaps under traffic, and thousands of them on few places.

    python -m benchmarks.adapters --json FILE

A 6 M-parameter Mistral shape with random adapters, r=8 on all linear layers, asked through the native backend in this
process. Both sides of a comparison run in turn in the same run; the figures are medians over the rounds.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.shapes import SHAPES, save_base
from loraplex.bundle import open_bundle
from loraplex.config import EngineConfig
from loraplex.model.loader import base_layers, build_skeleton, read_config
from loraplex.service.service import Service
from loraplex.service.start import start
from loraplex.types import ClassifyRequest

RANK, NUM_WORDS, ZIPF = 8, 96, 1.1


def save_bundle(folder: Path, shape: str, num_adapters: int) -> None:
    save_base(shape, folder, torch.float32)
    vocabulary = {f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    layers = base_layers(build_skeleton(read_config(folder), folder)).linear
    for index in range(num_adapters):
        save_adapter(folder / f"a{index:04}", layers, index)


def save_adapter(folder: Path, layers: Any, seed: int) -> None:
    """As PEFT writes it."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out, n) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, n, generator=generator) / n**0.5
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 30
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    (folder / "adapter_config.json").write_text(json.dumps(config))


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


def quantiles(latencies: Seq[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    return {
        f"p{percent}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000, 1)
        for percent in (50, 99)
    }


def rss_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


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
        f"{tier}_ms": round(statistics.median(found) * 1000, 1)
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
            found[phase] = quantiles(latencies) | {"requests_per_s": round(num_requests / seconds, 1)}
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
        before = rss_mib()
        for _ in range(rounds):
            for key, some, weights in (("16", names[:16], zipf[:16]), ("all", names, zipf)):
                started = time.perf_counter()
                await traffic.run(some, weights, num_requests, 16)
                rates[key].append(num_requests / (time.perf_counter() - started))
        after = rss_mib()
        for name in names:
            await service.unload_adapter(name)
        unloaded = rss_mib()
    finally:
        await service.close()
    return {
        "adapters": len(names),
        "places": num_places,
        "requests_per_s_16": round(statistics.median(rates["16"]), 1),
        "requests_per_s_all": round(statistics.median(rates["all"]), 1),
        "ratio": round(statistics.median(b / a for a, b in zip(rates["16"], rates["all"], strict=True)), 3),
        "rss_mib": {"loaded": round(before), "after_traffic": round(after), "all_unloaded": round(unloaded)},
    }


def _vocab_size(folder: Path) -> int:
    return int(read_config(folder).vocab_size)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_bundle(folder, args.shape, args.adapters)
        return {
            "many": await many(folder, args.requests, args.rounds, args.places),
            "cold": await cold_loads(folder, min(20, args.adapters - 1)),
            "swaps": await swaps(folder, args.requests),
            "adapter_mib": round((folder / "a0000" / "adapter_model.safetensors").stat().st_size / 2**20, 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report there, too")
    parser.add_argument("--shape", choices=list(SHAPES), default="6M")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--places", type=int, default=64)
    parser.add_argument("--requests", type=int, default=400, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    report = asyncio.run(measure(args))
    _print(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def _print(report: dict[str, Any]) -> None:
    console = Console()
    many, cold, swaps = report["many"], report["cold"], report["swaps"]
    console.print(
        f"{many['adapters']} adapters of {report['adapter_mib']} MiB on {many['places']} places, Zipf {ZIPF}: "
        f"{many['requests_per_s_all']} requests/s, 16 adapters: {many['requests_per_s_16']} ({many['ratio']}x)"
    )
    console.print("resident MiB: " + ", ".join(f"{key} {value}" for key, value in many["rss_mib"].items()))
    console.print("first verdict from " + ", ".join(f"{key[:-3]} {value} ms" for key, value in cold.items()))
    table = Table("others' latency", "p50 ms", "p99 ms", "requests/s")
    for phase in ("before", "during", "after"):
        row = swaps[phase]
        table.add_row(phase, str(row["p50_ms"]), str(row["p99_ms"]), str(row["requests_per_s"]))
    console.print(table)
    console.print(f"{swaps['swaps']} swaps during")


if __name__ == "__main__":
    main()
