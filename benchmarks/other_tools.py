"""Other people's load generators beside ours, unchanged, on `/v1/completions` with adapters as models.

    python -m benchmarks.other_tools examples/support_desk/bundle --adapters issueResolved,isRejecting \
        --guidellm .venv-clients/bin/guidellm --inference-perf ENVIRONMENT/bin/inference-perf --out DIR

One server, and one token for each request, as a classifier answers. The tools take turns; a figure is the median over
the rounds, beside the lowest and the highest. inference-perf needs Python 3.12 and an older transformers: give it an
environment of its own. docs/bench.md says what the tools' other figures mean at one token.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from loraplex.bench.call import Call, Reply
from loraplex.bench.http import Http, post
from loraplex.bench.load import Job, Load, Sample, generate
from loraplex.bench.process import Process
from loraplex.measuring.about import about
from loraplex.measuring.files import write_report
from loraplex.measuring.samples import Spread, percentile
from loraplex.text.tokenizer import Tokenizer

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Figures(NamedTuple):
    """Milliseconds of the median request, and requests answered a second."""

    p50_ms: float
    requests_per_s: float


class Asked(NamedTuple):
    """Says what every tool is told to do. num_requests: to each adapter. num_tokens: of a prompt."""

    url: str
    base: Path
    adapters: Sequence[str]
    num_requests: int
    num_tokens: int
    concurrency: int
    seed: int


def ours(asked: Asked) -> Figures:
    """`loraplex bench`'s load generator."""
    draw, tokenizer = random.Random(asked.seed), Tokenizer(asked.base)
    usual = sorted(set(tokenizer.vocabulary.values()) - tokenizer.special_ids)
    http = Http(asked.url)

    async def ask(call: Call) -> Reply:
        ids = draw.choices(usual, k=asked.num_tokens)
        body = {"model": call.classifiers[0], "prompt": ids, "max_tokens": 1, "ignore_eos": True}
        _, reply = await post(http, "/v1/completions", body)
        return reply or Reply(status="ok")

    calls = [Call(input="", classifiers=(name,)) for name in asked.adapters for _ in range(asked.num_requests)]
    jobs = tuple(Job(index=index, conversation=index, turns=((call,),)) for index, call in enumerate(calls))

    async def run() -> list[Sample]:
        try:
            return await generate(ask, Load(jobs=jobs, concurrency=asked.concurrency))
        finally:
            http.close()

    samples = asyncio.run(run())
    assert all(one.reply.status == "ok" for one in samples), {one.reply.error for one in samples}
    seconds = max(one.done_s for one in samples) - min(one.sent_s for one in samples)
    p50 = percentile([one.latency_s for one in samples], 0.5)
    assert p50 is not None, "requests were asked"
    return Figures(1000 * p50, len(samples) / seconds)


def guidellm(program: str, asked: Asked) -> Figures:
    """Its backend asks one model, so it runs once for each adapter."""
    latencies, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.adapters:
            report = Path(folder) / f"{name}.json"
            options = {
                "--backend": f"kind=openai_http,target={asked.url},model={name},request_format=/v1/completions",
                "--profile": f"kind=concurrent,streams={asked.concurrency}",
                "--constraint": f"kind=max_requests,count={asked.num_requests}",
                "--tokenizer": f"kind=huggingface_auto,model={asked.base}",
                "--data": f"kind=synthetic_text,prompt_tokens={asked.num_tokens},output_tokens=1",
                "--seed": f"kind=static,value={asked.seed}",
                "--output": f"kind=json,path={report}",
            }
            _run([program, "run", *(part for pair in options.items() for part in pair), "--disable-console"], folder)
            [found] = json.loads(report.read_text())["benchmarks"]
            requests = found["requests"]["successful"]
            assert len(requests) == asked.num_requests, found["requests"]["errored"]
            latencies += [1000 * one["request_latency"] for one in requests]
            seconds += max(one["request_end_time"] for one in requests)
            seconds -= min(one["request_start_time"] for one in requests)
    p50 = percentile(latencies, 0.5)
    assert p50 is not None, "requests were asked"
    return Figures(p50, len(latencies) / seconds)


