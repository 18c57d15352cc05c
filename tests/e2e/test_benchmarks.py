"""The benchmarks run and report all that they promise; what they measure here means nothing."""

import dataclasses
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import bundles, gpu, other_tools

import asked
import dialogues
import serving
import tiny
from loraplex import Loraplex
from loraplex.measuring.samples import Spread


def test_the_gpu_run_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """The same command as on a GPU, so that no minute of one is lost to a mistake in a script."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--shape", "tiny", "--rounds", "1"]
    run = subprocess.run([*command, "--out", str(tmp_path)], cwd=serving.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert {part["state"] for part in report["parts"].values()} == {"ok"}
    assert "passed" in report["parts"]["tests"]["output"] and "failed" not in report["parts"]["tests"]["output"]
    engine, graphs = report["engine"], report["graphs"]
    assert engine["about"]["settings"]["shape"] == "tiny" and engine["memory"]["peak_rss_bytes"] > 1e8
    assert len(engine["cases"]) == 8 and len(engine["ratios"]) == 5 and len(engine["profile"]) == 4
    assert all(case["share_of_roofline"] > 0 for case in engine["cases"].values())
    assert graphs["graphs_replayed"] and len(graphs["ratios"]) == 5
    [load] = report["server"]["systems"]["native"]["loads"]
    assert load["http_adds_ms"]["median"] > 0 and load["requests"]["ok"] == 10
    table = (tmp_path / "table.md").read_text()
    assert "| 16 verdicts, shared, CUDA graphs |" in table and "HTTP adds" in table


def test_a_part_that_takes_too_long_costs_no_other_part_its_time() -> None:
    endless = gpu.Part(name="endless", command=[sys.executable, "-c", "while True: pass"], limit_s=60)
    assert gpu.run(endless, 0.2)["state"] == "stopped after 0 s"
    assert gpu.run(dataclasses.replace(endless, needs=["no_such_module"]), 60)["state"].startswith("skipped: no_such")
    failing = gpu.run(dataclasses.replace(endless, command=[sys.executable, "-c", "import no_such_module"]), 60)
    assert failing["state"] == "failed with status 1" and "ModuleNotFoundError" in failing["output"]


@pytest.mark.slow
def test_the_adapter_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.adapters", "--shape", "tiny", "--adapters", "24", "--places", "8"]
    run = subprocess.run(
        [*command, "--requests", "20", "--rounds", "1", "--out", str(tmp_path)],
        cwd=serving.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kind"] == "adapters" and "--shape tiny" in report["about"]["command"]
    assert report["many"]["requests_per_s_all"]["median"] > 0 and report["cold"]["disk_ms"]["median"] > 0
    assert report["swaps"]["swaps"] > 0 and report["swaps"]["during"]["latency_ms"]["p99"] > 0


def make(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bundles", *map(str, arguments)])
        bundles.main()


@pytest.mark.slow
def test_training_at_once_beside_peft(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tiny.save_base(base, tiny.FAMILIES["llama"])
    data = dialogues.write(tmp_path / "data.jsonl", 8)
    command = [sys.executable, "-m", "benchmarks.training", str(base), "--data", str(data), "--adapters", "2"]
    small = ["--conversations", "6", "--batch", "3", "--rank", "2", "--rounds", "1", "--warmups", "0"]
    run = subprocess.run(
        [*command, *small, "--template", dialogues.TEMPLATE, "--out", str(tmp_path / "out")],
        cwd=serving.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kinds = json.loads((tmp_path / "out" / "report.json").read_text())["kinds"]
    assert kinds["alora"]["computed_tokens"] < kinds["alora"]["tokens"]
    assert kinds["lora"]["computed_tokens"] == kinds["lora"]["tokens"]
    for one in kinds.values():
        assert one["adapters"] == 2 and one["conversations"] == 6 and one["ratio"]["median"] > 0
        assert all(memory["peak_rss_bytes"] > 1e8 for memory in one["memory"].values())


def test_random_adapters_of_two_kinds_ask_the_same_tokens(tiny_bundle: Path, tmp_path: Path) -> None:
    usage = {}
    for kind in ("lora", "alora"):
        out = tmp_path / kind
        make(tiny_bundle, "--adapters", 3, "--kind", kind, "--rank", 4, "--out", out, "--names-from", tiny_bundle)
        assert (out / "model.safetensors").is_symlink() and not (out / "verbatim").exists()
        with Loraplex.load(out, dtype="float32") as loraplex:
            result = loraplex.classify("Customer: hello\nAgent: at what time?")
            assert [one.classifier for one in result.verdicts] == ["task0", "task1", "task2"]
            assert len({one.confidence for one in result.verdicts}) == 3
            usage[kind] = result.usage
    assert usage["alora"].prompt_tokens == usage["lora"].prompt_tokens == usage["lora"].computed_tokens
    assert usage["alora"].computed_tokens < usage["alora"].prompt_tokens


def test_random_adapters_change_the_layers_that_are_named(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tiny_bundle, "--adapters", 1, "--targets", "q_proj,v_proj", "--out", tmp_path / "some")
    config = json.loads((tmp_path / "some" / "task00" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["r"] == 16
    for wrong in (["--targets", "q_proj,w_proj", "--out", tmp_path / "new"], ["--out", tmp_path]):
        with pytest.raises(SystemExit):
            make(tiny_bundle, *wrong)
    said = capsys.readouterr().err
    assert "has no w_proj, but down_proj" in said and "is there already" in said and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_our_load_generator_beside_other_peoples_tools(tmp_path: Path, tiny_bundle: Path) -> None:
    """The others are in environments of their own: `make test-clients` runs one of them."""
    command = [sys.executable, "-m", "benchmarks.other_tools", str(tiny_bundle), "--adapters", "task0,task1"]
    run = subprocess.run(
        [*command, "--requests", "3", "--tokens", "20", "--rounds", "2", "--out", str(tmp_path)],
        cwd=serving.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    ours = json.loads((tmp_path / "report.json").read_text())["tools"]["ours"]
    assert ours["p50_ms"]["rounds"] == 2 and ours["requests_per_s"]["low"] > 0 and ours["agrees"]


@pytest.mark.parametrize(("one", "other", "same"), [((9, 11), (10, 14), True), ((9, 11), (12, 14), False)])
def test_tools_agree_where_their_spreads_overlap(
    one: tuple[float, float], other: tuple[float, float], same: bool
) -> None:
    spreads = [Spread(median=low, low=low, high=high, rounds=3) for low, high in (one, other)]
    assert other_tools.agree(*spreads) == other_tools.agree(*reversed(spreads)) == same


@pytest.mark.slow
def test_a_bundle_like_the_demo_is_built(tmp_path: Path) -> None:
    """From a few random dialogues in two steps: nothing is learnt, but every stage runs, and the result is served."""
    draw, words = random.Random(0), "I need a table flight hotel to for in book cancel please thanks bye".split()
    for split, num in (("train", 32), ("dev", 8)):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            for i in range(num):
                text = "\n".join(f"{who}: {' '.join(draw.choices(words, k=6))}" for who in ("Customer", "Agent"))
                file.write(json.dumps({"id": i, "conversation": text, "labels": {"isOdd": i % 2 == 1}}) + "\n")
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [{"name": "isOdd", "question": "Is it odd?"}]}))
    command = [sys.executable, "examples/support_desk/build.py", str(tmp_path), "--work", str(tmp_path / "work")]
    small = ["--out", str(tmp_path / "bundle"), "--base-steps", "2", "--adapter-examples", "16"]
    run = subprocess.run([*command, *small], cwd=serving.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with Loraplex.load(tmp_path / "bundle") as loraplex:
        assert loraplex.classify("Customer: hello")["isOdd"].label in ("yes", "no")


def test_questions_are_measured_in_one_order_and_in_both(tmp_path: Path) -> None:
    asked.save_chat_bundle(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text(
        '{"text": "Customer: a flight", "labels": {"isTravel": true}}\n'
        '{"text": "Customer: my bill", "labels": {"isTravel": false, "topic": "money"}}\n'
    )
    (tmp_path / "questions.yaml").write_text(
        'isTravel: "Is it about travel?"\ntopic: {type: choice, instructions: "What about?", labels: [travel, money]}\n'
    )
    files = ["--data", str(tmp_path / "data.jsonl"), "--questions", str(tmp_path / "questions.yaml")]
    command = [sys.executable, "-m", "benchmarks.questions", str(tmp_path / "base"), *files]
    run = subprocess.run(command, capture_output=True, text=True, cwd=serving.ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ")[:3] for line in run.stdout.splitlines()[2:]]
    names = [("isTravel", "2"), ("topic", "1")]
    assert rows == [[f"| {name}", order, n] for order in ("one order", "both orders") for name, n in names]


@pytest.mark.slow
def test_typed_questions_are_measured_over_http(tmp_path: Path) -> None:
    asked.save_chat_bundle(tmp_path / "base")
    texts = ("Customer: a flight", "Customer: my bill", "Customer: a flight", "Customer: a table")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text, "labels": {}}) + "\n" for text in texts))
    (tmp_path / "questions.yaml").write_text(
        'isTravel: "Is it about travel?"\ntopic: {type: choice, instructions: "What about?", labels: [travel, money]}\n'
        'anger: {type: score, instructions: "How angry?", labels: [not, very]}\n'
    )
    files = ["--data", str(tmp_path / "data.jsonl"), "--questions", str(tmp_path / "questions.yaml")]
    command = [sys.executable, "-m", "benchmarks.decisions", str(tmp_path / "base"), *files, "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=serving.ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "report.json").read_text())["servers"]["loraplex"]
    assert found["seconds"]["median"] > 0 and found["ratio"]["median"] == 1
    assert 0 < found["computed_tokens"] < found["prompt_tokens"], "a text is computed once for all its questions"
