"""Owns the model: one packed step is one forward pass."""

import time
from collections.abc import Sequence as Seq
from itertools import islice

import torch
from transformers import PreTrainedModel

from loraplex.adapters.weights import AdapterWeights
from loraplex.engine.batch import Batch, pack
from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.engine.outcomes import read_outcomes
from loraplex.engine.sequence import NO_ADAPTER, EngineRequest, Outcome, Sequence, Target
from loraplex.engine.step import Step
from loraplex.errors import LoraplexError, UnsupportedModelError
from loraplex.model.cuda_graphs import Capture
from loraplex.model.decoder_layer import fuse_layers
from loraplex.model.fuse import fuse
from loraplex.model.kv_cache import KVCache, slot_bytes
from loraplex.model.multi_lora import MultiLoRA


class ModelRunner:
    """Runs steps on one thread. Slots are small integers that the caller gives out; NO_ADAPTER is the bare base.
    capture: as of `MultiLoRA`."""

    def __init__(self, model: PreTrainedModel, capture: Capture | None = None) -> None:
        self.model = model
        self.device = model.device
        fuse(model)
        fuse_layers(model)
        self._lora = MultiLoRA(model, capture)
        self._cache: KVCache | None = None
        self._kv_shapes: dict[int, tuple[int, int]] = {}

    @property
    def max_model_len(self) -> int:
        """Positions that the base knows."""
        return int(self.model.config.max_position_embeddings)

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        assert slot != NO_ADAPTER, "the base has no slot to set"
        self._lora.set_slot(slot, adapter)

    def clear_slot(self, slot: int) -> None:
        self._lora.clear_slot(slot)

    def parameter(self, name: str) -> torch.Tensor | None:
        """The base's own tensor, such as "lm_head.weight"; None where there is none."""
        return self._lora.parameter(name)

    @property
    def item_bytes(self) -> int:
        """Of one number of an adapter on the device."""
        return self.model.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Of one block of K/V, known once the model has run."""
        assert self._kv_shapes, "the model has not run yet"
        return BLOCK_SIZE * slot_bytes(self._kv_shapes, self.model.dtype)

    def allocate_cache(self, num_blocks: int) -> None:
        self._cache = KVCache(self._kv_shapes, num_blocks * BLOCK_SIZE, self.model.dtype, self.device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
        """One forward pass. A sequence of which only a chunk ran is not among the outcomes."""
        started = time.monotonic()
        batch = pack(step, self.device, self._cache, recurs_up_to=self._lora.max_captured)
        for placed in step.placed:
            if placed.sequence.started_s is None:
                placed.sequence.started_s = started
        self._lora.begin(batch.segments, batch.last_segments)
        try:
            logits = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=0 if self._lora.is_pruned else batch.logit_rows,
                batch=batch,
            ).logits[0]
        except torch.OutOfMemoryError:
            self._lora.forget()
            raise
        finally:
            self._lora.end()
        self._kv_shapes = batch.kv_shapes
        if not batch.sequences:
            return []
        return read_outcomes(
            batch.sequences, logits, batch.target_rows, batch.target_ids, batch.last_rows, self._scored(batch)
        )

    def _scored(self, batch: Batch) -> dict[Sequence, tuple[float, ...]]:
        """Log probabilities of the labels for the sequences that are answered by a score head."""
        rows = {
            sequence: row
            for sequence, row in zip(batch.sequences, batch.last_row_indices, strict=True)
            if self._lora.has_score(sequence.slot)
        }
        if not rows:
            return {}
        log_probs = [self._lora.score(sequence.slot, row) for sequence, row in rows.items()]
        values = iter(torch.cat(log_probs).tolist())  # waits for the device once
        return {sequence: tuple(islice(values, len(found))) for sequence, found in zip(rows, log_probs, strict=True)}

    def probe(self) -> None:
        """Compute one token on the base; raises where that fails."""
        [(_, outcome)] = self.run(Step.of([lone_sequence([0])]))
        if isinstance(outcome, LoraplexError):
            raise outcome

    def verify_packing(self) -> None:
        """UnsupportedModelError where two texts packed together answer otherwise than alone: then some layer looks
        across texts, past our attention (a convolution, a recurrence, a global state)."""
        vocab_size = int(self.model.config.vocab_size)
        texts = [[(start + 7 * i) % vocab_size for i in range(8)] for start in (1, 5)]
        texts[1] = texts[1][:5]

        def log_probs(*token_ids: list[int]) -> list[float]:
            sequences = [lone_sequence(ids, Target(position=-1, token_id=3)) for ids in token_ids]
            found = []
            for _, outcome in self.run(Step.of(sequences)):
                if isinstance(outcome, LoraplexError):
                    raise UnsupportedModelError(type(self.model).__name__, outcome.message, remedy=outcome.remedy)
                found.append(outcome.log_probs[0])
            return found

        together, alone = log_probs(*texts), [log_probs(text)[0] for text in texts]
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.5
        if any(not abs(a - b) <= tolerance for a, b in zip(together, alone, strict=True)):
            raise UnsupportedModelError(
                type(self.model).__name__,
                f"texts packed together give log probabilities {together}, alone {alone}",
                remedy="serve another base: some layer of this one looks across packed texts",
            )


def lone_sequence(token_ids: Seq[int], *targets: Target) -> Sequence:
    """On the bare base, with a request of its own."""
    sequence = Sequence(token_ids=tuple(token_ids), slot=NO_ADAPTER, targets=targets)
    EngineRequest([sequence])
    return sequence
