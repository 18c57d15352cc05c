"""One state and many typed questions, asked of `/v1/systemone`: Loraplex, vLLM and llama.cpp in turn.

    python -m benchmarks.decisions BUNDLE --data FILE --questions FILE \
        [--vllm PYTHON] [--llamacpp PROGRAM --gguf FILE] [--conversations 50] [--out DIR]

The questions are a YAML file as for `benchmarks.questions`. Loraplex answers those that are named like a classifier of
the bundle with its adapter, and the others, as the other servers answer all of them, with the bare base. All servers
run at once and get the same request, each conversation in another order; a conversation is new to all of them. PYTHON
has vLLM 0.32 or newer, which answers typed questions with few architectures: in place of another base it gets a Qwen3
of the same sizes with random weights, whose answers mean nothing and whose time is the same but for two small norms a
layer. FILE.gguf is the bundle's base as a decision model: see `benchmarks.decision_gguf`.
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, Qwen3Config

from benchmarks.questions import read_questions
from benchmarks.servers import serving
from loraplex.bundle import open_bundle
from loraplex.labelled import read_labelled
from loraplex.measuring.about import about
from loraplex.measuring.files import write_report
from loraplex.measuring.samples import percentile
from loraplex.types import Question

PAUSE_S = 0.3  # after an answer some libraries' threads keep a processor busy for so long
CONTEXT = 2048  # tokens of a prompt, at most
# Of a base that stands in for another.
SAME = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
# Of those that vLLM answers typed questions with, those that it has on a CPU.
VLLM_ARCHITECTURES = {"Qwen3ForCausalLM", "Qwen3_5ForConditionalGeneration"}


class System(NamedTuple):
    """A server, and the counters of its /metrics: tokens that it computed, and prompts' tokens that it found cached."""

    command: Callable[[str], Sequence[str]]
    computed: str
    cached: str
    ready: str = "/health"


class Asked(NamedTuple):
    """Holds what one request took."""

    seconds: float
    computed: int
    cached: int


def loraplex(bundle: Path) -> System:
    program = (sys.executable, "-m", "loraplex.cli.main", "serve", str(bundle), "--adhoc-questions")
    computed, cached = (f'loraplex_tokens_total{{kind="{kind}"}}' for kind in ("computed", "cached"))
    return System(lambda port: (*program, "--port", port), computed, cached, ready="/ready")


def vllm(python: str, base: Path, folder: Path) -> System:
    """It counts the tokens asked, and the hits of its prefix cache among them. folder: for a base of its own."""
    options: tuple[str, ...] = ("--max-model-len", str(CONTEXT), "--dtype", "bfloat16")
    config = AutoConfig.from_pretrained(base)
    if not set(config.architectures) & VLLM_ARCHITECTURES:
        own = Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            head_dim=config.hidden_size // config.num_attention_heads,
            **{name: getattr(config, name) for name in SAME},
        )
        own.save_pretrained(folder)
        for pattern in ("tokenizer*", "*.jinja", "special_tokens*"):
            for file in base.glob(pattern):
                shutil.copy(file, folder)
        base, options = folder, (*options, "--load-format", "dummy")
    server = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base))
    program = ("env", "VLLM_CPU_KVCACHE_SPACE=2", *server)
    return System(
        lambda port: (*program, "--port", port, *options), "vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total"
    )


def llamacpp(program: str, gguf: Path) -> System:
    """All questions of a request are decoded together, behind one state."""
    options = ("--parallel", "4", "--kv-unified", "--ctx-size", str(4 * CONTEXT), "--metrics")
    return System(
        lambda port: (program, "--model", str(gguf), "--host", "127.0.0.1", "--port", port, *options),
        "llamacpp:prompt_tokens_total",
        "llamacpp:prompt_tokens_cached_total",
    )


def body(state: str, questions: Mapping[str, Question]) -> dict[str, Any]:
    """Return a request in TypeSafe's format."""
    asked: dict[str, Any] = {}
    for name, one in questions.items():
        asked[name] = {"type": "noul" if one.type == "predicate" else one.type, "instructions": one.instructions}
        if one.type == "choice":
            asked[name]["criteria"] = {label: one.descriptions.get(label) for label in one.labels}
        elif one.type == "score":
            asked[name]["criteria"] = [one.descriptions.get(label, label) for label in one.labels]
    return {"state": state, "questions": asked}


