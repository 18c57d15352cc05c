"""Piecewise CUDA graphs: what a small step computes between two attentions, recorded once and replayed. Launching its
kernels one by one takes a GPU longer than computing them; attention differs from step to step and stays outside."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from loraplex.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]  # by what they are to the layer
Piece = Callable[..., Tensors]  # takes and gives tensors by name, and changes nothing else


class Capture(Protocol):
    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what `function` computes, which changes nothing yet. Each call of what is returned computes it."""
        ...


@dataclass(slots=True)
class Graph:
    """Of one piece of one layer. It reads and writes fixed addresses."""

    replay: Callable[[], None]
    outputs: Tensors


Graphs = dict[Piece, Graph]  # of steps whose segments are the same, from the first to the last token


@dataclass(slots=True)
class PieceRunner:
    """Runs the pieces of one model. All graphs share the buffers from which they read and into which they write, since
    one runs at a time. max_tokens: of a step."""

    capture: Capture
    max_tokens: int
    failed: bool = False
    _memory: Tensors = field(default_factory=dict)
    _buffers: dict[tuple[str, torch.Size], torch.Tensor] = field(default_factory=dict)
    _written: Tensors = field(default_factory=dict)  # what was copied last into the buffer of that name

    def run(self, graphs: Graphs, piece: Piece, num_tokens: int, **inputs: torch.Tensor) -> Tensors:
        """piece(**inputs). What is returned is overwritten by the next piece that returns the same name."""
        if self.failed:
            return piece(**inputs)
        buffers = {name: self._filled(name, tensor, num_tokens) for name, tensor in inputs.items()}
        if piece not in graphs:
            computed = piece(**buffers)  # what it allocates once and keeps must not come from the graphs' memory
            try:
                graphs[piece] = self._captured(piece, buffers, computed, num_tokens)
            except RuntimeError:  # CUDA's errors, and that memory is short; the piece itself has just run
                logger.warning("steps are no longer captured as CUDA graphs, and run as before", exc_info=True)
                self.failed = True
                return computed
        graph = graphs[piece]
        graph.replay()
        for name in graph.outputs:
            self._written.pop(name, None)
        return graph.outputs

    def forget_inputs(self) -> None:
        """The step is over."""
        self._written.clear()

    def _captured(self, piece: Piece, buffers: Tensors, like: Tensors, num_tokens: int) -> Graph:
        outputs = {name: self._buffer(name, tensor, num_tokens) for name, tensor in like.items()}

        def compute() -> None:
            for name, tensor in piece(**buffers).items():
                outputs[name].copy_(tensor)

        return Graph(self.capture(compute), outputs)

    def _filled(self, name: str, tensor: torch.Tensor, num_tokens: int) -> torch.Tensor:
        buffer = self._buffer(name, tensor, num_tokens)
        if tensor is not buffer and tensor is not self._written.get(name):
            buffer.copy_(tensor)
            self._written[name] = tensor
        return buffer

    def _buffer(self, name: str, like: torch.Tensor, num_tokens: int) -> torch.Tensor:
        key = (name, like.shape)
        if key not in self._buffers:
            if name not in self._memory:
                self._memory[name] = like.new_empty(like.numel() // num_tokens * self.max_tokens)
            self._buffers[key] = self._memory[name][: like.numel()].view(like.shape)
        return self._buffers[key]


class CUDACapture:
    """Capture, by a stream and a memory pool that all graphs share: they run one after the other, and what one gives to
    the next lies outside."""

    def __init__(self, device: torch.device) -> None:
        """UnsupportedModelError on another device than CUDA."""
        if device.type != "cuda":
            raise UnsupportedModelError(
                f"device {str(device)!r}", "CUDA graphs are for CUDA devices only", remedy="leave out --cuda-graphs"
            )
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        number = torch.zeros(1, device=device)
        self._first = self._graph_of(lambda: number.add_(1))  # holds the pool, which would end with its last graph

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        return self._graph_of(function).replay

    def _graph_of(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        # Not by `torch.cuda.graph`, which waits for the device and empties the allocator's cache for each.
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            # Another thread may place an adapter meanwhile, which allocates and copies.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return graph
