"""What is unloaded is really gone: measured on a process of its own, not on our own books."""

import gc
import subprocess
import sys
from pathlib import Path

import psutil
from transformers import LlamaConfig

from loraplex import Loraplex

MIB = 2**20


def test_unloading_frees_the_memory(tmp_path: Path) -> None:
    import tiny

    config = LlamaConfig(**{**tiny._COMMON, "hidden_size": 512, "intermediate_size": 1024})
    tiny.save_base(tmp_path, config)
    tiny.save_adapter(tmp_path, tmp_path / "big", r=512)
    run = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def rss() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / MIB


def check(folder: Path) -> None:
    num_bytes = (folder / "big" / "adapter_model.safetensors").stat().st_size
    assert num_bytes > 30 * MIB
    with Loraplex.load(folder, dtype="float32", preload="none", host_memory="1GiB") as loraplex:
        loraplex.load_adapter("warm", folder / "big")
        loraplex.unload_adapter("warm")
        before = rss()
        for name in ("one", "two"):  # the same weights: in one place, and in host memory once
            loraplex.load_adapter(name, folder / "big")
        loaded = rss()
        growth = (loaded - before) * MIB / num_bytes
        assert 1.5 < growth < 3.6, growth  # some of it freed, but kept by malloc
        loraplex.unload_adapter("one")
        growth = (rss() - before) * MIB / num_bytes
        assert growth > 1.5, growth
        loraplex.classify("hello", "two")
        loraplex.unload_adapter("two")
        growth = (rss() - before) * MIB / num_bytes
        assert growth < 0.3, growth
        growths = []
        for _ in range(10):
            loraplex.load_adapter("again", folder / "big")
            loraplex.unload_adapter("again")
            growths.append((rss() - before) * MIB / num_bytes)
        # What leaks adds up. Now and then malloc keeps, until the next time, what one of its arenas had at the end.
        assert min(growths[5:]) < 0.5, growths


if __name__ == "__main__":
    check(Path(sys.argv[1]))
