"""Drives the engine's runner and scheduler without threads, so that nothing but their work is timed."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import torch

from benchmarks.shapes import ModelWeights, random_adapter
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.block_pool import BASE_KV, BLOCK_SIZE, BlockPool
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput, Target
from loraplex.model.decoder import Decoder, decoder_layers
from loraplex.model.graphs import Capture
from loraplex.model.loader import default_step_tokens

RANK, NUM_ADAPTERS, NUM_BLOCKS = 16, 16, 4096
LABELS = (Target(position=-1, token_id=1), Target(position=-1, token_id=2))


class Driver:
    """Our decoder on the weights of transformers' model, with 16 random adapters in its slots."""

    def __init__(self, model: Any, device: torch.device, capture: Capture | None = None) -> None:
        """model: transformers' model, on the device. capture: captures small steps as CUDA graphs."""
        layers = decoder_layers(model.config)
        self.adapters = [random_adapter(layers, RANK, seed + 1) for seed in range(NUM_ADAPTERS)]
        self.model = Decoder(model.config, ModelWeights(model), model.dtype, device, capture)
        self.max_step_tokens = default_step_tokens(device, model.dtype, model.config)
        self.runner = ModelRunner(self.model)
        self.runner.verify_packing()
        for slot, adapter in enumerate(self.adapters):
            self.model.set_slot(slot, adapter)
        self.model.allocate_cache(NUM_BLOCKS * BLOCK_SIZE)

    def scheduler(self) -> Scheduler:
        return Scheduler(max_step_tokens=self.max_step_tokens, max_step_sequences=512, pool=BlockPool(NUM_BLOCKS))

    def sequence(self, tokens: Seq[int], slot: int, activation: int = 0) -> Sequence:
        kv_id = BASE_KV if slot == NO_ADAPTER else bytes.fromhex(self.adapters[slot].kv_id)
        return Sequence(
            token_ids=tuple(tokens), slot=slot, kv_id=kv_id, activation=activation, num_kept=activation, targets=LABELS
        )

    def run(self, scheduler: Scheduler, requests: Iterable[Seq[Sequence]]) -> list[SequenceOutput]:
        """Compute all requests. Raises AssertionError where a sequence got an error."""
        sequences = 0
        for request in requests:
            scheduler.add(EngineRequest(request), 0.0)
            sequences += len(request)
        outputs: list[SequenceOutput] = []
        while True:
            step, _ = scheduler.next_step(0.0)
            if step is None:
                break
            outputs += [outcome for _, outcome in self.runner.run(step) if isinstance(outcome, SequenceOutput)]
            scheduler.finish(step)
        assert len(outputs) == sequences, f"{sequences - len(outputs)} of {sequences} sequences failed"
        return outputs