def inference_perf(program: str, asked: Asked) -> Figures:
    """It divides its requests between the adapters by itself."""
    num = asked.num_requests * len(asked.adapters)
    prompt, answer = (
        {"min": size, "max": size, "mean": size, "std_dev": 0, "total_count": num} for size in (asked.num_tokens, 1)
    )
    split = [{"name": name, "split": 1 / len(asked.adapters)} for name in asked.adapters]
    config = {
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": asked.base.name, "base_url": asked.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(asked.base)},
        "data": {"type": "random", "input_distribution": prompt, "output_distribution": answer},
        "load": {
            "type": "concurrent",
            "num_workers": 1,
            "interval": 0,
            "base_seed": asked.seed,
            "stages": [{"num_requests": num, "concurrency_level": asked.concurrency}],
            "lora_traffic_split": split,
        },
        "report": {"request_lifecycle": {"summary": True}},
        "storage": {"local_storage": {"path": "out"}},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        _run([program, "--config_file", "config.yaml"], folder)
        found = json.loads((Path(folder) / "out/summary_lifecycle_metrics.json").read_text())["successes"]
        per_adapter = list(Path(folder).glob("out/adapter_*.json"))
    assert found["count"] == num and len(per_adapter) == len(asked.adapters), found["count"]
    return Figures(1000 * found["latency"]["request_latency"]["median"], found["throughput"]["requests_per_sec"])


def _run(command: Sequence[str], folder: str) -> None:
    environment = {**os.environ, **OFFLINE, "HF_HOME": folder}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def agree(one: Spread, other: Spread) -> bool:
    """Whether two tools found the same: what the rounds of one found overlaps what those of the other did."""
    return one.low <= other.high and other.low <= one.high


def measure(tools: dict[str, Callable[[Asked], Figures]], asked: Asked, rounds: int) -> dict[str, Any]:
    """Return the spreads of each tool, and whether they agree with ours."""
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    for index in range(rounds):
        for name in random.Random(index).sample(list(tools), len(tools)):
            found[name].append(tools[name](asked._replace(seed=asked.seed + index)))
    report: dict[str, Any] = {}
    spreads = {
        name: {key: Spread.of(getattr(one, key) for one in figures) for key in Figures._fields}
        for name, figures in found.items()
    }
    for name, keys in spreads.items():
        report[name] = {key: asdict(one) for key, one in keys.items() if one is not None}
        report[name]["agrees"] = all(
            agree(one, mine) for key, one in keys.items() if one is not None and (mine := spreads["ours"][key])
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapters", required=True, help="with commas")
    parser.add_argument("--guidellm", help="the program")
    parser.add_argument("--inference-perf", help="the program")
    parser.add_argument("--requests", type=int, default=40, help="to each adapter, of each tool, in each round")
    parser.add_argument("--tokens", type=int, default=200, help="of a prompt")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/report.json")
    options = parser.parse_args()
    tools: dict[str, Callable[[Asked], Figures]] = {"ours": ours}
    if options.guidellm:
        tools["guidellm"] = lambda asked: guidellm(os.path.abspath(options.guidellm), asked)
    if options.inference_perf:
        tools["inference-perf"] = lambda asked: inference_perf(os.path.abspath(options.inference_perf), asked)
    with tempfile.TemporaryDirectory() as folder, serving(options.bundle, Path(folder) / "log") as url:
        asked = Asked(
            url=url,
            base=options.bundle.resolve(),
            adapters=options.adapters.split(","),
            num_requests=options.requests,
            num_tokens=options.tokens,
            concurrency=options.concurrency,
            seed=0,
        )
        ours(asked)  # the first requests take longer
        found = measure(tools, asked, options.rounds)
    table = Table("tool", "p50 ms", "requests/s", "agrees with ours", box=None)
    for name, one in found.items():
        cells = [f"{one[key]['median']:.3g} ({one[key]['low']:.3g}-{one[key]['high']:.3g})" for key in Figures._fields]
        table.add_row(name, *cells, "yes" if one["agrees"] else "no")
    Console().print(table)
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        head = about(torch.device("cpu")) | {"settings": settings}
        write_report(options.out / "report.json", {"format": 1, "kind": "other tools", "about": head, "tools": found})


@contextmanager
def serving(bundle: Path, log: Path) -> Iterator[str]:
    """`loraplex serve` on a free port, by its URL."""
    process = Process([sys.executable, "-m", "loraplex.cli.main", "serve", str(bundle), "--port", "0"], log)
    with asyncio.Runner() as loop:
        try:
            loop.run(process.start())
            found = re.search(r"http://[^/ ]+", loop.run(process.line()))
            assert found is not None, "the server tells how it is asked"
            yield found[0]
        finally:
            loop.run(process.close())


if __name__ == "__main__":
    main()
