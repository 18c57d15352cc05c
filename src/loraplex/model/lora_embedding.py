"""A token embedding with one update per slot, for packed tokens sorted by slot."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.adapters.weights import LoRAWeights, SavedModule
from loraplex.model.inputs import Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingUpdate:
    """A slot's change of the embedding: embedded = gain * embedded + lora_A[ids] @ lora_B; lora_B includes the scaling.
    `table` replaces the whole embedding, `rows` the embeddings of the tokens in `row_ids` (sorted)."""

    lora_A: torch.Tensor | None = None  # [num_embeddings, rank]
    lora_B: torch.Tensor | None = None  # [rank, dim]
    gain: torch.Tensor | None = None  # [dim]
    table: torch.Tensor | None = None  # [num_embeddings, dim]
    row_ids: torch.Tensor | None = None  # [n]
    rows: torch.Tensor | None = None  # [n, dim]

    def apply(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Change the embeddings `out` [n, dim] of the tokens `ids` [n] in place."""
        if self.table is not None:
            out.copy_(F.embedding(ids, self.table))
        if self.rows is not None and self.row_ids is not None:
            place = torch.searchsorted(self.row_ids, ids).clamp_(max=len(self.row_ids) - 1)
            is_replaced = self.row_ids[place] == ids
            out.copy_(torch.where(is_replaced[:, None], self.rows[place], out))
        if self.gain is not None:
            out.mul_(self.gain)
        if self.lora_A is not None and self.lora_B is not None:
            out.addmm_(F.embedding(ids, self.lora_A), self.lora_B)


class LoRAEmbedding:
    """base_layer(ids), changed by its update for each segment whose slot is set. ids: [T]; output: [T, dim]."""

    def __init__(self, base_layer: nn.Embedding) -> None:
        self.base_layer = base_layer
        self._slots: dict[int, EmbeddingUpdate] = {}

    def set_slot(
        self,
        slot: int,
        lora: LoRAWeights | None = None,
        *,
        saved: SavedModule | None = None,
        rows: tuple[tuple[int, ...], torch.Tensor] | None = None,
    ) -> None:
        weight = self.base_layer.weight
        # Gemma's embedding multiplies its rows by a factor. Replaced rows and LoRA's sum are multiplied by it too.
        factor = float(getattr(self.base_layer, "embed_scale", 1.0))
        lora_A = lora_B = gain = row_ids = replaced = None
        if lora is not None:
            lora_A, lora_B = lora.lora_A.float().T, lora.lora_B.float().T * lora.scaling
            if lora.magnitude is not None:
                merged = weight.detach().float().cpu() + lora_A @ lora_B  # [num_embeddings, dim]
                gain = lora.magnitude.float() / torch.linalg.norm(merged, dim=0)
                lora_B = lora_B * gain
            lora_B = lora_B * factor
        if rows is not None:
            order = sorted(range(len(rows[0])), key=rows[0].__getitem__)
            row_ids = torch.tensor([rows[0][i] for i in order], device=weight.device)
            replaced = rows[1].float()[order] * factor
        self._slots[slot] = EmbeddingUpdate(
            lora_A=self._placed(lora_A),
            lora_B=self._placed(lora_B),
            gain=self._placed(gain),
            table=self._placed(None if saved is None else saved.weight.float() * factor),
            row_ids=row_ids,
            rows=self._placed(replaced),
        )

    def clear_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def __call__(self, ids: torch.Tensor, segments: Segments) -> torch.Tensor:
        output: torch.Tensor = self.base_layer(ids)
        for slot, start, end in segments.all if self._slots else ():
            update = self._slots.get(slot)
            if update is not None:
                update.apply(ids[start:end], output[start:end])
        return output

    def _placed(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        weight = self.base_layer.weight
        return None if tensor is None else tensor.to(weight.device, weight.dtype, copy=True).contiguous()
