"""Sets an adapter's weights in all layers of a model that the adapter changes."""

from collections.abc import Callable
from dataclasses import replace

import torch

from loraplex.adapters.slots import prefix_slot
from loraplex.adapters.weights import AdapterWeights
from loraplex.model.lora_embedding import LoRAEmbedding
from loraplex.model.lora_linear import LoRALinear
from loraplex.model.score_heads import ScoreHeads

AdaptedLayer = LoRALinear | LoRAEmbedding


class AdaptedLayers:
    """The layers of one model that take adapters, by path, and the score heads. Slots are small integers that the
    caller gives out."""

    def __init__(
        self, layers: dict[str, AdaptedLayer], output: str, scores: ScoreHeads, wrap: Callable[[str], AdaptedLayer]
    ) -> None:
        """layers: the adapted layers that exist already. output: the path of the output head. wrap: makes the adapted
        layer at a path that is not in `layers`, when the first adapter needs it."""
        self._layers, self._output, self._scores, self._wrap = layers, output, scores, wrap

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        self.clear_slot(slot)
        if adapter.invocation_tokens is not None and adapter.changes_prefix:
            self._set_slot(prefix_slot(slot), replace(adapter, modules={}, embeddings={}, output=None, score=None))
        self._set_slot(slot, adapter)

    def clear_slot(self, slot: int) -> None:
        for layer in self._layers.values():
            layer.clear_slot(slot)
            layer.clear_slot(prefix_slot(slot))
        self._scores.clear_slot(slot)

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return the base's own tensor, such as "lm_head.weight"; None where no adapted layer has that path."""
        path, _, kind = name.rpartition(".")
        layer = self._layers.get(path)
        tensor = None if layer is None else getattr(layer.base_layer, kind, None)
        return tensor if isinstance(tensor, torch.Tensor) else None

    def _set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        output, replaced = self._output, {*adapter.saved, *adapter.token_rows}
        loras = {**adapter.modules, **({} if adapter.output is None else {output: adapter.output})}
        for path in sorted({*loras, *adapter.biases, *(replaced & {output})}):
            layer = self._layer(path)
            assert isinstance(layer, LoRALinear), f"{path} is a {type(layer).__name__}"
            layer.set_slot(
                slot,
                loras.get(path),
                bias=adapter.biases.get(path),
                saved=adapter.saved.get(path) if path == output else None,
                rows=adapter.token_rows.get(path) if path == output else None,
            )
        for path in sorted({*adapter.embeddings, *replaced} - {output}):
            embedding = self._layer(path)
            assert isinstance(embedding, LoRAEmbedding), f"{path} is a {type(embedding).__name__}"
            embedding.set_slot(
                slot,
                adapter.embeddings.get(path),
                saved=adapter.saved.get(path),
                rows=adapter.token_rows.get(path),
            )
        if adapter.score is not None:
            self._scores.set_slot(slot, adapter.score)

    def _layer(self, path: str) -> AdaptedLayer:
        if path not in self._layers:
            self._layers[path] = self._wrap(path)
        return self._layers[path]
