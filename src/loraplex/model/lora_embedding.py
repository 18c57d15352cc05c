"""A token embedding with one update a slot, for packed tokens sorted by slot."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.adapters.weights import LoRAWeights, SavedModule
from loraplex.model.lora_linear import ActiveSegments


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """embedded = gain * embedded + lora_A[ids] @ lora_B, the scaling within lora_B. `table` replaces the embedding,
    `rows` that of the tokens in `row_ids`, which are sorted."""

    lora_A: torch.Tensor | None = None  # [num_embeddings, rank]
    lora_B: torch.Tensor | None = None  # [rank, dim]
    gain: torch.Tensor | None = None  # [dim]
    table: torch.Tensor | None = None  # [num_embeddings, dim]
    row_ids: torch.Tensor | None = None  # [n]
    rows: torch.Tensor | None = None  # [n, dim]

    def apply(self, ids: torch.Tensor, out: torch.Tensor) -> None:  # [n], [n, dim], changed in place
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


class MultiLoRAEmbedding(nn.Module):
    """base_layer(ids), and for the tokens of each segment whose slot is set its update."""

    def __init__(self, base_layer: nn.Embedding, segments: ActiveSegments) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.segments = segments
        self.slots: dict[int, Update] = {}

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    def set_slot(
        self,
        slot: int,
        lora: LoRAWeights | None = None,
        *,
        saved: SavedModule | None = None,
        rows: tuple[tuple[int, ...], torch.Tensor] | None = None,
    ) -> None:
        # Gemma's embedding multiplies by a factor: what replaces a row or adds to it is multiplied by it, too.
        factor = float(getattr(self.base_layer, "embed_scale", 1.0))
        lora_A = lora_B = gain = row_ids = replaced = None
        if lora is not None:
            lora_A, lora_B = lora.lora_A.float().T, lora.lora_B.float().T * lora.scaling
            if lora.magnitude is not None:
                weight = self.base_layer.weight.detach().float().cpu() + lora_A @ lora_B  # [num_embeddings, dim]
                gain = lora.magnitude.float() / torch.linalg.norm(weight, dim=0)
                lora_B = lora_B * gain
            lora_B = lora_B * factor
        if rows is not None:
            order = sorted(range(len(rows[0])), key=rows[0].__getitem__)
            row_ids = torch.tensor([rows[0][i] for i in order], device=self.weight.device)
            replaced = rows[1].float()[order] * factor
        self.slots[slot] = Update(
            lora_A=self._placed(lora_A),
            lora_B=self._placed(lora_B),
            gain=self._placed(gain),
            table=self._placed(None if saved is None else saved.weight.float() * factor),
            row_ids=row_ids,
            rows=self._placed(replaced),
        )

    def clear_slot(self, slot: int) -> None:
        self.slots.pop(slot, None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [1, T] -> [1, T, dim]
        output: torch.Tensor = self.base_layer(ids)
        assert self.segments.current is not None, "the embedding runs first, for all tokens"
        for slot, start, end in self.segments.current.all:
            update = self.slots.get(slot)
            if update is not None:
                update.apply(ids[0, start:end], output[0, start:end])
        return output

    def _placed(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(self.weight.device, self.weight.dtype, copy=True).contiguous()
