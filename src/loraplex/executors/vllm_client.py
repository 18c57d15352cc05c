"""Everything that imports vLLM: its settings, its start, and the names that `vllm_engine.py` uses."""

import os
from collections.abc import Mapping
from multiprocessing import current_process
from typing import Any

from loraplex.errors import ConfigurationError, UnsupportedModelError

# vLLM reads these variables when it is imported. Standard output is for our own lines, no usage is reported to anybody,
# and CUDA does not survive a fork.
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

# What `vllm_engine.py` takes from vLLM by way of this file.
__all__ = ["AsyncLLM", "EngineDeadError", "LoRARequest", "RequestOutputKind", "SamplingParams"]

DEVICE_TYPE: str = current_platform.device_type  # the kind of device that the installed vLLM computes on


class Gauge(StatLoggerBase):  # type: ignore[misc]
    """The figures that vLLM's scheduler reports after each forward pass."""

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
        """Log nothing."""


async def start_llm(arguments: Mapping[str, Any], gauge: Gauge, sockets: str) -> AsyncLLM:
    """Start vLLM on the running event loop. gauge: receives the figures of each forward pass. sockets: the folder for
    the sockets of vLLM's processes. Raises ConfigurationError where vLLM refuses the arguments, and
    UnsupportedModelError where vLLM does not start with the base."""
    if current_process().name != "MainProcess":
        raise ConfigurationError(
            "--backend vllm",
            "was started inside one of vLLM's own processes, which import the main script",
            remedy='put the script\'s work under `if __name__ == "__main__":`',
        )
    try:
        vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
    except Exception as exc:  # from pydantic or any of vLLM's own checks
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
    finally:  # the folder is for this vLLM only, and is deleted with it
        if before is None:
            del os.environ["VLLM_RPC_BASE_PATH"]
        else:
            os.environ["VLLM_RPC_BASE_PATH"] = before


def reason(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(exc).__name__
