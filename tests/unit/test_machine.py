"""Budgets and threads."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import tiny
from loraplex import Loraplex, machine
from loraplex.errors import ConfigurationError
from loraplex.executors import native
from loraplex.executors.native import NativeExecutor
from loraplex.machine import bound_kernel_caches, budget_bytes, choose_threads, compute_alone
from loraplex.service.classifiers import ClassifierReader

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "expected"), [("0", 0), ("1KiB", 1024), ("1.5GiB", 3 * 2**29), ("50%", 500), ("0%", 0), ("12.5%", 125)]
)
def test_budgets(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    assert budget_bytes(given, CPU) == expected


@pytest.mark.parametrize("is_refused_late", [False, True])
def test_kv_that_does_not_fit_is_told_with_what_is_free(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, is_refused_late: bool
) -> None:
    """Late: the machine does not say what is free, or another process took it meanwhile."""
    if is_refused_late:
        monkeypatch.setattr(native, "free_bytes", lambda device: 0)
    with pytest.raises(ConfigurationError, match=r"--kv-cache 900000GiB: does not fit: .* are free on cpu"):
        Loraplex.load(tiny_bundle, dtype="float32", device="cpu", kv_cache="900000GiB")


@pytest.mark.parametrize(
    ("content", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("10000 100000", 1.0)]
)
def test_the_containers_share(tmp_path: Path, content: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    every = float(os.cpu_count() or 1)
    assert machine.cpu_quota(tmp_path / "cpu.max") == (cores or every)
    assert machine.cpu_quota(tmp_path / "missing") == every


@pytest.mark.parametrize(
    ("limit", "used", "cached", "left"),
    [
        ("1000", 300, 100, 800),
        ("1000", 1000, 0, 1),
        ("1000", 1100, 0, 1),
        ("max", 300, 100, None),
        ("", 300, 100, None),
    ],
)
def test_memory_is_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: int, cached: int, left: int | None
) -> None:
    """A container may have less than the machine. Files that the kernel has cached for it are not in use."""
    machines = machine.free_bytes(CPU)
    assert machines > 10_000
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {used - cached}\nactive_file {cached // 3}\ninactive_file {cached - cached // 3}\n"
    )
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = machine.free_bytes(CPU)
    assert free == left if left is not None else free > 10_000
    (tmp_path / "memory.stat").unlink()
    assert machine.free_bytes(CPU) > 10_000


def test_threads_fit_the_share_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    choose_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_threads()
    assert chosen == [1]


def test_a_thread_computes_alone_and_leaves_the_others_as_they_were() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=compute_alone) as alone, ThreadPoolExecutor(1) as other:
        assert alone.submit(torch.get_num_threads).result() == 1
        alone.submit(torch.add, torch.ones(1 << 20), 1).result()
        assert alone.submit(torch.get_num_threads).result() == 1
        assert other.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_beside_the_engine_adapters_are_read_and_placed_on_threads_that_compute_alone(tmp_path: Path) -> None:
    seen: dict[str, set[int]] = {"read": set(), "set_slot": set(), "load": set()}

    def noting(owner: type, name: str) -> Any:
        real = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            seen[name].add(torch.get_num_threads())
            return real(*args)

        return mock.patch.object(owner, name, wrapped)

    bundle = tiny.save_shared_bundle(tmp_path / "bundle")
    with (
        noting(ClassifierReader, "read"),
        noting(NativeExecutor, "set_slot"),
        noting(NativeExecutor, "load"),
        Loraplex.load(bundle, dtype="float32") as loraplex,
    ):
        loraplex.load_adapter("again", bundle / "plain")
        assert seen == {"read": {1}, "set_slot": {1}, "load": {torch.get_num_threads()}}
        assert not [one for one in threading.enumerate() if one.name.startswith("loraplex-load")]


def test_kernel_caches_are_bounded_unless_the_environment_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    bound_kernel_caches()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("64", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
