"""A model with adapters in slots: which of its layers an adapter changes."""

import logging
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loraplex.adapters.weights import AdapterWeights, SavedModule
from loraplex.model.cuda_graphs import Capture, Graphs, PieceRunner
from loraplex.model.decoder_layer import FusedLayer
from loraplex.model.last_layer import prune_last_layer
from loraplex.model.lora_embedding import MultiLoRAEmbedding
from loraplex.model.lora_linear import ActiveSegments, Group, MultiLoRALinear, Segment, Segments, wrap_linears
from loraplex.model.machine import budget_bytes

logger = logging.getLogger(__name__)

# The weights that layers put together for a step are kept for the next steps of the same slots, if it has so few tokens
# that putting them together takes a good part of its time; and for so many sets of slots, in so much of the memory that
# was free, since it is a copy.
SMALL_STEP, NUM_KEPT, KEPT_MEMORY = 1024, 4, "5%"
# Of such steps, those that come with the same segments for the third time are captured: so many for a set of slots.
CAPTURED_AT, NUM_CAPTURED, NUM_COUNTED = 3, 48, 256


@dataclass(slots=True)
class Kept:
    """For steps of the same slots, in the same order."""

    groups: dict[MultiLoRALinear, tuple[Group, ...]] = field(default_factory=dict)
    _counted: tuple[int, int] = 0, 0  # layers, and the bytes of their groups
    num_seen: Counter[Seq[Segment]] = field(default_factory=Counter)
    graphs: dict[Seq[Segment], Graphs] = field(default_factory=dict)  # the oldest first; they use the groups

    @property
    def num_bytes(self) -> int:
        """Of what was put together; what is a slot's own is not counted."""
        if self._counted[0] != len(self.groups):
            self._counted = len(self.groups), sum(one.num_bytes for groups in self.groups.values() for one in groups)
        return self._counted[1]

    def graphs_of(self, segments: Seq[Segment]) -> Graphs | None:
        """None: not seen often enough."""
        if segments not in self.graphs:
            if len(self.num_seen) > NUM_COUNTED:
                self.num_seen.clear()
            self.num_seen[segments] += 1
            if self.num_seen[segments] < CAPTURED_AT:
                return None
        found = self.graphs[segments] = self.graphs.pop(segments, {})
        while len(self.graphs) > NUM_CAPTURED:
            evicted = next(iter(self.graphs))
            del self.graphs[evicted], self.num_seen[evicted]
        return found


