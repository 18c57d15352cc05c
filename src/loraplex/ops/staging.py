"""Copies a step's small integer tensors to the device in one transfer."""

from collections.abc import Sequence as Seq

import torch

ALIGNMENT = 16  # bytes


class Staging:
    """Gives out device tensors whose values are valid after `send`. On a GPU, one blocking copy for each of a step's
    dozen tensors would take longer than a small step computes. On a CPU nothing is copied."""

    def __init__(self, device: torch.device, *, is_direct: bool | None = None) -> None:
        """is_direct: whether `put` makes the final tensor at once, without a transfer; by default on a CPU."""
        self.device = device
        self._is_direct = device.type == "cpu" if is_direct is None else is_direct
        self._num_used = 0  # bytes
        self._sent: torch.cuda.Event | None = None
        self._host = self._there = torch.empty(0, dtype=torch.uint8)

    def begin(self) -> None:
        """Start a new step. Tensors of the last step are no longer valid."""
        if self._sent is not None:
            self._sent.synchronize()  # the copy ended long ago, unless the last step failed
        self._num_used = 0

    def put(self, values: Seq[int], dtype: torch.dtype = torch.long) -> torch.Tensor:
        """Return a tensor [len(values)] of these values."""
        if self._is_direct:
            return torch.tensor(values, dtype=dtype)
        num_bytes = len(values) * dtype.itemsize
        if self._num_used + num_bytes > len(self._host):
            self.send()  # tensors given out so far keep the old buffers
            self._allocate(max(1 << 16, num_bytes, 2 * len(self._host)))
        part = slice(self._num_used, self._num_used + num_bytes)
        self._num_used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self._host[part].view(dtype).copy_(torch.tensor(values, dtype=dtype))
        return self._there[part].view(dtype)

    def send(self) -> None:
        """Copy all values to the device. Does not wait for the copy."""
        if self._num_used:
            self._there[: self._num_used].copy_(self._host[: self._num_used], non_blocking=True)
            if self.device.type == "cuda":
                self._sent = torch.cuda.Event()
                self._sent.record()

    def _allocate(self, num_bytes: int) -> None:
        self._num_used = 0
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._there = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
