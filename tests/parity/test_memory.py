"""What is unloaded is really gone: measured on the process, not on our own books."""

import gc
from pathlib import Path

import psutil
from transformers import LlamaConfig

import tiny
from loraplex import Loraplex

MIB = 2**20


def rss() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / MIB


def test_unloading_frees_the_memory(tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny._COMMON, "hidden_size": 512, "intermediate_size": 1024})
    tiny.save_base(tmp_path, config)
    tiny.save_adapter(tmp_path, tmp_path / "big", r=512)
    num_bytes = (tmp_path / "big" / "adapter_model.safetensors").stat().st_size
    assert num_bytes > 30 * MIB
    gc.collect()  # what others left, and PEFT just now, so that it goes back before the first measurement
    with Loraplex.load(tmp_path, dtype="float32", preload="none", host_memory="1GiB") as loraplex:
        loraplex.load_adapter("warm", tmp_path / "big")
        loraplex.unload_adapter("warm")
        before = rss()
        for name in ("one", "two"):  # the same weights: in one place, and in host memory once
            loraplex.load_adapter(name, tmp_path / "big")
        loaded = rss()
        assert 1.5 * num_bytes / MIB < loaded - before < 3.6 * num_bytes / MIB  # some of it freed, but kept by malloc
        loraplex.unload_adapter("one")
        assert rss() > before + 1.5 * num_bytes / MIB
        loraplex.classify("hello", "two")
        loraplex.unload_adapter("two")
        assert rss() < before + 0.3 * num_bytes / MIB
        for _ in range(10):
            loraplex.load_adapter("again", tmp_path / "big")
            loraplex.unload_adapter("again")
        assert rss() < before + 0.5 * num_bytes / MIB
