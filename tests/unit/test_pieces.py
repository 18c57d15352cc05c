"""Pieces of a step, captured with what they read and write."""

import torch

from loraplex.model.cuda_graphs import Graphs, PieceRunner, Tensors
from recorded import recorded


def counted_up(x: torch.Tensor) -> Tensors:
    return {"x": x + 1}


def test_a_piece_reads_what_it_is_given_though_its_buffer_was_written() -> None:
    runner, x = PieceRunner(recorded, max_tokens=8), torch.zeros(1, 4, 2)
    graphs: Graphs = {}
    for _ in range(3):
        assert runner.run(graphs, counted_up, 4, x=x)["x"].eq(1).all()
    assert len(graphs) == 1


def test_a_step_reads_what_became_of_an_input_since_the_one_before() -> None:
    runner, y = PieceRunner(recorded, max_tokens=8), torch.zeros(1, 4, 2)
    graphs: Graphs = {}
    for i in range(3):
        assert runner.run(graphs, copied, 4, y=y)["x"].eq(i).all()
        runner.forget_inputs()
        y.add_(1)


def test_graphs_of_any_length_share_their_memory() -> None:
    runner = PieceRunner(recorded, max_tokens=8)
    storages = set()
    for num_tokens in (2, 8, 3):
        x = torch.full((1, num_tokens, 2), float(num_tokens))
        output = runner.run({}, counted_up, num_tokens, x=x)["x"]
        assert output.shape == x.shape and output.eq(num_tokens + 1).all()
        storages.add(output.data_ptr())
    assert len(storages) == 1


def copied(y: torch.Tensor) -> Tensors:
    return {"x": y.clone()}
