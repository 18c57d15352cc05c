"""The same bundle on CUDA and on the CPU: adapters mixed, a conversation shared and kept, and text generated."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import recorded
import tiny
from loraplex import Loraplex
from loraplex.executors import native

pytestmark = pytest.mark.gpu

NAMES = ["active0", "active1", "active2", "plain"]
TEXTS = ["Customer: hello", "Customer: hello, I would like to book a table\nAgent: at what time?" * 3]
DTYPES = [("float32", 1e-4), ("bfloat16", 0.25)]  # these random models are sharp: bfloat16 moves them by 0.1


@pytest.fixture(scope="module", params=["mistral", "mistral-window", "gemma2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("cuda") / "bundle", tiny.FAMILIES[request.param])


@pytest.fixture(scope="module")
def cpu(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, device="cpu", dtype="float32", kv_cache="0") as cpu:
        yield cpu


@pytest.fixture
def num_replayed(device: torch.device) -> Iterator[Callable[[], int]]:
    """Counts the replays of CUDA graphs; in a rehearsal those of the stand-in."""
    if device.type == "cpu":
        stand_in = recorded.Recorded()
        with mock.patch.object(native, "CUDACapture", lambda device: stand_in):
            yield lambda: stand_in.num_replayed
    else:
        graph = torch.cuda.CUDAGraph
        with mock.patch.object(graph, "replay", autospec=True, side_effect=graph.replay) as replay:
            yield lambda: replay.call_count


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_shared_conversation_and_its_next_turn_equal_the_cpus(
    bundle: Path, cpu: Loraplex, device: torch.device, dtype: str, tolerance: float
) -> None:
    options: dict[str, Any] = {"device": str(device), "dtype": dtype, "kv_cache": "8MiB", "max_step_tokens": 64}
    with Loraplex.load(bundle, **options) as there:
        for text in TEXTS:
            for turn in (text, text + "\nCustomer: and at seven?"):
                answer = there.classify(turn, NAMES, conversation_id="x")
                for expected, actual in zip(cpu.classify(turn, NAMES).verdicts, answer.verdicts, strict=True):
                    assert actual.scores == pytest.approx(expected.scores, abs=tolerance)
            assert answer.usage.cached_tokens > 0


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_captured_steps_equal_the_cpus(
    bundle: Path,
    cpu: Loraplex,
    device: torch.device,
    num_replayed: Callable[[], int],
    dtype: str,
    tolerance: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Texts that come again, and an adapter that leaves its slot and comes back to the same one."""
    with Loraplex.load(bundle, device="auto", dtype=dtype, kv_cache="0", cuda_graphs=True) as there:
        for i in range(10):
            if i == 5:
                there.unload_adapter("plain")
                there.load_adapter("plain", bundle / "plain")
            for text in TEXTS:
                expected, actual = cpu.classify(text, NAMES), there.classify(text, NAMES)
                for one, other in zip(expected.verdicts, actual.verdicts, strict=True):
                    assert other.scores == pytest.approx(one.scores, abs=tolerance)
        has_own_decoder = "CUDA graphs are captured for our own decoder only" not in caplog.text
    assert bool(num_replayed()) == has_own_decoder
    assert "no longer captured" not in caplog.text


def test_adapters_come_and_go_while_steps_are_captured(
    bundle: Path, cpu: Loraplex, device: torch.device, num_replayed: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    """Unloading gives memory back to the driver, which a capture on another thread would not survive."""
    texts = [TEXTS[1] + " please" * i for i in range(12)]
    expected = {text: cpu.classify(text, "active0")["active0"].scores for text in texts}
    with Loraplex.load(bundle, device="auto", dtype="float32", kv_cache="0", cuda_graphs=True) as there:
        stop, errors = threading.Event(), []

        def swap() -> None:
            try:
                while not stop.is_set():
                    there.unload_adapter("plain")
                    there.load_adapter("plain", bundle / "plain")
            except Exception as exc:
                errors.append(exc)

        swapping = threading.Thread(target=swap)
        swapping.start()
        try:
            for _ in range(4):  # each length is captured when it comes for the third time
                for text in texts:
                    assert there.classify(text, "active0")["active0"].scores == pytest.approx(expected[text], abs=1e-4)
        finally:
            stop.set()
            swapping.join()
    assert errors == []
    assert "no longer captured" not in caplog.text


def test_generated_text_equals_the_cpus(bundle: Path, cpu: Loraplex, device: torch.device) -> None:
    with Loraplex.load(bundle, device=str(device), dtype="float32") as there:
        for name in ("plain", "verbatim", None):
            prompt = TEXTS[1] + "<|ask|>"
            expected, actual = (one.generate(prompt, name, max_tokens=24) for one in (cpu, there))
            assert [token.id for token in actual.tokens] == [token.id for token in expected.tokens]


def test_an_adapter_is_replaced_on_the_device(bundle: Path, device: torch.device) -> None:
    with Loraplex.load(bundle, device=str(device), dtype="float32") as there:
        before = there.classify(TEXTS[0], "plain")["plain"]
        there.load_adapter("plain", bundle / "active0")
        assert there.classify(TEXTS[0], "plain")["plain"].scores != before.scores


def test_an_unloaded_adapter_gives_its_memory_back(bundle: Path, cuda: torch.device) -> None:
    with Loraplex.load(bundle, device=str(cuda), dtype="float32") as there:
        there.classify(TEXTS[0], "plain")
        allocated = torch.cuda.memory_allocated()
        there.unload_adapter("plain")
        assert torch.cuda.memory_allocated() < allocated
