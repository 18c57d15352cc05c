"""Budgets and threads."""

import os
from pathlib import Path

import pytest
import torch

from loraplex.model import machine
from loraplex.model.machine import budget_bytes, choose_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "expected"), [("0", 0), ("1KiB", 1024), ("1.5GiB", 3 * 2**29), ("50%", 500), ("0%", 0), ("12.5%", 125)]
)
def test_budgets(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    monkeypatch.setattr(machine, "_free_bytes", lambda device: 1000)
    assert budget_bytes(given, CPU) == expected


@pytest.mark.parametrize(
    ("content", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("10000 100000", 1.0)]
)
def test_the_containers_share(tmp_path: Path, content: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    every = float(os.cpu_count() or 1)
    assert machine._cpu_quota(tmp_path / "cpu.max") == (cores or every)
    assert machine._cpu_quota(tmp_path / "missing") == every


def test_threads_fit_the_share_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    choose_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_threads()
    assert chosen == [1]
