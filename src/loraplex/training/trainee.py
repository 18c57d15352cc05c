"""A base with N adapters that are trained in one pass."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.adapters.weights import BaseLayers
from loraplex.model.loader import model_class
from loraplex.training.attention import ATTENTION, PASS, Pass
from loraplex.training.batch import Conversation, Packed, pack
from loraplex.training.stacked_lora import Rows, StackedLoRA


class Trainee:
    """A frozen transformers model and its adapters' LoRA, stacked layer by layer.

    loras:  path of a linear layer -> the layer.
    """

    def __init__(
        self,
        model: Any,
        layers: BaseLayers,
        *,
        num_adapters: int,
        rank: int,
        alpha: float,
        targets: Collection[str],
    ) -> None:
        """model: transformers', which this object changes and owns from now on. targets: the last parts of the paths of
        the layers to train, such as "q_proj"."""
        self.num_adapters, self.device = num_adapters, model.device
        self._model, self._rows, self._pass = model.requires_grad_(False).eval(), Rows(), Pass()
        model.set_attn_implementation(ATTENTION)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, PASS, self._pass)
        self.loras: dict[str, StackedLoRA] = {}
        for path, shape in layers.linear.items():
            parent, _, name = path.rpartition(".")
            if name in targets:
                base_layer = model.get_submodule(path)
                self.loras[path] = StackedLoRA(base_layer, shape, self._rows, num_adapters, rank, alpha / rank)
                setattr(model.get_submodule(parent), name, self.loras[path])

    @classmethod
    def load(
        cls, base: Path, config: Any, layers: BaseLayers, dtype: torch.dtype, device: torch.device, **lora: Any
    ) -> "Trainee":
        """Load the base's weights, frozen, in `dtype`. lora: as for `Trainee`."""
        model = model_class(config).from_pretrained(base, dtype=dtype, local_files_only=True).to(device)
        return cls(model, layers, **lora)

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is trained; the first dimension is the adapter's."""
        return [part for lora in self.loras.values() for part in (lora.lora_A, lora.lora_B)]

    def losses(self, conversations: Seq[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each adapter the weighted sum of its answers' negative log probabilities, and the sum of their
        weights; 0 where it has no question. Gradients flow to the adapters, and not into the conversations."""
        log_probs, packed = self._answers(conversations)
        zeros = torch.zeros(self.num_adapters, device=self.device)
        found = zeros.index_add(0, packed.adapter_of, -log_probs * packed.weights)
        return found, zeros.index_add(0, packed.adapter_of, packed.weights)

    @torch.no_grad()
    def log_probs(self, conversations: Seq[Conversation]) -> torch.Tensor:
        """Return the log probability of every answer, in the order in which the conversations list them."""
        found, packed = self._answers(conversations)
        return torch.empty_like(found).index_copy(0, packed.answer_order, found)

    def _answers(self, conversations: Seq[Conversation]) -> tuple[torch.Tensor, Packed]:
        packed = pack(conversations, self.num_adapters, self.device)
        self._pass.packed, self._pass.kv = packed, {}
        try:
            if len(packed.prefix_ids):
                self._pass.is_prefix, self._rows.of_adapters = True, None
                with torch.no_grad():
                    self._run(packed.prefix_ids, packed.prefix_positions, torch.zeros(1, dtype=torch.long))
            self._pass.is_prefix, self._rows.of_adapters = False, packed.rows
            self._rows.is_dense = packed.rows.numel() == len(packed.input_ids)
            logits = self._run(packed.input_ids, packed.positions, packed.answer_rows)
        finally:
            self._pass.packed, self._pass.kv, self._rows.of_adapters = None, {}, None
        return -F.cross_entropy(logits.float(), packed.answer_ids, reduction="none"), packed

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=kept.to(self.device)
        )
        logits: torch.Tensor = output.logits[0]
        return logits
