"""The inputs and outputs of a forward pass: tensors and segments. Knows no requests."""

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
        # The stacks of each layer, shared by steps with the same `key`; None: no stacks are kept.
        self.stacked: dict[LoRALinear, tuple[StackedUpdate, ...]] | None = None
        # The CUDA graphs of steps with the same segments; None: no graphs are used.
        self.graphs: Graphs | None = None

    @property
    def key(self) -> tuple[tuple[int, bool], ...]:
        """Identifies the stacks: steps with the same key stack the same weights. One pair per segment: its slot, and
        whether it is as long as the segment before it."""
        before = (0, *self.lengths)
        return tuple((one.slot, n == m) for one, n, m in zip(self.all, self.lengths, before, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """T packed tokens, some of which only pad a segment. The logits of L tokens are wanted; the K/V of W tokens is
    written to the cache.

    last_segments, last_layout:  segments and layout of the L wanted tokens alone. The last decoder layer computes only
                                 keys and values for the other tokens.
    """

    input_ids: torch.Tensor  # [T]
    position_ids: torch.Tensor  # [T]
    segments: Segments
    layout: Layout
    kv_rows: torch.Tensor | None  # [W] packed tokens
    kv_slots: torch.Tensor | None  # [W] cache slots
    logit_rows: torch.Tensor  # [L] packed tokens, ascending
    last_segments: Segments
    last_layout: Layout


class ModelOutput(NamedTuple):
    """The output for the L wanted tokens. `hidden` is the output head's input, which score heads read too."""

    logits: torch.Tensor  # [L, vocab]
    hidden: torch.Tensor  # [L, hidden]
