"""Percentiles, spreads, what a report says about the machine, and memory seen from outside."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from loraplex.measuring.about import about, command
from loraplex.measuring.cores import BusyCores
from loraplex.measuring.files import write_report, write_text
from loraplex.measuring.limits import bandwidth, gemm_rate
from loraplex.measuring.memory import PeakMemory, peak_rss_bytes, rss_bytes, tree
from loraplex.measuring.samples import Spread, percentile, wilson

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, 1.0), (0.01, 1.0), (0.5, 50.0), (0.9, 90.0), (0.99, 99.0), (0.991, 100.0), (1.0, 100.0)],
)
def test_a_percentile_is_one_of_the_values(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], share) == expected


def test_no_values_have_no_percentile_and_no_spread() -> None:
    assert percentile([], 0.5) is None
    assert Spread.of([None, None]) is None


def test_wilsons_interval() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 1)[1] == 1.0


def test_a_spread_leaves_out_rounds_without_a_value() -> None:
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, rounds=3)


def test_about_names_the_machine_and_is_json() -> None:
    found = json.loads(json.dumps(about(CPU, torch.bfloat16)))
    assert found["versions"]["torch"] == torch.__version__
    assert found["dtype"] == "bfloat16" and found["cores"] >= 1 and found["memory_bytes"] > 2**30


def test_cores_are_busy_with_what_computes() -> None:
    script = "import sys\nwhile not sys.stdin.closed: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        with BusyCores(process.pid) as watched:
            time.sleep(0.3)
        process.kill()
    assert watched.busy.system > 10 * watched.busy.client and watched.busy.system > 0.05


def test_limits_are_what_was_computed_or_moved_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_second(function: Callable[[], object], device: torch.device) -> float:
        function()
        return 0.5

    monkeypatch.setattr("loraplex.measuring.limits._seconds", half_a_second)
    layers = [(64, 32, 2), (16, 32, 1)]
    assert gemm_rate(layers, CPU, torch.float32, num_rows=64) == 2 * 64 * 32 * (2 * 64 + 16) / (3 * 0.5)
    assert bandwidth(CPU) == 2 * 2**27 / 0.5


def test_peak_memory_sees_what_a_child_took_and_gave_back() -> None:
    script = "taken = bytearray(2 * 10**8); input(); del taken; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        with PeakMemory(process.pid) as peak:
            while peak.rss_bytes < 2e8:
                time.sleep(0.01)
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            assert rss_bytes([psutil.Process(process.pid)]) < 1.5e8
        assert 2e8 < peak.rss_bytes < 3e8
        process.stdin.write(b"\n")


def test_pages_that_processes_share_count_once() -> None:
    script = """
import os, sys
taken = os.urandom(10**8)
if os.fork():
    os.wait()
else:
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        with PeakMemory(process.pid) as peak:
            assert rss_bytes(tree(psutil.Process(process.pid))) > 2e8
        assert 1e8 < peak.rss_bytes < 1.6e8
        process.stdin.close()


def test_a_report_holds_figures_only_and_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(path, {"ms": 1.5})
    with pytest.raises(ValueError):
        write_report(path, {"ms": float("nan")})
    assert json.loads(path.read_text()) == {"ms": 1.5}
    assert [one.name for one in path.parent.iterdir()] == ["report.json"]


def test_a_processes_own_peak_stays_when_the_memory_is_given_back() -> None:
    script = (
        "from loraplex.measuring.memory import peak_rss_bytes; before = peak_rss_bytes(); "
        "taken = bytearray(2 * 10**8); del taken; print(peak_rss_bytes() - before)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1.5e8 < int(run.stdout) < 2.5e8
    assert peak_rss_bytes() > 1e8  # bytes, and not kB


@pytest.mark.parametrize(
    ("spec", "path", "expected"),
    [
        (None, "/any/bin/loraplex", "loraplex 'a b'"),
        (ModuleSpec("benchmarks.engine", None), "/any/benchmarks/engine.py", "python -m benchmarks.engine 'a b'"),
        (ModuleSpec("loraplex.__main__", None), "/any/__main__.py", "python -m loraplex 'a b'"),
    ],
)
def test_the_command_is_as_it_is_typed(
    spec: ModuleSpec | None, path: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    main.__spec__ = spec
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [path, "a b"])
    assert command() == expected


def test_a_written_file_keeps_its_permissions_and_a_link_its_file(tmp_path: Path) -> None:
    file, link = tmp_path / "there" / "file", tmp_path / "link"
    write_text(file, "first", is_private=True)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    link.symlink_to(file)
    write_text(link, "second")
    assert link.is_symlink() and file.read_text() == "second" and file.stat().st_mode & 0o777 == 0o640
    write_text(tmp_path / "plain", "third")
    assert (tmp_path / "plain").stat().st_mode & 0o044 == 0o044
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["file", "link", "plain", "there"]
