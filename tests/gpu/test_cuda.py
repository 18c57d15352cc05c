"""The same model on CUDA and on the CPU: adapters mixed, a conversation shared and kept, and text generated."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import tiny
from loraplex import Loraplex
from loraplex.ops import reference
from loraplex.ops.attention import packed_attention
from loraplex.ops.layout import Span, layout_of
from loraplex.ops.staging import Staging

pytestmark = pytest.mark.gpu

TEXTS = ["Customer: hello", "Customer: hello, I would like to book a table\nAgent: at what time?" * 3]
DTYPES = [("float32", 1e-4), ("bfloat16", 0.1)]


@pytest.fixture(scope="module", params=["mistral", "mistral-window", "gemma2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("cuda") / "bundle", tiny.FAMILIES[request.param])


@pytest.fixture(scope="module")
def cpu(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, device="cpu", dtype="float32", kv_cache="0") as cpu:
        yield cpu


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_shared_conversation_and_its_next_turn_equal_the_cpus(
    bundle: Path, cpu: Loraplex, dtype: str, tolerance: float
) -> None:
    names = ["active0", "active1", "active2", "plain"]
    with Loraplex.load(bundle, device="cuda", dtype=dtype, kv_cache="8MiB", max_step_tokens=64) as cuda:
        for text in TEXTS:
            for turn in (text, text + "\nCustomer: and at seven?"):
                answer = cuda.classify(turn, names, conversation_id="x")
                for expected, actual in zip(cpu.classify(turn, names).verdicts, answer.verdicts, strict=True):
                    assert actual.scores == pytest.approx(expected.scores, abs=tolerance)
            assert answer.usage.cached_tokens > 0


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_captured_steps_equal_the_cpus(
    bundle: Path, cpu: Loraplex, dtype: str, tolerance: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts that come again, and an adapter replaced between them."""
    names = ["active0", "active1", "active2", "plain"]
    with (
        mock.patch.object(
            torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay
        ) as replay,
        Loraplex.load(bundle, device="cuda", dtype=dtype, kv_cache="0", cuda_graphs=True) as cuda,
    ):
        for i in range(10):
            if i == 5:  # it leaves its place, and comes to the same one
                cuda.unload_adapter("plain")
                cuda.load_adapter("plain", bundle / "plain")
            for text in TEXTS:
                expected, actual = cpu.classify(text, names), cuda.classify(text, names)
                for one, other in zip(expected.verdicts, actual.verdicts, strict=True):
                    assert other.scores == pytest.approx(one.scores, abs=tolerance)
        has_fused_layers = "CUDA graphs are captured for our own decoder only" not in caplog.text
    assert bool(replay.call_count) == has_fused_layers
    assert "no longer captured" not in caplog.text


def test_generated_text_equals_the_cpus(bundle: Path, cpu: Loraplex) -> None:
    with Loraplex.load(bundle, device="cuda", dtype="float32") as cuda:
        for name in ("plain", "verbatim", None):
            prompt = TEXTS[1] + "<|ask|>"
            expected, actual = (one.generate(prompt, name, max_tokens=24) for one in (cpu, cuda))
            assert [token.id for token in actual.tokens] == [token.id for token in expected.tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_equals_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    query, key, value = (torch.randn(90, heads, 64, device=device, dtype=dtype) for heads in (8, 2, 2))
    cache = tuple(torch.randn(64, 2, 64, device=device, dtype=dtype) for _ in range(2))
    cached = torch.arange(32, device=device)
    spans = (
        Span(start=0, end=50, position=32, cached=cached),
        Span(start=50, end=62, position=82, cached=cached, ancestors=((0, 50),)),
        Span(start=62, end=71, position=82, cached=cached, ancestors=((0, 50),)),
        Span(start=71, end=90),
    )
    last = tuple(replace(span, row=row) for row, span in enumerate(spans))
    rows = [span.end - 1 for span in spans]
    staging = Staging(device)
    layouts = [(query, layout_of(spans, staging)), (query[rows], layout_of(last, staging))]
    staging.send()
    for asked, layout in layouts:
        for window in (None, 7):
            options = dict(cache=(cache[0], cache[1]), scaling=0.125, window=window)
            actual = packed_attention(asked, key, value, layout, **options)  # type: ignore[arg-type]
            expected = reference.packed_attention(asked, key, value, layout, **options)  # type: ignore[arg-type]
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_an_adapter_is_replaced_on_the_device(bundle: Path) -> None:
    with Loraplex.load(bundle, device="cuda", dtype="float32") as cuda:
        before = cuda.classify(TEXTS[0], "plain")["plain"]
        cuda.load_adapter("plain", bundle / "active0")
        assert cuda.classify(TEXTS[0], "plain")["plain"].scores != before.scores
        allocated = torch.cuda.memory_allocated()
        cuda.unload_adapter("plain")
        assert torch.cuda.memory_allocated() < allocated
