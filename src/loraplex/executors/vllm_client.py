"""All that imports vLLM: its settings, its start, and the names that the engine uses of it."""

import os
from collections.abc import Mapping
from multiprocessing import current_process
from typing import Any

from loraplex.errors import ConfigurationError, UnsupportedModelError

# vLLM reads these when it is imported. Standard output is for our own lines; nothing is reported to anybody; CUDA does
# not survive a fork.
for name, value in {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}.items():
    os.environ.setdefault(name, value)

from vllm import AsyncEngineArgs, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.exceptions import EngineDeadError  # noqa: E402
from vllm.v1.metrics.loggers import StatLoggerBase  # noqa: E402

__all__ = [
    "DEVICE_TYPE",
    "AsyncLLM",
    "EngineDeadError",
    "Gauge",
    "LoRARequest",
    "RequestOutputKind",
    "SamplingParams",
    "reason",
    "start_llm",
]

DEVICE_TYPE: str = current_platform.device_type  # that the installed vLLM computes on


class Gauge(StatLoggerBase):  # type: ignore[misc]
    """What vLLM's scheduler says of itself after each forward pass."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_steps = 0
        self.kv_cache_usage = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.num_steps += 1
            self.num_running = scheduler_stats.num_running_reqs
            self.kv_cache_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


async def start_llm(arguments: Mapping[str, Any], gauge: Gauge, sockets: str) -> AsyncLLM:
    """Start vLLM on the running loop. gauge: is told of each forward pass. sockets: the folder for the sockets of its
    processes. ConfigurationError, UnsupportedModelError: vLLM does not take the arguments, or the base."""
    if current_process().name != "MainProcess":
        raise ConfigurationError(
            "--backend vllm",
            "is started from within a process of vLLM's, which imports the script that it belongs to",
            remedy='put the script\'s work under `if __name__ == "__main__":`',
        )
    try:
        vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
    except Exception as exc:  # pydantic's, and whatever its many checks raise
        raise ConfigurationError(
            "--backend vllm", f"vLLM refuses: {reason(exc)}", remedy="correct --vllm-arg, or use --backend native"
        ) from None
    before = os.environ.get("VLLM_RPC_BASE_PATH")
    os.environ["VLLM_RPC_BASE_PATH"] = sockets
    try:
        return AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[lambda *_: gauge], disable_log_stats=True)
    except Exception as exc:
        raise UnsupportedModelError(
            arguments["model"],
            f"vLLM does not start with it: {reason(exc)}",
            remedy="see vLLM's log above; correct --vllm-arg or --kv-cache, or use --backend native; a script "
            "needs `if __name__ == '__main__':` around its use",
        ) from None
    finally:  # it is no other vLLM's, and goes with this one
        if before is None:
            del os.environ["VLLM_RPC_BASE_PATH"]
        else:
            os.environ["VLLM_RPC_BASE_PATH"] = before


def reason(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(exc).__name__
