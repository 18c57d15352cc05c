"""Score the demo bundle's adapters on the dev dialogues with Loraplex, and print the table of README.md.

    python examples/support_desk/evaluate.py DATA

The bare base is scored as the same adapters with lora_B set to zero, so prompts and calibration stay the same.
"""

import argparse
import gzip
import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from loraplex import ClassifyResult, Loraplex


def judge(bundle: Path, conversations: list[str], dtype: str) -> list[ClassifyResult]:
    """Return each conversation's verdicts from all classifiers. Four threads keep the engine's steps full."""
    with Loraplex.load(bundle, dtype=dtype) as loraplex, ThreadPoolExecutor(4) as pool:
        results = pool.map(loraplex.classify, conversations)
        return list(track(results, description=bundle.name, total=len(conversations)))


def without_adapters(bundle: Path, folder: Path) -> Path:
    """Return a copy of the bundle in `folder` whose adapters change nothing."""
    bare = folder / "bare"
    shutil.copytree(bundle, bare)
    for path in bare.glob("*/adapter_model.safetensors"):
        tensors = load_file(path)
        save_file({key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}, path)
    return bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev.jsonl.gz")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent / "bundle")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, help="only the first N conversations")
    parser.add_argument("--bare-limit", type=int, default=300, help="conversations for the bare base's score")
    args = parser.parse_args()
    with gzip.open(args.data / "dev.jsonl.gz", "rt", encoding="utf-8") as file:
        dev = [json.loads(line) for line in file][: args.limit]
    conversations = [example["conversation"] for example in dev]
    results = judge(args.bundle, conversations, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        bare_results = judge(without_adapters(args.bundle, Path(folder)), conversations[: args.bare_limit], args.dtype)

    print("| classifier | accuracy | F1 | AUC | F1 of the bare base | AUC of the bare base |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name in json.loads((args.data / "tasks.json").read_text())["tasks"]:
        task = name["name"]

        def score(answers: list[ClassifyResult], task: str = task) -> tuple[float, float, float]:
            truth = [example["labels"][task] for example in dev[: len(answers)]]
            said = [answer[task].label == "yes" for answer in answers]
            yes = [(answer[task].scores or {})["yes"] for answer in answers]
            return accuracy_score(truth, said), f1_score(truth, said, zero_division=0), roc_auc_score(truth, yes)

        accuracy, f1, auc = score(results)
        _, bare_f1, bare_auc = score(bare_results)
        rows.append((accuracy, f1, auc, bare_f1, bare_auc))
        print(f"| {task} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print("| **mean** | " + " | ".join(f"**{value:.3f}**" for value in means) + " |")


if __name__ == "__main__":
    main()
