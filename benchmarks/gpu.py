"""Everything that is worth a few minutes of a GPU, in one command: tests, figures, profiles.

    python -m benchmarks.gpu --out build/gpu                                  under nine minutes
    python -m benchmarks.gpu --out build/gpu --device cpu --shape 6M          rehearse it, under a minute

Each part is a process with a time limit of its own, the most valuable first. After each part the report is written
again, so a run that is cut short keeps what it has measured. OUT/report.json becomes docs/gpu/<device>.json, and
OUT/table.md goes into docs/performance.md. A part whose requirements are missing is skipped by name.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.measuring.about import about
from loraplex.measuring.files import write_report, write_text

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "support_desk" / "bundle"
CONVERSATIONS, NUM_CONVERSATIONS, NUM_TURNS = "conversations.jsonl", 200, 12
WORDS = (
    "I you we the a to for with my your order booking flight hotel room table account card payment refund "
    "ticket doctor bus train seat date time please thanks can could would like need want find book change cancel"
).split()
REHEARSED = ("-k", "not mistral-window and not bfloat16")  # enough to show that the tests run
TAIL = 4000  # characters of a part's output that the report keeps
# What we want of an H100: ms, or a share of the rate of plain matrix products.
WANTED_MS = {"16 verdicts, shared": 16.0, "next turn, shared": 9.0}
WANTED_SHARE, WANTED_HTTP_MS = {"16 adapters mixed": 0.75}, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command. limit_s: after that it is stopped. json: the file that it writes in OUT. needs: modules without
    which it is skipped."""

    name: str
    command: Seq[str]
    limit_s: float
    json: str | None = None
    needs: Seq[str] = ()
    environment: Mapping[str, str] | None = None


def parts(out: Path, device: str, shape: str, rounds: int, vllm: str | None) -> list[Part]:
    engine = [sys.executable, "-m", "benchmarks.engine", "--device", device, "--shape", shape, "--rounds", str(rounds)]
    smi = ["nvidia-smi"] if shutil.which("nvidia-smi") else [sys.executable, "-c", "print('no nvidia-smi')"]
    is_rehearsal = device == "cpu"
    tests = ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-W", "default", "--durations", "5"]
    found = [
        Part(name="nvidia-smi before", command=smi, limit_s=20),
        Part(
            name="tests",
            command=[sys.executable, *tests, f"--junitxml={out / 'tests.xml'}", *(REHEARSED if is_rehearsal else ())],
            limit_s=120,
            needs=["pytest"],
            environment={"LORAPLEX_GPU_TESTS": "cpu"} if is_rehearsal else None,
        ),
        Part(
            name="engine",
            command=[*engine, "--out", str(out / "engine")],
            limit_s=180,
            json="engine/report.json",
            needs=["peft"],
        ),
        Part(
            name="graphs",
            command=[*engine, "--no-peft", "--cuda-graphs", "--out", str(out / "graphs")],
            limit_s=100,
            json="graphs/report.json",
        ),
        Part(
            name="server",
            command=[
                *(sys.executable, "-m", "loraplex.cli.main", "bench", str(DEMO), "--systems", "native"),
                *("--data", str(out / CONVERSATIONS), "--out", str(out / "server"), "--device", device),
                *("--concurrency", "1", "--conversations", "10" if is_rehearsal else "200", "--slices", "2"),
            ],
            limit_s=90,
            json="server/report.json",
            needs=["fastapi", "uvicorn", "psutil"],
        ),
    ]
    if vllm:
        with_vllm = [*engine, "--no-peft", "--vllm", vllm, "--out", str(out / "vllm")]
        found.append(Part(name="vllm", command=with_vllm, limit_s=240, json="vllm/report.json"))
    return [*found, Part(name="nvidia-smi after", command=smi, limit_s=20)]


def write_conversations(path: Path) -> None:
    """Write conversations of words that are drawn at random: their length matters, and not their sense."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(NUM_CONVERSATIONS):
            turns = [
                f"{('Customer', 'Agent')[i % 2]}: {' '.join(draw.choices(WORDS, k=draw.randint(6, 18)))}"
                for i in range(NUM_TURNS - 1)
            ]
            file.write(json.dumps({"text": "\n".join(turns)}) + "\n")


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Run the part's command. Return its state, its seconds and the end of its output."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"state": f"skipped: {', '.join(missing)} is not installed"}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(part.environment or {})}
    started = time.monotonic()
    with subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
            state = "ok" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            state = f"stopped after {limit_s:.0f} s"
    return {"state": state, "seconds": round(time.monotonic() - started, 1), "output": output[-TAIL:]}


def table(report: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    engine, graphs = report.get("engine") or {}, report.get("graphs") or {}
    lines = ["| case | ms | floor, ms | tokens/s | share of roofline | wanted |", "|---|---|---|---|---|---|"]
    cases = dict(engine.get("cases") or {})
    cases |= {name: case for name, case in (graphs.get("cases") or {}).items() if name not in cases}
    for name, case in cases.items():
        short = name.removesuffix(", CUDA graphs")
        wanted = f"{WANTED_MS[short]:g} ms" if short in WANTED_MS else f"{WANTED_SHARE.get(name, '')}"
        lines.append(
            f"| {name} | {case['ms']['median']:.1f} | {case['floor_ms']:.1f} | {case['tokens_per_s']:,.0f} "
            f"| {case['share_of_roofline']:.2f} | {wanted} |"
        )
    if server := report.get("server"):
        [load] = server["systems"]["native"]["loads"]
        adds, num = load["http_adds_ms"]["median"], len(server["data"]["classifiers"])
        lines += ["", f"HTTP adds {adds:.2f} ms to {num} classifiers (wanted: {WANTED_HTTP_MS:g} ms)."]
    ratios = {**(graphs.get("ratios") or {}), **(engine.get("ratios") or {})}
    lines += ["", *(f"* {name}: {ratio:.2f}x" for name, ratio in ratios.items())]
    lines += ["", *(f"* {name}: {part['state']}" for name, part in report["parts"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json and table.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=530, help="for all parts together")
    parser.add_argument("--only", help="names of parts with commas")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="an interpreter that has vLLM: measure it, too, as the last part"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    write_conversations(out / CONVERSATIONS)
    chosen = parts(out, args.device, args.shape, args.rounds, args.vllm)
    if args.only:
        chosen = [part for part in chosen if part.name in args.only.split(",")]
    # Nothing is asked of the GPU here: this process would take memory there while the parts run. They name it.
    head = about(torch.device("cpu")) | {"settings": {"device": args.device, "shape": args.shape}}
    report: dict[str, Any] = {"format": 1, "kind": "gpu", "about": head, "parts": {}}
    end = time.monotonic() + args.seconds
    for part in chosen:
        left = end - time.monotonic()
        print(f"{part.name} …", flush=True)
        found = run(part, min(part.limit_s, left)) if left > 5 else {"state": "skipped: no time was left"}
        report["parts"][part.name] = found
        if part.json and (out / part.json).is_file():
            found_json = json.loads((out / part.json).read_text())
            report[part.name] = {key: value for key, value in found_json.items() if key != "samples"}
        write_report(out / "report.json", report)
        write_text(out / "table.md", table(report))
        print(f"{part.name}: {found['state']}, {found.get('seconds', 0)} s", flush=True)
        if found["state"] != "ok":
            print(found.get("output", ""), flush=True)
    print((out / "table.md").read_text())
    sys.exit(any(part["state"] != "ok" for part in report["parts"].values()))


if __name__ == "__main__":
    main()
