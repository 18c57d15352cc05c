"""Do the backends answer alike? The demo's verdicts on dialogues by one backend, against those of another.

    python -m benchmarks.agreement DATA --json native.json
    python -m benchmarks.agreement DATA --backend peft --against native.json
    .venv-vllm/bin/python -m benchmarks.agreement DATA --backend vllm --against native.json

DATA is a folder with dev.jsonl.gz: one object a line, whose "conversation" is a text.
"""

import argparse
import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import track

from loraplex import Loraplex

DEMO = Path(__file__).parent.parent / "examples" / "support_desk" / "bundle"
Answers = list[dict[str, tuple[str, dict[str, float], float]]]  # a text: classifier -> (label, scores, label mass)


def judge(bundle: Path, texts: list[str], engine: dict[str, Any]) -> tuple[Answers, float]:
    """All classifiers on each text, and the seconds that it took. Raises where a verdict has an error."""
    with Loraplex.load(bundle, **engine) as loraplex, ThreadPoolExecutor(4) as pool:
        loraplex.classify(texts[0])
        started = time.monotonic()
        results = list(track(pool.map(loraplex.classify, texts), description="judging", total=len(texts)))
        seconds = time.monotonic() - started
    answers: Answers = []
    for result in results:
        answers.append({})
        for one in result.verdicts:
            assert one.label is not None and one.scores is not None and one.label_mass is not None, one.error
            answers[-1][one.classifier] = (one.label, dict(one.scores), one.label_mass)
    return answers, seconds


def compare(answers: Answers, others: Answers) -> dict[str, Any]:
    """difference: of a label's score, or of the labels' share of the vocabulary."""
    assert len(answers) == len(others), "not the same texts: give the same --limit"
    num_equal, differences = 0, []
    for found, expected in zip(answers, others, strict=True):
        assert found.keys() == expected.keys(), "not the same classifiers"
        for name, (label, scores, mass) in found.items():
            other_label, other_scores, other_mass = expected[name]
            num_equal += label == other_label
            differences.append(max(abs(mass - other_mass), *(abs(scores[i] - other_scores[i]) for i in other_scores)))
    return {
        "verdicts": len(differences),
        "labels_equal": num_equal,
        "difference_mean": fmean(differences),
        "difference_max": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with dev.jsonl.gz")
    parser.add_argument("--bundle", type=Path, default=DEMO)
    parser.add_argument("--backend", default="native", choices=["native", "vllm", "peft"])
    parser.add_argument("--peft-batching", default="sequential", choices=["sequential", "mixed"])
    parser.add_argument("--vllm-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=200, help="dialogues, the first ones")
    parser.add_argument("--json", type=Path, help="write the verdicts there")
    parser.add_argument("--against", type=Path, help="verdicts of another run")
    args = parser.parse_args()
    with gzip.open(args.data / "dev.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["conversation"] for line in file][: args.limit]
    engine = {
        "backend": args.backend,
        "peft_batching": args.peft_batching,
        "vllm_arg": tuple(args.vllm_arg),
        "dtype": args.dtype,
    }
    answers, seconds = judge(args.bundle, texts, engine)
    report: dict[str, Any] = {"engine": engine, "texts": len(texts), "seconds": seconds}
    if args.against is not None:
        report |= compare(answers, json.loads(args.against.read_text())["answers"])
    for name, value in report.items():
        print(f"{name}: {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(report | {"answers": answers}))


if __name__ == "__main__":
    main()
