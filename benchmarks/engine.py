"""How fast the engine is, beside PEFT and beside what the machine can do, all in one run.

    python -m benchmarks.engine --json FILE

    python -m benchmarks.engine --vllm .venv-vllm/bin/python     beside vLLM, too

A 116 M-parameter Mistral shape with 16 random adapters, r=16 on all linear layers. Every case runs once a round, in
turn, so that what disturbs the machine disturbs all of them; the figures are medians over the rounds. Tokens/s count
the prompt tokens in the requests, the same for every system.

The floor of a case is the time that its FLOPs take at the rate of plain matrix products of the same shapes, or that
reading its weights once takes at the bandwidth of a copy, whichever is longer. Both are measured in the same rounds, in
the same dtype. The share of roofline is the floor over the time. vLLM's processes would disturb the others' turns, so
its rounds come after theirs.
"""

import argparse
import json
import platform
import statistics
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
from benchmarks.limits import bandwidth, gemm_rate, wait
from benchmarks.shapes import SHAPES, base_config, num_parameters, random_model
from loraplex.adapters.checkpoint import write_lora
from loraplex.model.graphs import Capture, CUDACapture
from loraplex.model.loader import resolve_device, resolve_dtype
from loraplex.model.step_memo import CAPTURED_AT

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
        self.rates.append(gemm_rate(self.shape, self.device, self.dtype))
        self.bandwidths.append(bandwidth(self.device))
        for case in self.cases:
            self.seconds[case.name].append(timed(case, self.device))

    def report(self) -> dict[str, Any]:
        rate, bytes_per_s = statistics.median(self.rates), statistics.median(self.bandwidths)
        cases: dict[str, dict[str, Any]] = {}
        for case in self.cases:
            seconds = self.seconds[case.name]
            median = statistics.median(seconds)
            floor = max(case.work.total / rate, case.work.num_weights * self.dtype.itemsize / bytes_per_s)
            cases[case.name] = {
                "ms": median * 1000,
                "floor_ms": floor * 1000,
                "tokens_per_s": case.num_prompt_tokens / median,
                "gflop": case.work.total / 1e9,
                "share_of_roofline": floor / median,
                "rounds_ms": [round(one * 1000, 2) for one in seconds],
            }
        found = {"gemm_gflops": rate / 1e9, "copied_gbytes_per_s": bytes_per_s / 1e9, "cases": cases}
        return found | {"ratios": ratios({name: one["ms"] for name, one in cases.items()})}


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


def measure_vllm(python: str, texts: Texts, driver: Driver, rounds: int) -> list[float]:
    """Return the seconds of each round of the case "16 adapters mixed". vLLM makes random weights of its own."""
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
        folder.joinpath("job.json").write_text(json.dumps(job))
        subprocess.run([python, "-m", "benchmarks.vllm_peer", str(folder)], stdout=sys.stderr, check=True)
        seconds: list[float] = json.loads((folder / "seconds.json").read_text())
    return seconds


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
    parser.add_argument("--json", type=Path, help="write the report there, too, after every round")
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
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "torch": torch.__version__,
        "parameters_m": round(num_parameters(args.shape) / 1e6),
        "config": base_config(args.shape).to_diff_dict(),
    }
    measurements = Measurements(args.shape, cases, device, dtype)
    measurements.warm_up()
    report: dict[str, Any] = {}

    def write(**more: Any) -> None:
        nonlocal report
        report = report | measurements.report() | about | more
        if captured is not None:
            report["graphs_replayed"] = captured.model.max_captured_tokens > 0  # False: a capture failed
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))

    for _ in track(range(args.rounds), description="rounds", console=Console(stderr=True)):
        measurements.round()
        write()
    if device.type == "cuda":
        write(peak_gib=torch.cuda.max_memory_allocated(device) / 2**30)
    write(profile={case.name: profile(case) for case in cases if is_profiled(case)})
    if args.vllm:
        [mixed] = [case for case in cases if case.name == MIXED]
        vllm = Case(name="vLLM, 16 adapters mixed", num_prompt_tokens=mixed.num_prompt_tokens, work=mixed.work, run=str)
        measurements.cases = [*cases, vllm]
        measurements.seconds[vllm.name] = measure_vllm(args.vllm, texts, driver, args.rounds)
        write()
    _print(report)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{report['device']}, {report['threads']} threads, {report['dtype']}, torch {report['torch']}")
    console.print(
        f"Products of these shapes: {report['gemm_gflops']:.0f} GFLOP/s. "
        f"Copies: {report['copied_gbytes_per_s']:.0f} GB/s."
    )
    table = Table("case", "ms", "floor, ms", "tokens/s", "share of roofline")
    for name, case in report["cases"].items():
        numbers = (f"{case[key]:.{digits}f}" for key, digits in (("ms", 1), ("floor_ms", 1)))
        table.add_row(name, *numbers, f"{case['tokens_per_s']:,.0f}", f"{case['share_of_roofline']:.2f}")
    console.print(table)
    for name, ratio in report["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x")
    for name, parts in report["profile"].items():
        console.print(f"{name}: " + ", ".join(f"{key} {share:.0%}" for key, share in parts))


if __name__ == "__main__":
    main()
