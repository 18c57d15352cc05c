"""Small steps that are captured and replayed, by a stand-in for CUDA's graphs: nothing but time may change."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import recorded
import tiny
from checks import memo_of
from loraplex import Loraplex
from loraplex.errors import UnsupportedModelError
from loraplex.executors import native
from loraplex.model.graphs import capturing

NAMES = ["active0", "active1", "active2", "plain"]
TEXT = "Customer: hello, is it done?"
NUM_PIECES = 2 * (tiny.FAMILIES["mistral"].num_hidden_layers - 1)  # before and after attention, but for the last layer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("graphs") / "bundle")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_steps_that_come_again_are_replayed(tmp_path: Path, family: str) -> None:
    """Texts of other words and, nearly, other lengths are steps of the same segments."""
    bundle, counted = tiny.save_shared_bundle(tmp_path / "bundle", tiny.FAMILIES[family]), recorded.Recorded()
    texts = [TEXT + word for word in (" seven", " is it?", " two", " hello")]  # of 12, 12, 11 and 11 tokens
    with (
        Loraplex.load(bundle, dtype="float32", kv_cache="0") as plain,
        recorded.captures(counted, at=3),
        Loraplex.load(bundle, dtype="float32", kv_cache="0", cuda_graphs=True) as captured,
    ):
        for name in NAMES:
            captured.classify(TEXT + " hello, hello, hello", name)  # so that all are on the device
        counted.num_replayed = 0
        for i, text in enumerate(texts):
            assert_equal(captured, plain, text, NAMES)
            num_captured = 0 if family == "gemma2" or i < 2 else NUM_PIECES
            assert (counted.num_captured, counted.num_replayed) == (num_captured, num_captured * max(0, i - 1))


def test_what_is_captured_goes_with_the_adapter(bundle: Path, tmp_path: Path) -> None:
    """An adapter of other weights gets the place of one that has left, and nobody else's graphs are lost."""
    counted = recorded.Recorded()
    tiny.save_adapter(bundle, tmp_path / "other", contract=tiny.CONTRACT, seed=7, r=2)
    options: dict[str, Any] = {"dtype": "float32", "kv_cache": "0", "adapter_root": (str(tmp_path),)}
    with (
        Loraplex.load(bundle, **options) as plain,
        recorded.captures(counted, at=1),
        Loraplex.load(bundle, **options, cuda_graphs=True) as captured,
    ):
        for loraplex in (plain, captured):
            loraplex.load_adapter("other", str(tmp_path / "other"))
            loraplex.unload_adapter("active0")
        for name in ("plain", "other"):
            assert_equal(captured, plain, TEXT, [name])
        slot, before = place_of(captured, "other"), captured.classify(TEXT, "other")["other"].scores
        tiny.save_adapter(bundle, tmp_path / "another", contract=tiny.CONTRACT, seed=8, r=2)
        for loraplex in (plain, captured):
            loraplex.unload_adapter("other")
            loraplex.load_adapter("other", str(tmp_path / "another"))
        num_captured = counted.num_captured
        assert_equal(captured, plain, TEXT, ["plain"])
        assert counted.num_captured == num_captured
        assert_equal(captured, plain, TEXT, ["other"])
        assert captured.classify(TEXT, "other")["other"].scores != pytest.approx(before, abs=1e-3)
        assert place_of(captured, "other") == slot


def place_of(loraplex: Loraplex, name: str) -> int:
    """The slot of its version."""
    lease = loraplex.service.versions.try_lease(name)
    assert lease is not None
    lease.release()
    return lease.slot


def test_where_capturing_fails_steps_run_as_before(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    class ThirdFails(recorded.Recorded):
        def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
            if self.num_captured == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().__call__(function)

    counted = ThirdFails()

    with (
        Loraplex.load(bundle, dtype="float32", kv_cache="0") as plain,
        recorded.captures(counted, at=1),
        caplog.at_level(logging.WARNING),
        Loraplex.load(bundle, dtype="float32", kv_cache="0", cuda_graphs=True) as captured,
    ):
        for _ in range(3):
            assert_equal(captured, plain, TEXT, NAMES)
        memos = memo_of(captured)._memos
        assert memos and not any(graphs for memo in memos.values() for graphs in memo.graphs.values())
    assert counted.num_captured == 2
    assert [record.message for record in caplog.records] == [
        "steps are no longer captured as CUDA graphs, and run as before"
    ]


def test_a_cpu_has_none(bundle: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="CUDA graphs are for CUDA devices only"):
        Loraplex.load(bundle, device="cpu", cuda_graphs=True)


def assert_equal(captured: Loraplex, plain: Loraplex, text: str, names: list[str]) -> None:
    expected, actual = plain.classify(text, names), captured.classify(text, names)
    for one, other in zip(expected.verdicts, actual.verdicts, strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-4)


def test_memory_is_not_given_back_while_a_graph_is_captured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []
    monkeypatch.setattr(native, "give_back", lambda device: locked.append(capturing.locked()))
    with Loraplex.load(bundle) as loraplex:
        loraplex.unload_adapter(loraplex.adapters()[0].name)
    assert locked == [True]
