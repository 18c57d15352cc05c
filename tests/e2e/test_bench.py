"""`loraplex bench` as users run it, on a tiny bundle; what it measures here means nothing."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import serving

WAIT_S = 120  # a loaded machine is slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = "Customer: hello number {}, I would like to book a table for two, is it done?"
    text = asked + "\nAgent: at what time?\nCustomer: at seven, thanks"
    rows = [{"conversation": text.format(i), "labels": {"task0": i % 2 == 0, "task1": "no"}} for i in range(12)]
    path = tmp_path_factory.mktemp("bench") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def bench(bundle: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    options = ["--data", data, "--out", out, "--dtype", "float32", "--slices", "2", "--concurrency", "2"]
    run = serving.loraplex("bench", bundle, *options, *more)
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert "conversations/s" in run.stdout and "PEFT" in (out / "report.md").read_text()
    return found


@pytest.mark.slow
def test_over_http_beside_peft(tiny_bundle: Path, tiny_server: serving.Server, data: Path, tmp_path: Path) -> None:
    more = ["--systems", "native,peft", "--url", f"native={tiny_server.url}"]
    found = bench(tiny_bundle, data, tmp_path / "out", *more)
    for name in ("native", "peft"):
        one = found["systems"][name]
        [load] = one["loads"]
        assert one["state"] == "measured" and one["transport"] == "http"
        assert load["requests"] == {"ok": 12, "refused": 0, "failed": 0, "timeout": 0, "errors": {}}
        assert load["latency_ms"]["p50"]["rounds"] == 2 and load["http_adds_ms"]["median"] > 0
        assert load["share_of_gemm_rate"] > 0 and load["floor"]["flop_per_conversation"] > 0
        assert one["quality"]["classifiers"].keys() == {"task0", "task1"}
    memory = found["systems"]["peft"]["memory"]
    assert memory["peak_rss_bytes"] >= memory["starting_rss_bytes"] > 10**8
    assert found["systems"]["native"]["memory"]["peak_rss_bytes"] is None, "it was not started here"
    agreed = found["systems"]["native"]["agreement"]
    assert agreed["with"] == "peft" and agreed["verdicts"] == agreed["labels_equal"] == 36
    assert 0 < agreed["difference_max"] < 1e-3
    assert found["about"]["settings"]["concurrency"] == 2 and len(found["data"]["sha256"]) == 64


@pytest.mark.slow
def test_in_process_turn_by_turn_with_a_request_for_each_classifier(
    tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    more = ["--systems", "native", "--in-process", "--turns", "--ask", "each", "--classifiers", "task0,task1"]
    found = bench(tiny_bundle, data, tmp_path / "out", *more)
    one = found["systems"]["native"]
    first, second = one["turns"]
    assert first["conversations"] == second["conversations"] == 12
    assert second["tokens_asked"] > first["tokens_asked"] and second["cached_share"] > first["cached_share"]
    assert one["transport"] == "in-process" and one["loads"][0]["requests"]["ok"] == 12 * 2 * 2
    assert {row[6] for row in found["samples"]["rows"]} == {"task0", "task1"}


def test_an_interrupt_ends_the_processes_and_writes_a_report(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--data", data, "--out", out, "--systems", "native", "--rate", "1", "--seconds", "600"]
    with serving.started("bench", tiny_bundle, *options) as process:
        log, end = out / "native.log", time.monotonic() + WAIT_S
        while not (log.exists() and "ready" in log.read_text()):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        servers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
    assert servers and not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in servers)
    found = json.loads((out / "report.json").read_text())
    assert found["cut_short"] and "interrupted" in (out / "report.md").read_text()
