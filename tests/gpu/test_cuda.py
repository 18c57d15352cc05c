"""The same model on CUDA and on the CPU."""

from pathlib import Path

import pytest

from loraplex import Loraplex

TEXTS = ["Customer: hello", "Customer: hello, I would like to book a table\nAgent: at what time?" * 5]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_cuda_equals_the_cpu(tiny_bundle: Path, dtype: str, tolerance: float) -> None:
    with (
        Loraplex.load(tiny_bundle, device="cpu", dtype="float32") as cpu,
        Loraplex.load(tiny_bundle, device="cuda", dtype=dtype) as cuda,
    ):
        for text in TEXTS:
            for expected, actual in zip(cpu.classify(text).verdicts, cuda.classify(text).verdicts, strict=True):
                if expected.scores is not None and actual.scores is not None:
                    assert actual.scores["yes"] == pytest.approx(expected.scores["yes"], abs=tolerance)
