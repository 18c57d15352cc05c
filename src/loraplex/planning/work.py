"""The work of a forward pass: FLOPs, and numbers that are read from memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from loraplex.adapters.weights import BaseLayers
from loraplex.planning.base_shape import BaseShape


class Run(NamedTuple):
    """Consecutive new tokens under one adapter, computed once.

    num_before:  tokens before them whose keys and values they see: cached ones, or those of another run.
    num_lora:    weights of the adapter's LoRA (see `num_lora_weights`); 0 for the bare base.
    """

    num_tokens: int
    num_before: int = 0
    num_lora: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Holds what one forward pass computes and reads.

    linear, lora, attention:  FLOPs.
    num_weights:              weights of the base and of the adapters; each is read at least once.
    num_kv:                   numbers of the keys and values that are read from the cache or written.
    """

    linear: int
    lora: int
    attention: int
    num_weights: int
    num_kv: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return self.linear + self.lora + self.attention

    def seconds(self, flops_per_s: float, bytes_per_s: float, item_bytes: int) -> float:
        """Return the least time: that of the products, or that of reading, whichever is longer."""
        num_bytes = (self.num_weights + self.num_kv) * item_bytes
        return max(self.total / flops_per_s, num_bytes / bytes_per_s)


def work(
    base: BaseShape,
    runs: Iterable[Run],
    *,
    num_rows: int,
    num_adapter_weights: int = 0,
    num_cached: int = 0,
    last_in_full: bool = True,
) -> Work:
    """Return the work of one forward pass.

    num_rows:             tokens whose logits are wanted.
    num_adapter_weights:  weights of all adapters that take part, which are read once.
    num_cached:           tokens whose keys and values are read from the cache, each counted once.
    last_in_full:         count the last layer for every token. Our own decoder computes most of it for the wanted rows
                          only, so its least work is counted with False.
    """
    runs = tuple(runs)
    num_tokens = sum(run.num_tokens for run in runs)
    per_token = base.num_dense + round(base.active * base.num_experts)
    linear = num_tokens * per_token + num_rows * base.num_head
    attended = [
        2 * one.num_heads * (one.key_dim + one.value_dim) * sum(visible_keys(run, one.window) for run in runs)
        for one in base.sizes.attention
    ]
    lora = sum(run.num_tokens * run.num_lora for run in runs)
    if not last_in_full and base.num_last:
        linear -= max(0, num_tokens - num_rows) * base.num_last
        attended[-1] = round(attended[-1] * min(1.0, num_rows / max(num_tokens, 1)))
        # The adapters' part of the last layer, by its share of the base's weights.
        lora = round(lora * (1 - base.num_last / base.num_dense * max(0, num_tokens - num_rows) / max(num_tokens, 1)))
    experts = round(base.active * base.num_experts) if num_tokens else 0  # all tokens may choose the same ones
    return Work(
        linear=2 * linear,
        lora=2 * lora,
        attention=sum(attended),
        num_weights=base.num_dense + experts + base.num_head + num_adapter_weights,
        num_kv=(num_tokens + num_cached) * base.sizes.num_kv,
    )


def visible_keys(run: Run, window: int | None = None) -> int:
    """Return the keys that the run's tokens see, summed over the tokens. Each token sees itself, too."""
    first, last = run.num_before + 1, run.num_before + run.num_tokens
    if window is not None and last > window:
        num_cut = last - max(window, first - 1)  # the tokens that see `window` keys
        return num_cut * window + _sum(first, last - num_cut)
    return _sum(first, last)


def num_lora_weights(layers: BaseLayers, rank: int, paths: Iterable[str] | None = None) -> int:
    """Return the weights of LoRA of one rank on linear layers: on these paths, by default on all."""
    sizes = layers.linear.values() if paths is None else (layers.linear[path] for path in paths)
    return sum(rank * (out + n) for out, n in sizes)


def _sum(first: int, last: int) -> int:
    """Return first + … + last."""
    return (first + last) * (last - first + 1) // 2 if last >= first else 0