class MultiLoRA:
    """Wraps layers when the first adapter needs it. Slots are small integers that the caller gives out.
    capture: of small steps, where the model's layers are fused; None: each is computed anew."""

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        self.model = model
        self._segments, self._head_segments = ActiveSegments(), ActiveSegments()
        self._pieces = None if capture is None else PieceRunner(capture, SMALL_STEP)
        fused = [module.forward for module in model.modules() if isinstance(module.forward, FusedLayer)]
        if self._pieces is not None and not fused:
            logger.warning("%s has no layers of which CUDA graphs are captured", type(model).__name__)
            self._pieces = None
        for layer in fused:
            layer.segments, layer.pieces = self._segments, self._pieces
        self.is_pruned = prune_last_layer(model, self._segments)
        self._layers: dict[str, MultiLoRALinear | MultiLoRAEmbedding] = {}
        self._scores: dict[int, SavedModule] = {}
        self._kept_bytes = budget_bytes(KEPT_MEMORY, model.device)
        self._kept: dict[tuple[tuple[int, bool], ...], Kept] = {}  # by the segments' key, the oldest first
        self._hidden = torch.empty(0)  # [L, hidden] of the wanted rows, as the output head saw them
        head: Any = model.get_output_embeddings()
        self._output_path = path_of(model, head)
        head.register_forward_pre_hook(self._keep_hidden)

    @property
    def max_captured(self) -> int:
        """Tokens of the largest steps that are."""
        return 0 if self._pieces is None else SMALL_STEP

    def begin(self, segments: Segments, last_segments: Segments) -> None:
        """The next forward pass is over these."""
        if segments.num_tokens <= SMALL_STEP:
            kept = self._kept_of(segments)
            segments.groups, last_segments.groups = kept.groups, self._kept_of(last_segments).groups
            if self.max_captured:
                segments.graphs = kept.graphs_of(segments.all)
        self._segments.current, self._head_segments.current = segments, last_segments

    def end(self) -> None:
        """The forward pass is over, or failed: what it used may be freed."""
        for active in (self._segments, self._head_segments):
            if active.current is not None:
                active.current.groups = active.current.graphs = None
        if self._pieces is not None:
            self._pieces.forget_inputs()
            if self._pieces.failed:  # its graphs are for nothing
                self._pieces = None
                self.forget()
        kept = self._kept
        while len(kept) > NUM_KEPT or sum(one.num_bytes for one in kept.values()) > self._kept_bytes:
            del kept[next(iter(kept))]

    def forget(self) -> None:
        """All that is kept between steps."""
        self._kept = {}

    def _kept_of(self, segments: Segments) -> Kept:
        everything = self._kept  # which another thread may replace: what is found then is used once more, and forgotten
        kept = everything[segments.key] = everything.pop(segments.key, Kept())
        return kept

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        self.clear_slot(slot)
        if adapter.invocation_tokens is not None and adapter.changes_prefix:
            self._set_slot(prefix_slot(slot), replace(adapter, modules={}, embeddings={}, output=None, score=None))
        self._set_slot(slot, adapter)

    def _set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        head = self._output_path
        linears = {*adapter.modules, *adapter.biases} - {head}
        self._layers |= wrap_linears(self.model, sorted(linears), self._segments)
        for path in linears:
            self._linear(path).set_slot(slot, adapter.modules.get(path), bias=adapter.biases.get(path))
        replaced = {*adapter.saved, *adapter.token_rows}
        for path in {*adapter.embeddings, *replaced} - {head}:
            self._embedding(path).set_slot(
                slot,
                adapter.embeddings.get(path),
                saved=adapter.saved.get(path),
                rows=adapter.token_rows.get(path),
            )
        if adapter.output is not None or head in replaced or head in adapter.biases:
            self._layers |= wrap_linears(self.model, [head], self._head_segments)
            self._linear(head).set_slot(
                slot,
                adapter.output,
                bias=adapter.biases.get(head),
                saved=adapter.saved.get(head),
                rows=adapter.token_rows.get(head),
            )
        if adapter.score is not None:
            device, dtype = self.model.device, self.model.dtype
            bias = adapter.score.bias
            self._scores[slot] = SavedModule(
                weight=adapter.score.weight.to(device, dtype, copy=True),
                bias=None if bias is None else bias.to(device, dtype, copy=True),
            )

    def clear_slot(self, slot: int) -> None:
        own = {slot, prefix_slot(slot)}
        self._kept = {key: kept for key, kept in list(self._kept.items()) if own.isdisjoint(one for one, _ in key)}
        for layer in self._layers.values():
            layer.clear_slot(slot)
            layer.clear_slot(prefix_slot(slot))
        self._scores.pop(slot, None)

    def parameter(self, name: str) -> torch.Tensor | None:
        """The base's own, wrapped or not; None where there is none."""
        path, _, kind = name.rpartition(".")
        try:
            layer: Any = self.model.get_submodule(path)
        except AttributeError:
            return None
        tensor = getattr(getattr(layer, "base_layer", layer), kind, None)
        return tensor if isinstance(tensor, torch.Tensor) else None

    def has_score(self, slot: int) -> bool:
        """Whether the slot answers by a score head of its own and not by tokens."""
        return slot in self._scores

    def score(self, slot: int, row: int) -> torch.Tensor:
        """[num_labels] log probabilities for one of the last forward pass's wanted rows, in float32."""
        score = self._scores[slot]
        return torch.nn.functional.linear(self._hidden[row], score.weight, score.bias).float().log_softmax(-1)

    def _keep_hidden(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._hidden = args[0][0] if self._scores else self._hidden

    def _linear(self, path: str) -> MultiLoRALinear:
        layer = self._layers[path]
        assert isinstance(layer, MultiLoRALinear), f"{path} is a {type(layer).__name__}"
        return layer

    def _embedding(self, path: str) -> MultiLoRAEmbedding:
        layer = self._layers.get(path)
        if layer is None:
            embedding = self.model.get_submodule(path)
            assert isinstance(embedding, nn.Embedding), f"{path} is a {type(embedding).__name__}"
            layer = self._layers[path] = MultiLoRAEmbedding(embedding, self._segments)
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, layer)
        assert isinstance(layer, MultiLoRAEmbedding), f"{path} is a {type(layer).__name__}"
        return layer


def prefix_slot(slot: int) -> int:
    """Where the tokens before an adapter's activation are computed if it changes them, too: what it saved and the
    biases hold everywhere, only its LoRA waits for the activation."""
    return -2 - slot


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """The path of one of the model's modules."""
    paths: list[str] = [path for path, module in model.named_modules() if module is wanted]
    return paths[0]
