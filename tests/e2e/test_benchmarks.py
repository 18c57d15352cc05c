"""The benchmarks run and report all that they promise; what they measure here means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import serving


def test_the_engine_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.engine", "--shape", "tiny", "--rounds", "1"]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")], cwd=serving.ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["cases"]) == 8 and len(report["ratios"]) == 5
    assert all(case["share_of_roofline"] > 0 for case in report["cases"].values())
    assert "16 verdicts, shared" in run.stdout


def test_the_adapter_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.adapters", "--shape", "tiny", "--adapters", "24", "--places", "8"]
    run = subprocess.run(
        [*command, "--requests", "20", "--rounds", "1", "--json", str(tmp_path / "report.json")],
        cwd=serving.ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["many"]["requests_per_s_all"] > 0 and report["cold"]["disk_ms"] > 0 and report["swaps"]["swaps"] > 0
