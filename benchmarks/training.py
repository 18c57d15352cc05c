"""Measures the training of N adapters at once, against PEFT with transformers' Trainer, one adapter after the other.

    python -m benchmarks.training BASE --data FILE --adapters 16 --out DIR     writes DIR/report.json

BASE is a folder with config.json, weights and a tokenizer. Both train adapters of one rank on the same prompts, in
steps of the same size: FILE's first conversations, once. Each system is a process of its own, which has loaded the
base before its time counts; they take turns. In each round PEFT trains `--peft-adapters` of the adapters, and each time
counts as often as there are adapters: to train all of them would take it again and again. The weights are thrown away.
"""

import argparse
import gzip
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import over_rounds
from loraplex.labelled import read_labelled
from loraplex.machine import choose_threads
from loraplex.measuring.about import about
from loraplex.measuring.files import write_report
from loraplex.measuring.memory import peak_rss_bytes
from loraplex.model.loader import resolve_device, resolve_dtype
from loraplex.training.asked import Asked
from loraplex.training.fit import Fit
from loraplex.training.prepared import Prepared, prepare, targets_of
from loraplex.training.settings import TrainSettings
from loraplex.training.trainee import Trainee

OURS, PEFT = "at once", "PEFT"
KINDS = ("alora", "lora")


def ours(prepared: Prepared, settings: TrainSettings) -> Callable[[int], float]:
    """Load the base, and return what trains all adapters once and tells the seconds that it took."""
    trainee = _trainee(prepared, settings)
    asked, ids = prepared.of("train"), [task.label_ids for task in prepared.tasks]

    def train(number: int) -> float:
        loop = Fit(trainee, settings, asked, [], ids, prepared.weights)
        started = time.perf_counter()
        loop.run(lambda told: None)
        return time.perf_counter() - started

    return train


def _trainee(prepared: Prepared, settings: TrainSettings) -> Trainee:
    device = resolve_device(settings.device)
    return Trainee.load(
        prepared.base,
        prepared.config,
        prepared.layers,
        resolve_dtype(settings.dtype, device),
        device,
        num_adapters=len(prepared.tasks),
        rank=settings.rank,
        alpha=settings.scale,
        targets=targets_of(prepared.layers, settings.targets),
    )


