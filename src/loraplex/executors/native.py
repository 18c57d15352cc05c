"""Loraplex's own executor: packed steps of many adapters, shared prefixes, K/V in blocks."""

from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from loraplex.adapters.weights import AdapterWeights
from loraplex.amounts import size
from loraplex.bundle import AdapterSource
from loraplex.config import EngineConfig
from loraplex.engine.block_pool import BLOCK_SIZE, BlockPool
from loraplex.engine.engine import Engine
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.errors import ConfigurationError
from loraplex.executors.capabilities import NATIVE
from loraplex.machine import budget_bytes, free_bytes, give_back
from loraplex.model.graphs import CUDACapture, capturing
from loraplex.model.loader import (
    default_step_tokens,
    load_model,
    max_positions,
    read_stop_ids,
    resolve_device,
    resolve_dtype,
)
from loraplex.model.model import Model


class NativeExecutor:
    """An Executor with Loraplex's own engine. The engine's one thread owns the model; slots are set while steps run."""

    name = "native"
    capabilities = NATIVE
    max_slots = None

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._model: Model | None = None
        self.stop_ids: frozenset[int] = frozenset()

    def max_model_len(self, config: PreTrainedConfig) -> int:
        return max_positions(config)

    def load(self, base: Path, config: PreTrainedConfig, adapters: Seq[AdapterSource]) -> Engine:
        options = self._config
        device = resolve_device(options.device)
        capture = CUDACapture(device) if options.cuda_graphs else None
        model = load_model(config, base, resolve_dtype(options.dtype, device), device, capture)
        runner = ModelRunner(model)
        runner.verify_packing()
        num_blocks = budget_bytes(options.kv_cache, device) // (BLOCK_SIZE * model.kv_bytes)
        _allocate(model, num_blocks, options.kv_cache, device)
        scheduler = Scheduler(
            pool=BlockPool(num_blocks),
            max_step_tokens=options.max_step_tokens or default_step_tokens(device, model.dtype, config),
            max_step_sequences=options.max_step_sequences,
        )
        self._model, self.stop_ids = model, read_stop_ids(base, config)
        engine = Engine(runner, scheduler)
        engine.start()
        return engine

    @property
    def item_bytes(self) -> int:
        return self.model.dtype.itemsize

    def parameter(self, name: str) -> torch.Tensor | None:
        return self.model.parameter(name)

    def set_slot(self, slot: int, folder: Path, weights: AdapterWeights) -> None:
        self.model.set_slot(slot, weights)

    def clear_slot(self, slot: int) -> None:
        self.model.clear_slot(slot)

    def give_back(self) -> None:
        with capturing:  # the engine's thread may be about to capture a graph
            if self._model is not None:  # else closed meanwhile
                give_back(self._model.device)

    def close(self) -> None:
        self._model = None

    @property
    def model(self) -> Model:
        """The base, valid from `load` to `close`."""
        assert self._model is not None, "the base is not loaded"
        return self._model


def _allocate(model: Model, num_blocks: int, budget: str, device: torch.device) -> None:
    """Allocate the K/V tensors of `num_blocks`. Raises ConfigurationError where the device has no room for them. A CPU
    is asked first: Linux promises memory that it does not have, and kills the process that uses it."""
    free = free_bytes(device)
    if not 0 < free < num_blocks * BLOCK_SIZE * model.kv_bytes:
        try:
            return model.allocate_cache(num_blocks * BLOCK_SIZE)
        except (RuntimeError, MemoryError):  # PyTorch's errors for memory on a CPU and on CUDA are RuntimeErrors
            free = free_bytes(device)
    raise ConfigurationError(
        f"--kv-cache {budget}",
        f"does not fit: {size(free)} are free on {device}",
        remedy="give less, such as 20%",
    )
