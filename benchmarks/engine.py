"""How fast the engine is, beside PEFT and beside what the machine can do, all in one run.

    python -m benchmarks.engine --json FILE

    python -m benchmarks.engine --vllm .venv-vllm/bin/python     beside vLLM, too

A 116 M-parameter Mistral shape with 16 random adapters, r=16 on all linear layers. Every case runs once a round, in
turn, so that what disturbs the machine disturbs all of them; the figures are medians over the rounds. Tokens/s count
the prompt tokens that were asked for, the same for every system. Share of roofline: FLOPs of the work over the time,
over the GEMM rate of this model's shapes, in the dtype that is served, measured in the same rounds. vLLM's processes
would disturb the others' turns, so its rounds come after theirs.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.shapes import SHAPES, Work, base_config, num_parameters, random_adapter, save_base, work
from loraplex.adapters.checkpoint import write_lora
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.block_pool import BASE_KV, BLOCK_SIZE, BlockPool
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput, Target
from loraplex.model.graphs import CUDACapture
from loraplex.model.loader import (
    default_step_tokens,
    load_model,
    read_config,
    read_layers,
    resolve_device,
    resolve_dtype,
)
from loraplex.model.step_memo import CAPTURED_AT

RANK, NUM_ADAPTERS = 16, 16
NUM_TEXTS, TEXT_TOKENS = 32, 256
CONVERSATION, SUFFIX, NEW_TURN = 500, 12, 40
LABELS = (Target(position=-1, token_id=1), Target(position=-1, token_id=2))


class Bench:
    """A runner and a scheduler driven without threads."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, cuda_graphs: bool = False) -> None:
        config = read_config(folder)
        layers, _ = read_layers(config, folder)
        self.adapters = [random_adapter(layers, RANK, seed + 1) for seed in range(NUM_ADAPTERS)]
        self.model = load_model(config, folder, dtype, device, CUDACapture(device) if cuda_graphs else None)
        self.max_step_tokens = default_step_tokens(device, dtype, config)
        self.runner = ModelRunner(self.model)
        self.runner.verify_packing()
        for slot, adapter in enumerate(self.adapters):
            self.model.set_slot(slot, adapter)
        self.model.allocate_cache(4096 * BLOCK_SIZE)

    def scheduler(self) -> Scheduler:
        return Scheduler(
            max_step_tokens=self.max_step_tokens,
            max_step_sequences=512,
            pool=BlockPool(4096),
        )

    def sequence(self, tokens: Seq[int], slot: int, activation: int = 0) -> Sequence:
        kv_id = BASE_KV if slot == NO_ADAPTER else bytes.fromhex(self.adapters[slot].kv_id)
        return Sequence(
            token_ids=tuple(tokens), slot=slot, kv_id=kv_id, activation=activation, num_kept=activation, targets=LABELS
        )

    def run(self, scheduler: Scheduler, requests: Iterable[Seq[Sequence]]) -> list[SequenceOutput]:
        for sequences in requests:
            scheduler.add(EngineRequest(sequences), 0.0)
        outputs: list[SequenceOutput] = []
        while True:
            step, _ = scheduler.next_step(0.0)
            if step is None:
                return outputs
            outputs += [outcome for _, outcome in self.runner.run(step) if isinstance(outcome, SequenceOutput)]
            scheduler.finish(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`prepare` is not timed and gives what `run` takes."""

    name: str
    num_prompt_tokens: int
    work: Work
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def gemm_rate(shape: str, device: torch.device, dtype: torch.dtype, num_rows: int = 2048) -> float:
    """FLOP/s of the layers' matrix products, each weighted by its share of the model."""
    s = SHAPES[shape]
    h, i, kv = (
        s["hidden_size"],
        s["intermediate_size"],
        s["hidden_size"] * s["num_key_value_heads"] // s["num_attention_heads"],
    )
    flops = seconds = 0.0
    for n, out, count in ((h, h, 2), (h, kv, 2), (h, i, 2), (i, h, 1)):
        x = torch.randn(num_rows, n, dtype=dtype, device=device)
        weight = torch.randn(out, n, dtype=dtype, device=device)
        for timed in (False, True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(5):
                torch.nn.functional.linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if timed:
                seconds += count * (time.perf_counter() - started) / 5
                flops += count * 2 * num_rows * n * out
    return flops / seconds


def mixed_texts(shape: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SHAPES[shape]["vocab_size"], (NUM_TEXTS, TEXT_TOKENS), generator=generator).tolist()


def cases(
    shape: str, folder: Path, bench: Bench, device: torch.device, dtype: torch.dtype, with_peft: bool
) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = SHAPES[shape]["vocab_size"]

    def text(num_tokens: int) -> list[int]:
        return torch.randint(3, vocab_size, (num_tokens,), generator=generator).tolist()

    texts = mixed_texts(shape)
    total = NUM_TEXTS * TEXT_TOKENS
    keys = NUM_TEXTS * TEXT_TOKENS * (TEXT_TOKENS + 1) // 2
    base_work, mixed_work = (
        work(shape, num_tokens=total, num_adapted=n, rank=RANK, num_visible_keys=keys, num_logit_rows=NUM_TEXTS)
        for n in (0, total)
    )

    def packed(slot_of: Callable[[int], int]) -> Callable[[Any], object]:
        return lambda _: bench.run(
            bench.scheduler(), ([bench.sequence(tokens, slot_of(i))] for i, tokens in enumerate(texts))
        )

    conversation, new = text(CONVERSATION), text(NEW_TURN)
    suffixes = [text(SUFFIX) for _ in range(NUM_ADAPTERS)]

    def verdicts(conversation: Seq[int], shared: bool) -> list[Sequence]:
        n = len(conversation) if shared else 0
        return [bench.sequence((*conversation, *suffix), slot, n) for slot, suffix in enumerate(suffixes)]

    def verdicts_work(num_old: int, num_new: int, shared: bool) -> Work:
        """On `num_old` tokens that are known already, `num_new` that are not, and the suffixes."""
        n = num_old + num_new
        own = NUM_ADAPTERS * (SUFFIX * n + SUFFIX * (SUFFIX + 1) // 2)
        times = 1 if shared else NUM_ADAPTERS
        return work(
            shape,
            num_tokens=times * num_new + NUM_ADAPTERS * SUFFIX,
            num_adapted=NUM_ADAPTERS * (SUFFIX + (0 if shared else num_new)),
            rank=RANK,
            num_visible_keys=own + times * (num_new * num_old + num_new * (num_new + 1) // 2),
            num_logit_rows=NUM_ADAPTERS,
        )

    def after_first_turn() -> Scheduler:
        scheduler = bench.scheduler()
        bench.run(scheduler, [verdicts(conversation, True)])
        return scheduler

    first, second = NUM_ADAPTERS * (CONVERSATION + SUFFIX), NUM_ADAPTERS * (CONVERSATION + NEW_TURN + SUFFIX)
    longer = conversation + new
    found = [
        Case(name="base only", num_prompt_tokens=total, work=base_work, run=packed(lambda i: NO_ADAPTER)),
        Case(
            name="16 adapters mixed", num_prompt_tokens=total, work=mixed_work, run=packed(lambda i: i % NUM_ADAPTERS)
        ),
        Case(
            name="16 verdicts, plain",
            num_prompt_tokens=first,
            work=verdicts_work(0, CONVERSATION, False),
            run=lambda _: bench.run(bench.scheduler(), [verdicts(conversation, False)]),
        ),
        Case(
            name="16 verdicts, shared",
            num_prompt_tokens=first,
            work=verdicts_work(0, CONVERSATION, True),
            run=lambda _: bench.run(bench.scheduler(), [verdicts(conversation, True)]),
        ),
        Case(
            name="next turn, plain",
            num_prompt_tokens=second,
            work=verdicts_work(0, CONVERSATION + NEW_TURN, False),
            run=lambda _: bench.run(bench.scheduler(), [verdicts(longer, False)]),
        ),
        Case(
            name="next turn, shared",
            num_prompt_tokens=second,
            work=verdicts_work(CONVERSATION // 16 * 16, NEW_TURN + CONVERSATION % 16, True),
            prepare=after_first_turn,
            run=lambda scheduler: bench.run(scheduler, [verdicts(longer, True)]),
        ),
    ]
    if with_peft:
        found += peft_cases(folder, texts, mixed_work, device, dtype)
    return found


def peft_cases(
    folder: Path, texts: list[list[int]], mixed_work: Work, device: torch.device, dtype: torch.dtype
) -> list[Case]:
    """PEFT as its users run it: one adapter after the other, and its mixed batch; last position's logits only."""
    from transformers import AutoModelForCausalLM

    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base.to(device), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    model.to(dtype).eval()
    ids = torch.tensor(texts, device=device)

    @torch.inference_mode()
    def one_by_one(_: Any) -> None:
        for i in range(len(texts)):
            model.set_adapter(names[i % NUM_ADAPTERS])
            model(input_ids=ids[i : i + 1], use_cache=False, logits_to_keep=1).logits.log_softmax(-1)

    @torch.inference_mode()
    def mixed(_: Any) -> None:
        model.set_adapter(names[0])
        adapter_names = [names[i % NUM_ADAPTERS] for i in range(len(texts))]
        model(input_ids=ids, use_cache=False, logits_to_keep=1, adapter_names=adapter_names).logits.log_softmax(-1)

    total = len(texts) * len(texts[0])
    return [
        Case(name="PEFT one by one", num_prompt_tokens=total, work=mixed_work, run=one_by_one),
        Case(name="PEFT mixed batch", num_prompt_tokens=total, work=mixed_work, run=mixed),
    ]


def timed(case: Case, device: torch.device) -> float:
    state = case.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    case.run(state)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(shape: str, all_cases: Seq[Case], rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {case.name: [] for case in all_cases}
    rates = []
    for case in all_cases:
        for _ in range(CAPTURED_AT if device.type == "cuda" else 1):  # not counted: first use, what is captured
            timed(case, device)
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        rates.append(gemm_rate(shape, device, dtype))
        for case in all_cases:
            seconds[case.name].append(timed(case, device))
    rate = statistics.median(rates)
    report: dict[str, Any] = {"gemm_gflops": rate / 1e9, "cases": {}}
    for case in all_cases:
        report["cases"][case.name] = figures(case, seconds[case.name], rate)
    return report


def figures(case: Case, seconds: Seq[float], rate: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "ms": median * 1000,
        "tokens_per_s": case.num_prompt_tokens / median,
        "gflop": case.work.total / 1e9,
        "share_of_roofline": case.work.total / median / rate,
        "rounds_ms": [round(one * 1000, 1) for one in seconds],
    }


def measure_vllm(python: str, shape: str, folder: Path, bench: Bench, rounds: int) -> list[float]:
    """Seconds of each round of the case "16 adapters mixed"."""
    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    for name, adapter in zip(names, bench.adapters, strict=True):
        folder.joinpath(name).mkdir()
        write_lora(folder / name, adapter)
    job = {
        "texts": mixed_texts(shape),
        "adapters": [names[i % NUM_ADAPTERS] for i in range(NUM_TEXTS)],
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "rounds": rounds,
    }
    folder.joinpath("job.json").write_text(json.dumps(job))
    subprocess.run([python, "-m", "benchmarks.vllm_peer", str(folder)], stdout=sys.stderr, check=True)
    seconds: list[float] = json.loads((folder / "seconds.json").read_text())
    return seconds


def ratios(report: dict[str, Any]) -> dict[str, float]:
    ms = {name: case["ms"] for name, case in report["cases"].items()}
    pairs = {
        "16 mixed / base only (speed)": ("base only", "16 adapters mixed"),
        "shared / plain, 16 verdicts": ("16 verdicts, plain", "16 verdicts, shared"),
        "shared / plain, next turn": ("next turn, plain", "next turn, shared"),
        "16 mixed / PEFT one by one": ("PEFT one by one", "16 adapters mixed"),
        "16 mixed / PEFT mixed batch": ("PEFT mixed batch", "16 adapters mixed"),
        "16 mixed / vLLM": ("vLLM, 16 adapters mixed", "16 adapters mixed"),
    }
    return {name: ms[slow] / ms[fast] for name, (slow, fast) in pairs.items() if slow in ms and fast in ms}


def profile(bench: Bench, case: Case) -> list[tuple[str, float]]:
    """Where the time of a step goes: (operator, share), the ten largest."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report there, too")
    parser.add_argument("--shape", choices=list(SHAPES), default="116M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true", help="capture small steps, as `loraplex serve` does")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM: measure it, too")
    args = parser.parse_args()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_base(args.shape, folder, dtype)
        bench = Bench(folder, device, dtype, args.cuda_graphs)
        all_cases = cases(args.shape, folder, bench, device, dtype, not args.no_peft)
        report = measure(args.shape, all_cases, args.rounds, device, dtype)
        if args.vllm:
            seconds = measure_vllm(args.vllm, args.shape, folder, bench, args.rounds)
            [mixed] = [case for case in all_cases if case.name == "16 adapters mixed"]
            report["cases"]["vLLM, 16 adapters mixed"] = figures(mixed, seconds, report["gemm_gflops"] * 1e9)
        report["ratios"] = ratios(report)
        report["profile"] = {
            case.name: profile(bench, case)
            for case in all_cases
            if "plain" not in case.name and "PEFT" not in case.name
        }
    report |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "cuda_graphs": args.cuda_graphs,
        "torch": torch.__version__,
        "parameters_m": round(num_parameters(args.shape) / 1e6),
        "config": base_config(args.shape).to_diff_dict(),
    }
    _print(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{report['device']}, {report['threads']} threads, {report['dtype']}, torch {report['torch']}")
    console.print(f"GEMM on these shapes: {report['gemm_gflops']:.0f} GFLOP/s")
    table = Table("case", "ms", "tokens/s", "share of roofline")
    for name, case in report["cases"].items():
        table.add_row(name, f"{case['ms']:.0f}", f"{case['tokens_per_s']:,.0f}", f"{case['share_of_roofline']:.2f}")
    console.print(table)
    for name, ratio in report["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x")
    for name, parts in report["profile"].items():
        console.print(f"{name}: " + ", ".join(f"{key} {share:.0%}" for key, share in parts))


if __name__ == "__main__":
    main()
