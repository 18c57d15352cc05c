"""Measures how fast this machine's CPU computes the products of a base, and reads its memory."""

from collections import Counter

import torch

from loraplex.measuring.limits import bandwidth, gemm_rate
from loraplex.model.loader import DTYPES
from loraplex.planning.base_shape import BaseShape

NUM_ROWS = 512  # of each product; enough for full speed on a CPU


def measure_rates(base: BaseShape, dtype: str) -> tuple[float, float]:
    """Return FLOP/s and bytes/s. Takes seconds, and memory for the largest layer and the copied bytes."""
    cpu = torch.device("cpu")
    sizes = [size for path, size in base.layers.linear.items() if path not in base.layers.beside_text]
    layers = [(out, n, count) for (out, n), count in Counter(sizes).items()]
    return gemm_rate(layers, cpu, DTYPES[dtype], NUM_ROWS), bandwidth(cpu)
