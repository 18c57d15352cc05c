"""Measures what this machine can do: the rate of matrix products, and the bandwidth of its memory."""

import functools
import time
from collections.abc import Callable, Iterable

import torch

COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}  # far more than any cache holds


def gemm_rate(
    layers: Iterable[tuple[int, int, int]], device: torch.device, dtype: torch.dtype, num_rows: int = 2048
) -> float:
    """Return the FLOP/s of a model's matrix products, each weighted by its share of the model.

    layers:  (outputs, inputs, how often the model has a layer of this size).
    """
    flops = seconds = 0.0
    for out, n, count in layers:
        x = torch.randn(num_rows, n, dtype=dtype, device=device)
        weight = torch.randn(out, n, dtype=dtype, device=device)
        seconds += count * _seconds(functools.partial(torch.nn.functional.linear, x, weight), device)
        flops += count * 2 * num_rows * n * out
    return flops / seconds


def bandwidth(device: torch.device) -> float:
    """Return the bytes/s of a copy within the device's memory, counting what is read and what is written."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _seconds(lambda: target.copy_(source), device)


def wait(device: torch.device) -> None:
    """Wait until the device has computed everything. A CPU computes at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(function: Callable[[], object], device: torch.device, times: int = 5) -> float:
    function()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        function()
    wait(device)
    return (time.perf_counter() - started) / times
