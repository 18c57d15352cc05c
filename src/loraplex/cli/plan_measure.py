"""Measures the memory of a bundle on this CPU: loads it in a process of its own, asks it, and looks after each stage.

python -m loraplex.cli.plan_measure BUNDLE DTYPE KV_CACHE
"""

import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from loraplex.errors import EngineError
from loraplex.planning.asked import MOST_TOGETHER

KV_CACHE = "64MiB"  # enough to see, and soon full
TIMEOUT_S = 900
NUM_FIRST, NUM_KEPT = 10, 16  # conversations, each of two turns
NUM_WORDS = 10, 120
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_apart(bundle: str, dtype: str, kv_cache: str = KV_CACHE) -> dict[str, int]:
    """Return the resident memory that each part takes, in bytes. Raises EngineError where the process fails.

    process:  Python, the libraries and the tokenizer, before the base is read, and what the first passes add.
    K/V cache: what its tensors took once traffic had filled them.
    traffic:  workspace of steps, stacked adapters, and what the kernels keep.
    total:    the most while it was asked.
    """
    if not CLEAR.exists():
        raise EngineError("--measure reads /proc, which this machine lacks", remedy="measure on Linux")
    command = [sys.executable, "-m", "loraplex.cli.plan_measure", bundle, dtype, kv_cache]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise EngineError(
            f"{bundle} was not measured: {last}", remedy=f"see why with: loraplex serve {bundle}, or free memory"
        )
    found: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return found


def _resident(key: str = "VmRSS") -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))


def _measure(path: str, dtype: str, kv_cache: str) -> dict[str, int]:
    from loraplex.bundle import open_bundle
    from loraplex.executors import native
    from loraplex.inprocess import Loraplex

    for imported in ("loraplex.cli.serve", "loraplex.server.process"):  # as `loraplex serve` does
        importlib.import_module(imported)
    marks: dict[str, int] = {}
    load_model: Callable[..., Any] = native.__dict__["load_model"]

    def marked(*args: Any) -> Any:
        marks["start"] = _resident()
        model = load_model(*args)
        marks["weights"] = _resident()
        return model

    bundle = open_bundle(path, require_all=False)
    engine: dict[str, Any] = {"dtype": dtype, "device": "cpu", "kv_cache": kv_cache, "preload": "none"}
    engine |= {"host_memory": "50%", "adapter_memory": "50%"}
    with patch.object(native, "load_model", marked), Loraplex.load(bundle.root or path, **engine) as served:
        marks["ready"] = _resident()
        names = [source.name for source in bundle.adapters if source.error is None]
        for source in bundle.adapters:
            if source.error is None:
                served.load_adapter(source.name, source.path.resolve())
        marks["adapters"] = _resident()
        CLEAR.write_text("5")  # from here on VmHWM is the most since now
        asked = names[:MOST_TOGETHER]
        _ask(served, asked, None)
        marks["asked"] = _resident()
        _ask(served, asked, "kept")
        marks["kept"], total = _resident(), _resident("VmHWM")
    return {
        "process": marks["start"] + marks["ready"] - marks["weights"],
        "weights": marks["weights"] - marks["start"],
        "adapters": marks["adapters"] - marks["ready"],
        "traffic": marks["asked"] - marks["adapters"],
        "K/V cache": marks["kept"] - marks["asked"],
        "total": total,
    }


def mean_text() -> str:
    """Return a text of the mean length of those that are asked."""
    return _text(random.Random(0), sum(NUM_WORDS) // 2)


def _text(draw: random.Random, num_words: int) -> str:
    return "Customer: " + " ".join(f"w{draw.randrange(100)}" for _ in range(num_words))


def _ask(loraplex: Any, names: list[str], conversation: str | None) -> None:
    """Ask about conversations of many lengths. With an id their K/V is kept, which fills the cache."""
    if not names:
        return
    draw = random.Random(0)
    for index in range(NUM_KEPT if conversation else NUM_FIRST):
        text = _text(draw, draw.randrange(*NUM_WORDS))
        id = None if conversation is None else f"{conversation}{index}"
        loraplex.classify(text, names, conversation_id=id, cascade=False)
        loraplex.classify(f"{text} w1 w2 w3 w4 w5 w6", names, conversation_id=id, cascade=False)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(json.dumps(_measure(*sys.argv[1:4])))
