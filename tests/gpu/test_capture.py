"""Pieces captured as CUDA graphs on the device, and a capture that fails."""

import pytest
import torch

from loraplex.model.graphs import CUDACapture, Graphs, PieceRunner, Tensors

pytestmark = pytest.mark.gpu


def test_after_a_failed_capture_the_device_still_computes(cuda: torch.device) -> None:
    """A piece that waits for the device cannot be captured. It has run once by then, and later pieces run too."""
    runner = PieceRunner(CUDACapture(cuda), max_tokens=8)
    x = torch.ones(4, 2, device=cuda)

    def waits(x: torch.Tensor) -> Tensors:
        return {"y": x * x.sum().item()}

    graphs: Graphs = {}
    assert runner.run(graphs, "waits", waits, 4, x=x)["y"].eq(8).all()
    assert runner.failed and not runner.is_broken and not graphs
    runner.check()
    assert runner.run(graphs, "waits", waits, 4, x=2 * x)["y"].eq(32).all()


def test_a_replayed_graph_reads_its_inputs_anew(cuda: torch.device) -> None:
    runner = PieceRunner(CUDACapture(cuda), max_tokens=8)
    graphs: Graphs = {}
    for i in range(4):
        x = torch.full((4, 2), float(i), device=cuda)
        assert runner.run(graphs, "twice", lambda x: {"y": 2 * x}, 4, x=x)["y"].eq(2 * i).all()
        runner.forget_inputs()
    assert not runner.failed and len(graphs) == 1