class Server:
    """A running system."""

    def __init__(self, system: System, url: str) -> None:
        self._system, self._http = system, httpx.Client(base_url=url, timeout=600)

    def ask(self, asked: Mapping[str, Any]) -> Asked:
        """Raises AssertionError where a question has no answer."""
        before = self._counted()
        started = time.perf_counter()
        answer = self._http.post("/v1/systemone", json=asked)
        seconds = time.perf_counter() - started
        assert answer.status_code == httpx.codes.OK, answer.text[:500]
        assert answer.json()["answers"].keys() == asked["questions"].keys(), answer.text[:500]
        computed, cached = (int(now - then) for now, then in zip(self._counted(), before, strict=True))
        return Asked(seconds, computed, cached)

    def _counted(self) -> tuple[float, float]:
        text = self._http.get("/metrics").text
        computed, cached = (_sum(text, name) for name in (self._system.computed, self._system.cached))
        return (computed - cached if self._system.computed.startswith("vllm:") else computed), cached

    def close(self) -> None:
        self._http.close()


def _sum(metrics: str, name: str) -> float:
    """Return the sum of a counter's series. name: may have labels."""
    wanted = re.escape(name) if "{" in name else re.escape(name) + r"(?:\{[^}]*\})?"
    return sum(map(float, re.findall(rf"^{wanted} (\S+)$", metrics, re.MULTILINE)))


def measure(
    servers: Mapping[str, Server], states: Sequence[str], questions: Mapping[str, Question]
) -> dict[str, list[Asked]]:
    """Return what each state took each server."""
    found: dict[str, list[Asked]] = {name: [] for name in servers}
    for index, state in enumerate(states):
        for name in random.Random(index).sample(list(servers), len(servers)):
            found[name].append(servers[name].ask(body(state, questions)))
            time.sleep(PAUSE_S)
    return found


def figures(found: Mapping[str, Sequence[Asked]]) -> dict[str, Any]:
    """Return medians over the states, with the middle nine tenths; a ratio is of the same state."""
    [ours, *_] = found.values()
    report: dict[str, Any] = {}
    for name, asked in found.items():
        ratios = [one.seconds / own.seconds for one, own in zip(asked, ours, strict=True)]
        report[name] = {
            "seconds": _middle([one.seconds for one in asked]),
            "ratio": _middle(ratios),
            "computed_tokens": sum(one.computed for one in asked) / len(asked),
            "prompt_tokens": sum(one.computed + one.cached for one in asked) / len(asked),
        }
    return report


def _middle(values: Sequence[float]) -> dict[str, float | None]:
    return {key: percentile(values, share) for key, share in (("median", 0.5), ("p5", 0.05), ("p95", 0.95))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--llamacpp", metavar="PROGRAM", help="llama.cpp's llama-server")
    parser.add_argument("--gguf", type=Path, help="the base as a decision model, for --llamacpp")
    parser.add_argument("--conversations", type=int, default=50, help="the first of the file that differ")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/report.json and the servers' logs")
    options = parser.parse_args()
    if (options.llamacpp is None) != (options.gguf is None):
        parser.error("give --llamacpp and --gguf together")
    questions = read_questions(options.questions)
    states = list(dict.fromkeys(str(row.input) for row in read_labelled(options.data)))[: options.conversations + 1]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as running:
        systems = {"loraplex": loraplex(options.bundle)}
        base = open_bundle(options.bundle).base
        if options.vllm:
            systems["vllm"] = vllm(os.path.abspath(options.vllm), base, Path(temporary) / "base")
        if options.llamacpp:
            systems["llamacpp"] = llamacpp(os.path.abspath(options.llamacpp), options.gguf.resolve())
        logs = options.out or Path(temporary)
        servers = {}
        for name, system in systems.items():
            url = running.enter_context(serving(system.command, logs / f"{name}.log", system.ready))
            servers[name] = Server(system, url)
            running.callback(servers[name].close)
        measure(servers, states[-1:], questions)  # the first request takes longer
        found = figures(measure(servers, states[:-1], questions))
    table = Table("server", "prompt tokens", "computed", "ms", "times ours", box=None)
    for name, one in found.items():
        ms = {key: 1000 * value for key, value in one["seconds"].items()}
        table.add_row(
            name,
            f"{one['prompt_tokens']:.0f}",
            f"{one['computed_tokens']:.0f}",
            f"{ms['median']:.0f} ({ms['p5']:.0f}-{ms['p95']:.0f})",
            f"{one['ratio']['median']:.1f} ({one['ratio']['p5']:.1f}-{one['ratio']['p95']:.1f})",
        )
    Console().print(table)
    if options.out:
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        head = about(torch.device("cpu")) | {"settings": settings}
        write_report(options.out / "report.json", {"format": 1, "kind": "decisions", "about": head, "servers": found})


if __name__ == "__main__":
    main()
