"""Loraplex's own engine: packed steps of many adapters, shared prefixes, K/V in blocks."""

from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from loraplex.adapters.weights import AdapterWeights
from loraplex.backends.capabilities import NATIVE
from loraplex.bundle import AdapterSource
from loraplex.config import EngineConfig
from loraplex.engine.block_pool import BlockPool
from loraplex.engine.engine import Engine
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.model.cuda_graphs import CUDACapture
from loraplex.model.loader import default_step_tokens, load_base, resolve_device, resolve_dtype, stop_token_ids
from loraplex.model.machine import budget_bytes, give_back


class NativeExecutor:
    """Executor. The engine's one thread owns the model; slots are set beside its steps."""

    name = "native"
    capabilities = NATIVE
    max_slots = None

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._runner: ModelRunner | None = None

    def max_model_len(self, config: PreTrainedConfig) -> int:
        return int(config.max_position_embeddings)

    def load(self, base: Path, config: PreTrainedConfig, adapters: Seq[AdapterSource]) -> Engine:
        options = self._config
        device = resolve_device(options.device)
        capture = CUDACapture(device) if options.cuda_graphs else None
        runner = ModelRunner(load_base(config, base, resolve_dtype(options.dtype, device), device), capture)
        runner.verify_packing()
        num_blocks = budget_bytes(options.kv_cache, device) // runner.block_bytes
        runner.allocate_cache(num_blocks)
        scheduler = Scheduler(
            pool=BlockPool(num_blocks),
            max_step_tokens=options.max_step_tokens or default_step_tokens(device, runner.model.dtype),
            max_step_sequences=options.max_step_sequences,
        )
        self._runner = runner
        engine = Engine(runner, scheduler)
        engine.start()
        return engine

    @property
    def item_bytes(self) -> int:
        return self._loaded.item_bytes

    @property
    def stop_ids(self) -> frozenset[int]:
        return stop_token_ids(self._loaded.model)

    def parameter(self, name: str) -> torch.Tensor | None:
        return self._loaded.parameter(name)

    def set_slot(self, slot: int, folder: Path, weights: AdapterWeights) -> None:
        self._loaded.set_slot(slot, weights)

    def clear_slot(self, slot: int) -> None:
        self._loaded.clear_slot(slot)

    def give_back(self) -> None:
        give_back(self._loaded.device)

    def close(self) -> None:
        self._runner = None

    @property
    def _loaded(self) -> ModelRunner:
        assert self._runner is not None, "the base is not loaded"
        return self._runner
