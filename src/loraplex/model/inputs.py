"""What a forward pass takes and gives: tensors and segments. Knows no requests."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from loraplex.ops.layout import Layout

if TYPE_CHECKING:
    from loraplex.model.graphs import Graphs
    from loraplex.model.lora_linear import LoRALinear, StackedUpdate


class Segment(NamedTuple):
    """Consecutive packed tokens start ... end - 1 that share the adapter in `slot`."""

    slot: int
    start: int
    end: int


class Segments:
    """The segments of one step, in the order of their tokens."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.all = tuple(segments)
        self.lengths = tuple(end - start for _, start, end in self.all)
        self.num_tokens = sum(self.lengths)
        # Memo of the layers' stacked weights, shared by steps of the same `key`; None: nothing is kept.
        self.stacked: dict[LoRALinear, tuple[StackedUpdate, ...]] | None = None
        # CUDA graphs of steps with the same segments; None: nothing is captured.
        self.graphs: Graphs | None = None

    @property
    def key(self) -> tuple[tuple[int, bool], ...]:
        """Steps of the same key stack the same weights. One pair a segment: its slot, and whether it is as long as the
        segment before it."""
        before = (0, *self.lengths)
        return tuple((one.slot, n == m) for one, n, m in zip(self.all, self.lengths, before, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """T packed tokens, of which some only pad a segment; L of them are rows whose logits are wanted; the K/V of W of
    them is written to the cache.

    last_segments, last_layout: the segments and the attention of the L rows alone. The last decoder layer computes
    nothing but keys and values for all other tokens.
    """

    input_ids: torch.Tensor  # [T]
    position_ids: torch.Tensor  # [T]
    segments: Segments
    layout: Layout
    kv_rows: torch.Tensor | None  # [W] packed tokens
    kv_slots: torch.Tensor | None  # [W] slots of the cache
    logit_rows: torch.Tensor  # [L] packed tokens, ascending
    last_segments: Segments
    last_layout: Layout


class ModelOutput(NamedTuple):
    """Of the L wanted rows. `hidden` is what the output head saw; score heads read it."""

    logits: torch.Tensor  # [L, vocab]
    hidden: torch.Tensor  # [L, hidden]
