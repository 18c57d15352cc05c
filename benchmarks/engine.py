"""How fast the engine is, beside PEFT and beside what the machine can do, all in one run.

    python -m benchmarks.engine --out DIR     writes DIR/report.json

    python -m benchmarks.engine --vllm .venv-vllm/bin/python     beside vLLM, too

A 116 M-parameter Mistral shape with 16 random adapters, r=16 on all linear layers. Every case runs once a round, in
turn, so that what disturbs the machine disturbs all of them; the figures are medians over the rounds, and the report
has their spread and every round. Tokens/s count the prompt tokens in the requests, the same for every system.

The floor of a case is the time that its FLOPs take at the rate of plain matrix products of the same shapes, or that
reading its weights, keys and values once takes at the bandwidth of a copy, whichever is longer. Both are measured in
the same rounds, in the same dtype. The share of roofline is the floor over the time. vLLM's processes would disturb the
others' turns, so its rounds come after theirs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cases import MIXED, NUM_TEXTS, Case, Texts, engine_cases, peft_cases, shared_cases
from benchmarks.driver import NUM_ADAPTERS, Driver
from benchmarks.rounds import over_rounds
from benchmarks.shapes import SHAPES, base_config, layer_sizes, num_parameters, random_model
from loraplex.adapters.checkpoint import write_lora
from loraplex.measuring.about import about
from loraplex.measuring.files import write_report
from loraplex.measuring.limits import bandwidth, gemm_rate, wait
from loraplex.measuring.memory import peak_rss_bytes
from loraplex.model.graphs import Capture, CUDACapture
from loraplex.model.loader import resolve_device, resolve_dtype
from loraplex.model.step_memo import CAPTURED_AT

ROOT = Path(__file__).parent.parent
GRAPHS = ", CUDA graphs"  # ends the names of the cases that replay graphs


class NoCapture:
    """A Capture for a CPU, where nothing is captured: each call computes the function again."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        return function

    def prove_over(self) -> None:
        """Nothing has begun."""


def timed(case: Case, device: torch.device) -> float:
    state = case.prepare()
    wait(device)
    started = time.perf_counter()
    case.run(state)
    wait(device)
    return time.perf_counter() - started


