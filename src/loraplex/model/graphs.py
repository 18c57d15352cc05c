"""Piecewise CUDA graphs: captures what a small step computes between two attention calls, and replays it.

Launching the kernels one by one takes longer than computing them. Attention differs between steps and stays outside.
"""

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from loraplex.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]  # by name
Piece = Callable[..., Tensors]  # takes and returns tensors by name, has no other effect


class Capture(Protocol):
    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture what `function` computes, without computing it. Each call of the result computes it."""
        ...

    def prove_over(self) -> None:
        """Check that a failed capture has ended. Raises RuntimeError where the device still captures."""
        ...


@dataclass(slots=True, weakref_slot=True)
class Graph:
    """The CUDA graph of one piece of one layer. The graph reads and writes fixed addresses."""

    replay: Callable[[], None]
    outputs: Tensors


Graphs = dict[Hashable, Graph]  # by piece, for steps with exactly the same segments


@dataclass(slots=True)
class PieceRunner:
    """Runs the pieces of one model as CUDA graphs. All graphs share input and output buffers, since one runs at a time.

    max_tokens:  the most tokens of a step, which sizes the buffers.
    failed:      a capture failed: pieces run without graphs.
    is_broken:   a failed capture has not ended: nothing can be computed.
    """

    capture: Capture
    max_tokens: int
    failed: bool = False
    is_broken: bool = False
    _memory: Tensors = field(default_factory=dict)
    _buffers: dict[tuple[str, torch.Size], torch.Tensor] = field(default_factory=dict)
    _written: Tensors = field(default_factory=dict)  # the last tensor copied into each buffer, by name

    def run(self, graphs: Graphs, name: Hashable, piece: Piece, num_tokens: int, **inputs: torch.Tensor) -> Tensors:
        """Return piece(**inputs), by the graph under `name`, which is captured on first use. The next piece that
        returns a tensor of the same name overwrites the returned tensor. Raises RuntimeError as `check` does."""
        self.check()
        if self.failed:
            return piece(**inputs)
        buffers = {key: self._filled(key, tensor, num_tokens) for key, tensor in inputs.items()}
        if name not in graphs:
            computed = piece(**buffers)  # uncaptured first: what it keeps must not lie in the graphs' memory
            try:
                graphs[name] = self._captured(piece, buffers, computed, num_tokens)
            except RuntimeError:  # a CUDA error or out of memory; the piece itself has just run
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
        """Raises RuntimeError where a failed capture has not ended, so that nothing can be computed."""
        if self.is_broken:
            raise RuntimeError("a CUDA graph's capture failed and is not over; start the server without --cuda-graphs")

    def forget_inputs(self) -> None:
        """End a step: forget which tensors the buffers hold."""
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


# Held during a capture, because the allocator must not be told to free its cached memory meanwhile.
capturing = threading.Lock()


class CUDACapture:
    """A Capture with one stream and one memory pool for all graphs. Sharing is safe: graphs run one after the other,
    and pass tensors through buffers outside the pool."""

    def __init__(self, device: torch.device) -> None:
        """Raises UnsupportedModelError where the device is not a CUDA device."""
        if device.type != "cuda":
            raise UnsupportedModelError(
                f"device {str(device)!r}", "CUDA graphs are for CUDA devices only", remedy="leave out --cuda-graphs"
            )
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        number = torch.zeros(1, device=device)
        self._first = self._graph_of(lambda: number.add_(1))  # keeps the pool, which is freed with its last graph

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        return self._graph_of(function).replay

    def prove_over(self) -> None:
        # The end of an invalidated capture may have raised before the allocator was told. The allocator refuses these
        # calls as long as it assumes a capture.
        torch.cuda.synchronize(self._device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph's capture failed and does not end")
        torch.cuda.empty_cache()
        one = torch.ones(1, device=self._device)
        if one.add_(1).item() != 2:
            raise RuntimeError("the device computes nothing since the capture of a CUDA graph failed")

    def _graph_of(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`: it waits for the device and empties the allocator's cache for every graph.
        graph = torch.cuda.CUDAGraph()
        with capturing:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                # thread_local: another thread may set a slot meanwhile, which allocates and copies.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return graph
