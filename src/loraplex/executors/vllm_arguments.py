"""vLLM's engine arguments that `--vllm-arg` may set. Imports neither vLLM nor PyTorch."""

import json
from collections.abc import Sequence as Seq
from typing import Any

from loraplex.errors import ConfigurationError

# The engine arguments that may be set: how vLLM uses the machine and divides the work. Other arguments change which
# model answers, or name code to import. A bundle's file may set arguments, and a bundle may come from anyone.
ARGUMENTS = frozenset(
    "async_scheduling attention_backend block_size cpu_offload_gb disable_cascade_attn disable_custom_all_reduce "
    "enable_chunked_prefill enable_expert_parallel enable_prefix_caching enforce_eager fully_sharded_loras "
    "gpu_memory_utilization kv_cache_dtype kv_cache_memory_bytes long_prefill_token_threshold max_cpu_loras "
    "max_lora_rank max_loras max_model_len max_num_batched_tokens max_num_seqs max_parallel_loading_workers "
    "optimization_level performance_mode pipeline_parallel_size quantization safetensors_load_strategy seed "
    "tensor_parallel_size".split()
)


def read_arguments(given: Seq[str]) -> dict[str, Any]:
    """Return the arguments of KEY=VALUE items. A value is read as JSON if it is JSON, else as text. Raises
    ConfigurationError where an item is malformed, not allowed, or repeated."""
    arguments: dict[str, Any] = {}
    for item in given:
        key, separator, value = item.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        problem = None
        if not separator:
            problem = "is not KEY=VALUE"
        elif key not in ARGUMENTS:
            problem = "is not an engine argument that may be set"
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
