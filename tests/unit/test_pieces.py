"""Pieces of a step, captured with what they read and write."""

from collections.abc import Callable

import pytest
import torch

from loraplex.model.graphs import Graphs, PieceRunner, Tensors
from recorded import Recorded


def counted_up(x: torch.Tensor) -> Tensors:
    return {"x": x + 1}


def test_a_piece_reads_what_it_is_given_though_its_buffer_was_written() -> None:
    runner, x = PieceRunner(Recorded(), max_tokens=8), torch.zeros(1, 4, 2)
    graphs: Graphs = {}
    for _ in range(3):
        assert runner.run(graphs, "x", counted_up, 4, x=x)["x"].eq(1).all()
    assert len(graphs) == 1


def test_a_step_reads_what_became_of_an_input_since_the_one_before() -> None:
    runner, y = PieceRunner(Recorded(), max_tokens=8), torch.zeros(1, 4, 2)
    graphs: Graphs = {}
    for i in range(3):
        assert runner.run(graphs, "x", copied, 4, y=y)["x"].eq(i).all()
        runner.forget_inputs()
        y.add_(1)


def test_graphs_of_any_length_share_their_memory() -> None:
    runner = PieceRunner(Recorded(), max_tokens=8)
    storages = set()
    for num_tokens in (2, 8, 3):
        x = torch.full((1, num_tokens, 2), float(num_tokens))
        output = runner.run({}, "x", counted_up, num_tokens, x=x)["x"]
        assert output.shape == x.shape and output.eq(num_tokens + 1).all()
        storages.add(output.data_ptr())
    assert len(storages) == 1


def copied(y: torch.Tensor) -> Tensors:
    return {"x": y.clone()}


class Failing(Recorded):
    """Its captures fail, and the proof that the last one is over where it is told to."""

    def __init__(self, *, is_over: bool) -> None:
        super().__init__()
        self.is_over = is_over

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    def prove_over(self) -> None:
        if not self.is_over:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


def test_where_a_capture_fails_pieces_are_computed_only_if_it_is_proven_to_be_over() -> None:
    x = torch.zeros(1, 4, 2)
    runner = PieceRunner(Failing(is_over=True), max_tokens=8)
    for _ in range(2):
        assert runner.run({}, "x", counted_up, 4, x=x)["x"].eq(1).all()
    runner = PieceRunner(Failing(is_over=False), max_tokens=8)
    for message in ("INTERNAL ASSERT", "is not over"):
        with pytest.raises(RuntimeError, match=message):
            runner.run({}, "x", counted_up, 4, x=x)