class Measurements:
    """The seconds of every case in every round, and the machine's limits in the same rounds."""

    def __init__(self, shape: str, cases: Seq[Case], device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.cases, self.device, self.dtype = shape, cases, device, dtype
        self.seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        self.rates: list[float] = []
        self.bandwidths: list[float] = []

    def warm_up(self) -> None:
        """Run every case until it is as fast as it gets: first use, and captured graphs."""
        for case in self.cases:
            for _ in range(CAPTURED_AT if case.name.endswith(GRAPHS) or self.device.type == "cuda" else 1):
                timed(case, self.device)

    def round(self) -> None:
        self.rates.append(gemm_rate(layer_sizes(self.shape), self.device, self.dtype))
        self.bandwidths.append(bandwidth(self.device))
        for case in self.cases:
            self.seconds[case.name].append(timed(case, self.device))

    def report(self) -> dict[str, Any]:
        rate, copied = over_rounds(self.rates), over_rounds(self.bandwidths)
        cases: dict[str, dict[str, Any]] = {}
        for case in self.cases:
            found = over_rounds(1000 * one for one in self.seconds[case.name])
            seconds = found["median"] / 1000
            floor = case.work.seconds(rate["median"], copied["median"], self.dtype.itemsize)
            cases[case.name] = {
                "ms": found,
                "floor_ms": floor * 1000,
                "tokens_per_s": case.num_prompt_tokens / seconds,
                "flop": case.work.total,
                "share_of_roofline": floor / seconds,
                "rounds_ms": [1000 * one for one in self.seconds[case.name]],
            }
        return {
            "limits": {"gemm_flops_per_s": rate, "bytes_per_s": copied},
            "cases": cases,
            "ratios": ratios({name: one["ms"]["median"] for name, one in cases.items()}),
            "memory": {
                "peak_rss_bytes": peak_rss_bytes(),
                "peak_device_bytes": torch.cuda.max_memory_allocated(self.device)
                if self.device.type == "cuda"
                else None,
            },
        }


def ratios(ms: dict[str, float]) -> dict[str, float]:
    pairs = {
        "16 mixed / base only (speed)": ("base only", MIXED),
        "shared / plain, 16 verdicts": ("16 verdicts, plain", "16 verdicts, shared"),
        "shared / plain, next turn": ("next turn, plain", "next turn, shared"),
        "16 mixed / PEFT one by one": ("PEFT one by one", MIXED),
        "16 mixed / PEFT mixed batch": ("PEFT mixed batch", MIXED),
        "16 mixed / vLLM": ("vLLM, 16 adapters mixed", MIXED),
        "CUDA graphs / none, 16 verdicts": ("16 verdicts, shared", "16 verdicts, shared" + GRAPHS),
        "CUDA graphs / none, next turn": ("next turn, shared", "next turn, shared" + GRAPHS),
    }
    return {name: ms[slow] / ms[fast] for name, (slow, fast) in pairs.items() if slow in ms and fast in ms}


def measure_vllm(python: str, texts: Texts, driver: Driver, rounds: int) -> dict[str, Any]:
    """Return the seconds of each round of the case "16 adapters mixed", and vLLM's version. vLLM makes random weights
    of its own."""
    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base_config(texts.shape).save_pretrained(folder)
        for name, adapter in zip(names, driver.adapters, strict=True):
            folder.joinpath(name).mkdir()
            write_lora(folder / name, adapter)
        job = {
            "texts": texts.mixed,
            "adapters": [names[i % NUM_ADAPTERS] for i in range(NUM_TEXTS)],
            "dtype": str(driver.model.dtype).removeprefix("torch."),
            "rounds": rounds,
        }
        write_report(folder / "job.json", job)
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        command = [python, "-m", "benchmarks.vllm_peer", str(folder)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=sys.stderr, check=True)
        found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def profile(case: Case) -> list[tuple[str, float]]:
    """Return where the time of a step goes: (operator or kernel, share), the ten largest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    state = case.prepare()
    with torch_profile(activities=activities) as found:
        case.run(state)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [(event.key, getattr(event, key) / total) for event in events[:10]]


def is_profiled(case: Case) -> bool:
    return not any(word in case.name for word in ("plain", "PEFT", GRAPHS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write DIR/report.json, anew after every round", metavar="DIR")
    parser.add_argument("--shape", choices=list(SHAPES), default="116M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="measure the small steps with CUDA graphs, too; on a CPU a rehearsal"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM: measure it, too")
    args = parser.parse_args()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    texts, base = Texts(args.shape), random_model(args.shape, dtype, device)
    driver = Driver(base, device)
    cases = engine_cases(texts, driver)
    captured = None
    if args.cuda_graphs:
        capture: Capture = CUDACapture(device) if device.type == "cuda" else NoCapture()
        captured = Driver(base, device, capture)
        cases += shared_cases(texts, captured, GRAPHS)
    if not args.no_peft:
        cases += peft_cases(texts, base)
    del base
    head = about(device, dtype) | {
        "settings": {
            "shape": args.shape,
            "parameters": num_parameters(args.shape),
            "config": base_config(args.shape).to_diff_dict(),
            "rounds": args.rounds,
            "cuda_graphs": args.cuda_graphs,
            "peft": not args.no_peft,
        }
    }
    measurements = Measurements(args.shape, cases, device, dtype)
    measurements.warm_up()
    report: dict[str, Any] = {}

    def write(**more: Any) -> None:
        nonlocal report
        report = {"format": 1, "kind": "engine", "about": head} | report | measurements.report() | more
        if captured is not None:
            report["graphs_replayed"] = captured.model.max_captured_tokens > 0  # False: a capture failed
        if args.out:
            write_report(args.out / "report.json", report)

    for _ in track(range(args.rounds), description="rounds", console=Console(stderr=True)):
        measurements.round()
        write()
    write(profile={case.name: profile(case) for case in cases if is_profiled(case)})
    if args.vllm:
        [mixed] = [case for case in cases if case.name == MIXED]
        vllm = Case(name="vLLM, 16 adapters mixed", num_prompt_tokens=mixed.num_prompt_tokens, work=mixed.work, run=str)
        measurements.cases = [*cases, vllm]
        found = measure_vllm(args.vllm, texts, driver, args.rounds)
        measurements.seconds[vllm.name] = found["seconds"]
        write(vllm=found["version"])
    _print(report)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    head, limits = report["about"], report["limits"]
    console.print(f"{head['device']}, {head['threads']} threads, {head['dtype']}, torch {head['versions']['torch']}")
    console.print(
        f"Products of these shapes: {limits['gemm_flops_per_s']['median'] / 1e9:.0f} GFLOP/s. "
        f"Copies: {limits['bytes_per_s']['median'] / 1e9:.0f} GB/s. "
        f"Most memory: {report['memory']['peak_rss_bytes'] / 1e9:.1f} GB."
    )
    table = Table("case", "ms", "lowest to highest", "floor, ms", "tokens/s", "share of roofline")
    for name, case in report["cases"].items():
        ms = case["ms"]
        numbers = f"{ms['median']:.1f}", f"{ms['low']:.1f} to {ms['high']:.1f}", f"{case['floor_ms']:.1f}"
        table.add_row(name, *numbers, f"{case['tokens_per_s']:,.0f}", f"{case['share_of_roofline']:.2f}")
    console.print(table)
    for name, ratio in report["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x")
    for name, parts in report["profile"].items():
        console.print(f"{name}: " + ", ".join(f"{key} {share:.0%}" for key, share in parts))


if __name__ == "__main__":
    main()
