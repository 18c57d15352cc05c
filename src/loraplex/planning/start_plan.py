"""The plan of a start: what the base and its adapters will take of this machine, told before the base's weights are
read; and the refusal where they cannot fit."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.machine import budget_of, free_bytes, swap_bytes
from loraplex.model.loader import default_step_tokens, resolve_device, resolve_dtype
from loraplex.planning.adapter_size import AdapterSize
from loraplex.planning.base_shape import BaseSizes, stored_sizes
from loraplex.planning.memory import FLOAT32_BYTES, Use, kv_token_bytes, overhead_lines, step_line
from loraplex.planning.units import size


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPlan:
    """What a start will take, in bytes.

    free:      memory that is free on the device now; None where nobody says.
    adapters:  of the adapters that are loaded at the start, in their slots; `host` in host memory.
    process:   Python and the libraries, of which this process has most already.
    """

    base: Path
    device: str
    dtype: str
    sizes: BaseSizes
    free: int | None
    weights: int
    num_adapters: int
    adapters: int
    host: int
    kv: int
    kv_token: int
    kv_cache: str
    max_step_tokens: int
    step: int
    process: int

    @property
    def needed(self) -> int:
        """Bytes on the device beside what this process has already."""
        return self.weights + self.adapters + self.kv + self.step

    def lines(self) -> tuple[str, ...]:
        """Return the plan in five lines for people."""
        free = "" if self.free is None else f" of {size(self.free)} that are free"
        tokens = f", {self.kv // self.kv_token:,} tokens of {self.kv_token:,} bytes" if self.kv else ""
        return (
            f"plan for {self.device}: {size(self.needed)}{free}",
            f"  weights   {size(self.weights):>9}  {self.sizes.num_weights:,} parameters in {self.dtype}",
            f"  adapters  {size(self.adapters):>9}  {self.num_adapters} read at the start; {size(self.host)} "
            "in host memory",
            f"  K/V       {size(self.kv):>9}  --kv-cache {self.kv_cache}{tokens}",
            f"  a step    {size(self.step):>9}  at most {self.max_step_tokens:,} tokens; the process itself takes "
            f"about {size(self.process)}",
        )

    def fields(self) -> dict[str, Any]:
        """Return the plan as fields of a log record. All sizes are bytes."""
        return {
            "plan": {
                "device": self.device,
                "dtype": self.dtype,
                "free": self.free,
                "needed": self.needed,
                "weights": self.weights,
                "adapters": self.adapters,
                "adapters_in_host_memory": self.host,
                "num_adapters": self.num_adapters,
                "kv_cache": self.kv,
                "kv_token": self.kv_token,
                "step": self.step,
                "max_step_tokens": self.max_step_tokens,
                "process": self.process,
            }
        }


def plan_start(
    base: Path, model_config: PreTrainedConfig, config: EngineConfig, adapters: Iterable[AdapterSize], *, packs: bool
) -> StartPlan:
    """Return the plan of a start. Takes milliseconds: it reads the headers of the base's files.

    adapters:  those that are loaded at the start and were read already, into host memory.
    packs:     as in `loader.read_config`.
    Raises ConfigurationError where base and adapters cannot fit into the memory that is free. A start that could
    succeed is never refused: unknown memory, swapped memory and vLLM's own ways to save some count for it."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    is_vllm, is_cuda = config.backend == "vllm", device.type == "cuda"
    sizes = stored_sizes(model_config, base, packs=packs)
    weights = sizes.num_weights * dtype.itemsize
    if is_vllm and sizes.stored_bytes is not None:  # it computes with quantized weights as they are stored
        weights = min(weights, sizes.stored_bytes)
    # Asking CUDA would start it in this process, and vLLM computes in others.
    free = None if is_vllm and is_cuda else free_bytes(device) or None
    left = max(0, (free or 0) - weights)
    adapters = tuple(adapters)
    item_bytes = FLOAT32_BYTES if config.backend == "peft" else dtype.itemsize
    placed = sum(one.num_placed for one in adapters) * item_bytes
    kv = 0 if config.backend == "peft" else budget_of(config.kv_cache, left)
    tokens = config.max_step_tokens or default_step_tokens(device, dtype, model_config)
    use = Use(
        item_bytes=dtype.itemsize,
        is_cuda=is_cuda,
        num_classifiers=max(1, len(adapters)),
        max_step_tokens=tokens,
        tokenizer_bytes=_tokenizer_bytes(base),
    )
    plan = StartPlan(
        base=base,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        sizes=sizes,
        free=free,
        weights=weights,
        num_adapters=len(adapters),
        adapters=placed if free is None or is_vllm else min(placed, budget_of(config.adapter_memory, left)),
        host=sum(one.host_bytes for one in adapters),
        kv=kv,
        kv_token=kv_token_bytes(sizes, use),
        kv_cache=config.kv_cache,
        max_step_tokens=tokens,
        step=step_line(sizes, use).expected,
        process=overhead_lines(use)[0].expected,
    )
    if not (is_vllm and config.vllm_arg):  # some arguments quantize, or divide the base between devices
        _check_fits(plan, device, dtype, config)
    return plan


def _check_fits(plan: StartPlan, device: torch.device, dtype: torch.dtype, config: EngineConfig) -> None:
    if plan.free is None:
        return
    room = plan.free + (swap_bytes() if device.type == "cpu" else 0)
    parts = [(plan.weights, f"weights of {size(plan.weights)} ({plan.sizes.num_weights:,} parameters in {plan.dtype})")]
    if (
        device.type == "cpu" and config.backend != "vllm"
    ):  # on CUDA an adapter without room is told, and the rest serves
        parts.append((plan.adapters, f"adapters of {size(plan.adapters)}"))
    needed = sum(num_bytes for num_bytes, _ in parts)
    if needed <= room:
        return
    half = plan.weights // 2
    remedy = "use a machine with more memory, or a smaller base; `loraplex plan` lists what has room"
    if dtype == torch.float32 and half + needed - plan.weights <= room:
        remedy = f"--dtype bfloat16 takes {size(half)} for the weights; or {remedy}"
    elif plan.weights <= room:
        remedy = "load fewer adapters at the start with --preload, or lower --adapter-memory"
    raise ConfigurationError(
        plan.base,
        f"does not fit on {plan.device}: {' and '.join(text for num_bytes, text in parts if num_bytes)} need "
        f"{size(needed)}, and {size(room)} are free, {size(needed - room)} too little",
        remedy=remedy,
    )


def _tokenizer_bytes(base: Path) -> int:
    path = base / "tokenizer.json"
    return path.stat().st_size if path.is_file() else 0
