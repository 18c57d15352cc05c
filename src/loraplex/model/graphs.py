"""Piecewise CUDA graphs: what a small step computes between two attentions, recorded once and replayed. Launching its
kernels one by one takes a GPU longer than computing them; attention differs from step to step and stays outside."""

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from loraplex.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]  # by what they are to the layer
Piece = Callable[..., Tensors]  # takes and gives tensors by name, and changes nothing else


class Capture(Protocol):
    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what `function` computes; nothing is computed yet. Each call of the result computes it."""
        ...

    def prove_over(self) -> None:
        """After a capture that failed: RuntimeError where the device still believes that one is under way."""
        ...


@dataclass(slots=True)
class Graph:
    """Of one piece of one layer. It reads and writes fixed addresses."""

    replay: Callable[[], None]
    outputs: Tensors


Graphs = dict[Hashable, Graph]  # by piece, of steps whose segments are the same, from the first to the last token


@dataclass(slots=True)
class PieceRunner:
    """Runs the pieces of one model. All graphs share the buffers from which they read and into which they write, since
    one runs at a time. max_tokens: of a step."""

    capture: Capture
    max_tokens: int
    failed: bool = False
    is_broken: bool = False
    _memory: Tensors = field(default_factory=dict)
    _buffers: dict[tuple[str, torch.Size], torch.Tensor] = field(default_factory=dict)
    _written: Tensors = field(default_factory=dict)  # the last tensor that was copied into the buffer of that name

    def run(self, graphs: Graphs, name: Hashable, piece: Piece, num_tokens: int, **inputs: torch.Tensor) -> Tensors:
        """piece(**inputs), captured under `name`. The next piece that returns a tensor of the same name overwrites the
        one that is returned here. RuntimeError as `check`."""
        self.check()
        if self.failed:
            return piece(**inputs)
        buffers = {key: self._filled(key, tensor, num_tokens) for key, tensor in inputs.items()}
        if name not in graphs:
            computed = piece(**buffers)  # what it allocates once and keeps must not come from the graphs' memory
            try:
                graphs[name] = self._captured(piece, buffers, computed, num_tokens)
            except RuntimeError:  # CUDA's errors, and that memory is short; the piece itself has just run
                logger.warning("steps are no longer captured as CUDA graphs, and run as before", exc_info=True)
                self.failed = self.is_broken = True
                self.capture.prove_over()
                self.is_broken = False
                return computed
        graph = graphs[name]
        graph.replay()
        for key in graph.outputs:
            self._written.pop(key, None)
        return graph.outputs

    def check(self) -> None:
        """RuntimeError: a capture failed and is not over, so that nothing can be computed any more."""
        if self.is_broken:
            raise RuntimeError("a CUDA graph's capture failed and is not over; start the server without --cuda-graphs")

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


# Held while a graph is captured: the allocator must not be asked for its free memory back meanwhile.
capturing = threading.Lock()


class CUDACapture:
    """Capture, by a stream and a memory pool that all graphs share: they run one after the other, and what one gives to
    the next lies outside."""

    def __init__(self, device: torch.device) -> None:
        """UnsupportedModelError on another device than CUDA."""
        if device.type != "cuda":
            raise UnsupportedModelError(
                f"device {str(device)!r}", "CUDA graphs are for CUDA devices only", remedy="leave out --cuda-graphs"
            )
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        number = torch.zeros(1, device=device)
        self._first = self._graph_of(lambda: number.add_(1))  # holds the pool, which would end with its last graph

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        return self._graph_of(function).replay

    def prove_over(self) -> None:
        # Where a capture was invalidated, its end may have raised before the allocator heard of it. These are the calls
        # that the allocator refuses as long as it believes in a capture.
        torch.cuda.synchronize(self._device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph's capture failed and does not end")
        torch.cuda.empty_cache()
        one = torch.ones(1, device=self._device)
        if one.add_(1).item() != 2:
            raise RuntimeError("the device computes nothing since a CUDA graph's capture failed")

    def _graph_of(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        # Not by `torch.cuda.graph`, which waits for the device and empties the allocator's cache for each.
        graph = torch.cuda.CUDAGraph()
        with capturing:
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
