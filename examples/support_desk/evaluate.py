"""Score the demo bundle's adapters on the dev dialogues with Loraplex, and print the table of README.md.

    python examples/support_desk/evaluate.py DATA

The bare base is asked the same prompts, by transformers, and its answers are calibrated as the adapters' answers are.
"""

import argparse
import gzip
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.progress import track
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex import Loraplex
from loraplex.classifier import read_contract
from loraplex.types import ClassifyRequest

Answers = list[Mapping[str, tuple[str, float]]]  # a conversation: classifier -> (label, score of "yes")


def judge(loraplex: Loraplex, conversations: list[str]) -> Answers:
    """Return each conversation's verdicts from all classifiers. Four threads keep the engine's steps full."""
    with ThreadPoolExecutor(4) as pool:
        results = track(pool.map(loraplex.classify, conversations), description="adapters", total=len(conversations))
        return [
            {one.classifier: (str(one.label), (one.scores or {})["yes"]) for one in result.verdicts}
            for result in results
        ]


@torch.inference_mode()
def judge_by_base(bundle: Path, loraplex: Loraplex, conversations: list[str], dtype: str) -> Answers:
    """Return the same from the base without adapters."""
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    answers: Answers = []
    for conversation in track(conversations, description="bare base"):
        answers.append(found := {})
        prompts = loraplex.run(loraplex.service.show_prompt(ClassifyRequest(input=conversation)))
        for name, _, ids in prompts:
            contract = read_contract(bundle / name / "classifier.yaml")
            labels = [tokenizer.encode(label, add_special_tokens=False)[0] for label in contract.labels]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
            decision = contract.decide(logits.float().log_softmax(-1)[labels].tolist())
            found[name] = decision.label, decision.scores["yes"]
    return answers


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
    with Loraplex.load(args.bundle, dtype=args.dtype) as loraplex:
        results = judge(loraplex, conversations)
        bare_results = judge_by_base(args.bundle, loraplex, conversations[: args.bare_limit], args.dtype)

    print("| classifier | accuracy | F1 | AUC | F1 of the bare base | AUC of the bare base |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name in json.loads((args.data / "tasks.json").read_text())["tasks"]:
        task = name["name"]

        def score(answers: Answers, task: str = task) -> tuple[float, float, float]:
            truth = [example["labels"][task] for example in dev[: len(answers)]]
            said = [answer[task][0] == "yes" for answer in answers]
            yes = [answer[task][1] for answer in answers]
            return accuracy_score(truth, said), f1_score(truth, said, zero_division=0), roc_auc_score(truth, yes)

        accuracy, f1, auc = score(results)
        _, bare_f1, bare_auc = score(bare_results)
        rows.append((accuracy, f1, auc, bare_f1, bare_auc))
        print(f"| {task} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print("| **mean** | " + " | ".join(f"**{value:.3f}**" for value in means) + " |")


if __name__ == "__main__":
    main()