def peft(prepared: Prepared, settings: TrainSettings) -> Callable[[int], float]:
    """Load the base, and return what trains one adapter once with transformers' Trainer, as its users do: the loss on
    the label alone, rows of one length together, autocast where the base is in bfloat16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    base: Any = AutoModelForCausalLM.from_pretrained(prepared.base, dtype=dtype, local_files_only=True)

    def train(number: int) -> float:
        nonlocal base
        index = number % len(prepared.tasks)
        task = prepared.tasks[index]
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.scale,  # type: ignore[arg-type]  # PEFT takes any number
            target_modules=sorted(targets_of(prepared.layers, settings.targets)),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=None if task.invocation is None else list(task.invocation),
        )
        model = get_peft_model(base, config)
        rows = [_row(one, task.label_ids) for one in prepared.of("train") if one.classifier == index]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                max_grad_norm=settings.max_norm,
                bf16=dtype == torch.bfloat16,
                use_cpu=device.type == "cpu",
                train_sampling_strategy="group_by_length",
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=_padded)
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        base = model.unload()
        return seconds

    return train


def _row(one: Asked, label_ids: list[tuple[int, ...]]) -> dict[str, list[int]]:
    prompt, label = [*one.prefix, *one.suffix], list(label_ids[one.truth])
    return {"input_ids": prompt + label, "labels": [-100] * len(prompt) + label}


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def _serve(connection: Connection, system: str, base: str, data: Path, settings: TrainSettings, num: int) -> None:
    """Train as often as the parent says, and tell the seconds; at last, the most memory."""
    choose_threads()
    names = _names(data)[:num]
    train = (ours if system == OURS else peft)(prepare(base, data, settings, names), settings)
    connection.send(None)
    while (number := connection.recv()) is not None:
        connection.send(train(number))
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    connection.send({"peak_rss_bytes": peak_rss_bytes(), "peak_cuda_bytes": cuda})


def _names(data: Path) -> list[str]:
    return list(dict.fromkeys(name for row in read_labelled(data) for name in row.labels))


class System:
    """A system in a process of its own."""

    def __init__(self, name: str, *work: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, *work), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def train(self, number: int) -> float:
        self._connection.send(number)
        return float(self._connection.recv())

    def close(self) -> dict[str, Any]:
        self._connection.send(None)
        memory: dict[str, Any] = self._connection.recv()
        self._process.join()
        return memory


def compare(base: str, data: Path, settings: TrainSettings, args: argparse.Namespace) -> dict[str, Any]:
    """Return the times and the memory of both systems with one kind of adapter."""
    work = base, data, settings, args.adapters
    systems = {name: System(name, *work) for name in (OURS, PEFT)}
    for number in range(args.warmups):
        systems[OURS].train(number)
        systems[PEFT].train(number)
    at_once, one_by_one, next_adapter = [], [], 0
    for _ in range(args.rounds):
        at_once.append(systems[OURS].train(0))
        for _ in range(args.peft_adapters):
            one_by_one.append(systems[PEFT].train(next_adapter))
            next_adapter += 1
    prepared = prepare(base, data, settings, _names(data)[: args.adapters])
    asked, num = prepared.of("train"), len(prepared.tasks)
    prefixes = {(one.row, one.prefix) for one in asked}
    ours_tokens = sum(len(prefix) for _, prefix in prefixes) + sum(len(one.suffix) for one in asked)
    return {
        "adapters": num,
        "conversations": len(prepared.split.train),
        "tokens": sum(len(one.prefix) + len(one.suffix) for one in asked),
        "computed_tokens": ours_tokens,
        "at_once_s": over_rounds(at_once),
        "peft_one_s": over_rounds(one_by_one),
        "peft_all_s": over_rounds(num * one for one in one_by_one),
        "ratio": over_rounds(
            num * one / other
            for round, other in enumerate(at_once)
            for one in one_by_one[round * args.peft_adapters : (round + 1) * args.peft_adapters]
        ),
        "memory": {name: system.close() for name, system in systems.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a folder, or a hub id")
    parser.add_argument("--data", type=Path, required=True, help="labelled conversations, .jsonl or .jsonl.gz")
    parser.add_argument("--adapters", type=int, default=16, help="the first classifiers that the data has labels for")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--batch", type=int, default=16, help="conversations in a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft-adapters", type=int, default=1, help="how many adapters PEFT trains in each round")
    parser.add_argument("--warmups", type=int, default=1, help="trainings before the first round, which do not count")
    parser.add_argument("--template", help="the prompt, with {conversation}; by default from the chat template")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder for report.json")
    args = parser.parse_args()
    table = Table(
        "kind",
        "16 at once" if args.adapters == 16 else "at once",
        "PEFT, one",
        "PEFT, all",
        "ratio",
        "peak MB",
        box=None,
    )
    found = {}
    with tempfile.TemporaryDirectory(prefix="loraplex-training-") as folder:
        data = Path(folder) / "data.jsonl"
        with gzip.open(args.data) if args.data.suffix == ".gz" else args.data.open("rb") as lines:
            data.write_bytes(b"".join(islice(lines, args.conversations)))
        for kind in args.kinds:
            settings = TrainSettings(
                kind=kind,
                rank=args.rank,
                batch=args.batch,
                template=args.template,
                epochs=1.0,
                dev=0.0,
                calibration=0.0,
                balance="none",
                dtype=args.dtype,
                device=args.device,
            )
            one = found[kind] = compare(args.base, data, settings, args)
            peaks = [f"{name} {memory['peak_rss_bytes'] / 1e6:,.0f}" for name, memory in one["memory"].items()]
            table.add_row(
                kind,
                *(_seconds(one[key]) for key in ("at_once_s", "peft_one_s", "peft_all_s")),
                f"{one['ratio']['median']:.2f}x ({one['ratio']['low']:.2f}-{one['ratio']['high']:.2f})",
                ", ".join(peaks),
            )
    Console(width=160).print(table)
    if args.out is not None:
        device = resolve_device(args.device)
        head = about(device, resolve_dtype(args.dtype, device))
        write_report(args.out / "report.json", {"format": 1, "kind": "training", "about": head, "kinds": found})


def _seconds(one: dict[str, Any]) -> str:
    return f"{one['median']:.1f} s ({one['low']:.1f}-{one['high']:.1f})"


if __name__ == "__main__":
    main()
