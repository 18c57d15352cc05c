"""The plan of a start: what the base and its adapters will take of this machine, told before the base's weights are
read; and the refusal where they cannot fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from loraplex.adapters.weights import BaseLayers
from loraplex.amounts import size
from loraplex.bundle import AdapterSource
from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.executors.vllm_arguments import read_arguments
from loraplex.executors.vllm_room import num_loras, rank_for
from loraplex.machine import budget_of, free_bytes, swap_bytes, total_bytes
from loraplex.model.loader import default_step_tokens, resolve_device, resolve_dtype
from loraplex.planning.adapter_size import FLOAT32_BYTES, AdapterSize
from loraplex.planning.base_shape import BaseSizes, stored_sizes
from loraplex.planning.memory import (
    DEVICE,
    Line,
    Use,
    adapter_lines,
    budgets,
    kv_token_bytes,
    memo_line,
    overhead_lines,
    step_line,
    weights_line,
)
from loraplex.planning.work import num_lora_weights

# Share of the tensors in a base's files that transformers may leave unread, such as layers that predict further tokens.
UNREAD = 0.03
# With these arguments vLLM's weights take another size, or are divided between devices.
OTHER_WEIGHTS = frozenset({"cpu_offload_gb", "pipeline_parallel_size", "quantization", "tensor_parallel_size"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPlan:
    """What a start will take, in bytes.

    free:        memory that is free on the device now; None where nobody says.
    parts:       the memory line by line, as `loraplex plan` counts it; what a backend lacks is left out.
    kv:          of the K/V cache; None where vLLM decides.
    about_vllm:  what vLLM's room for adapters holds; empty for another backend.
    """

    base: Path
    device: str
    dtype: str
    sizes: BaseSizes
    free: int | None
    parts: tuple[Line, ...]
    num_adapters: int
    kv: int | None
    kv_token: int
    kv_cache: str
    max_step_tokens: int
    about_vllm: str = ""

    def of(self, name: str) -> int:
        """Return the bytes of one part; 0 where the backend has none."""
        return sum(one.expected for one in self.parts if one.name == name)

    @property
    def needed(self) -> int:
        """Bytes on the device beside what this process has already."""
        return (self.kv or 0) + sum(one.expected for one in self.parts if one.where == DEVICE and one.name != "context")

    @property
    def warning(self) -> str | None:
        """Why the start may fail: more is planned than is free. None where it is not."""
        if self.free is None or self.needed <= self.free:
            return None
        return (
            f"{self.base}: {size(self.needed)} are planned on {self.device}, and {size(self.free)} are free now: "
            f"weights {size(self.of('weights'))}, adapters {size(self.of('adapters'))}, K/V {size(self.kv or 0)}, "
            f"a step {size(self.of('workspace of a step'))}, stacked adapters {size(self.of('stacked adapters'))}. "
            "The start, or a later request, may fail; `loraplex plan --fit` chooses smaller settings"
        )

    def lines(self) -> tuple[str, ...]:
        """Return the plan in five lines for people."""
        free = "" if self.free is None else f"; {size(self.free)} are free"
        kv = f"--kv-cache {self.kv_cache}"
        if self.kv is None:
            kv = "vLLM decides: gpu_memory_utilization"
        elif self.kv:
            kv += f", {self.kv // self.kv_token:,} tokens of {self.kv_token:,} bytes"
        adapters = f"{self.num_adapters} read at the start; {size(self.of('adapters in host memory'))} in host memory"
        step, stacks = self.of("workspace of a step"), self.of("stacked adapters")
        beside = f"; stacked adapters {size(stacks)}" if stacks else ""
        return (
            f"plan for {self.device}: {size(self.needed)}{free}",
            f"  weights   {size(self.of('weights')):>9}  {self.sizes.num_weights:,} parameters in {self.dtype}",
            f"  adapters  {size(self.of('adapters')):>9}  {self.about_vllm or adapters}",
            f"  K/V       {'' if self.kv is None else size(self.kv):>9}  {kv}",
            f"  a step    {size(step):>9}  at most {self.max_step_tokens:,} tokens{beside}; the process itself takes "
            f"about {size(self.of('process'))}",
        )

    def fields(self) -> dict[str, Any]:
        """Return the plan as fields of a log record. All sizes are bytes; `kv_cache` is null where vLLM decides."""
        return {
            "plan": {
                "device": self.device,
                "dtype": self.dtype,
                "free": self.free,
                "needed": self.needed,
                "weights": self.of("weights"),
                "adapters": self.of("adapters"),
                "adapters_in_host_memory": self.of("adapters in host memory"),
                "num_adapters": self.num_adapters,
                "kv_cache": self.kv,
                "kv_token": self.kv_token,
                "step": self.of("workspace of a step"),
                "stacked_adapters": self.of("stacked adapters"),
                "max_step_tokens": self.max_step_tokens,
                "process": self.of("process"),
            }
        }


def plan_start(
    base: Path,
    model_config: PreTrainedConfig,
    config: EngineConfig,
    adapters: Sequence[AdapterSize],
    *,
    layers: BaseLayers,
    sources: Sequence[AdapterSource],
    packs: bool,
) -> StartPlan:
    """Return the plan of a start. Takes milliseconds: it reads the headers of the base's files.

    adapters:  those that are loaded at the start and were read already, into host memory.
    layers:    the base's, and `sources` all adapters of the bundle: what vLLM makes room for.
    packs:     as in `loader.read_config`.
    Raises ConfigurationError where base and adapters cannot fit. A start that could succeed is never refused: memory
    that others may still give back counts, and so does a machine that does not say what it has."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    is_vllm, is_cuda, is_peft = config.backend == "vllm", device.type == "cuda", config.backend == "peft"
    sizes = stored_sizes(model_config, base, packs=packs)
    # Asking CUDA would start it in this process, and vLLM computes in others.
    is_asked = not (is_vllm and is_cuda)
    tokens = config.max_step_tokens or default_step_tokens(
        device if is_asked else torch.device("cpu"), dtype, model_config
    )
    free = (free_bytes(device) or None) if is_asked else None
    use = Use(
        item_bytes=dtype.itemsize,
        is_cuda=is_cuda,
        num_classifiers=max(1, len(adapters)),
        max_step_tokens=tokens,
        call_tokens=tokens + 1,  # of a long conversation, which takes several steps
        free_bytes=free,
        tokenizer_bytes=_tokenizer_bytes(base),
    )
    weights = weights_line(sizes, use)
    is_quantized = getattr(model_config, "quantization_config", None) is not None
    if is_vllm and is_quantized and sizes.stored_bytes is not None:  # vLLM computes with the weights as they are stored
        weights = replace(weights, expected=min(weights.expected, sizes.stored_bytes))
    host = free_bytes(torch.device("cpu")) or None
    left = None if free is None else max(0, free - weights.expected)
    # vLLM is told its K/V before it reads the base.
    allowed = budgets(config, free if is_vllm else left, host if is_cuda or host is None else left, is_cuda=is_cuda)
    placed = adapter_lines(adapters, len(adapters), replace(use, item_bytes=FLOAT32_BYTES) if is_peft else use)
    kv, about_vllm = (0 if is_peft else allowed.kv), ""
    on_device = placed[0]
    if is_vllm:
        kv = None if is_cuda else kv
        num, rank = num_loras(sources, config.max_adapters), rank_for(sources)
        about_vllm = f"vLLM's room for {num} of rank {rank}"
        on_device = replace(on_device, expected=num * num_lora_weights(layers, rank) * dtype.itemsize)
    elif allowed.adapters is not None:
        on_device = replace(on_device, expected=min(on_device.expected, allowed.adapters))
    parts = [weights, on_device, placed[1], step_line(sizes, use), *overhead_lines(use)]
    if not (is_vllm or is_peft):
        parts.append(memo_line(adapters, len(adapters), use))
    plan = StartPlan(
        base=base,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        sizes=sizes,
        free=free,
        parts=tuple(parts),
        num_adapters=len(adapters),
        kv=kv,
        kv_token=kv_token_bytes(sizes, use),
        kv_cache=config.kv_cache,
        max_step_tokens=tokens,
        about_vllm=about_vllm,
    )
    if is_asked and not (is_vllm and OTHER_WEIGHTS & read_arguments(config.vllm_arg).keys()):
        _check_fits(plan, device, dtype, config)
    return plan


def _check_fits(plan: StartPlan, device: torch.device, dtype: torch.dtype, config: EngineConfig) -> None:
    room, is_cpu = total_bytes(device), device.type == "cpu"
    weights = plan.of("weights")
    if not room:
        return
    unread = 0 if plan.sizes.has_own_decoder else round(UNREAD * weights)
    parts = [(weights, f"weights of {size(weights)} ({plan.sizes.num_weights:,} parameters in {plan.dtype})")]
    if is_cpu and config.backend != "vllm":  # on CUDA an adapter without room is told, and the rest serves
        adapters = plan.of("adapters")
        parts.append((adapters, f"adapters of {size(adapters)}"))
    needed = sum(num_bytes for num_bytes, _ in parts)
    if needed - unread > room:
        half = weights // 2
        remedy = "use a machine with more memory, or a smaller base; `loraplex plan` lists what has room"
        if dtype == torch.float32 and half + needed - weights <= room:
            remedy = f"--dtype bfloat16 takes {size(half)} for the weights; or {remedy}"
        elif weights <= room:
            remedy = "load fewer adapters at the start with --preload, or lower --adapter-memory"
        raise ConfigurationError(
            plan.base,
            f"does not fit on {plan.device}: {' and '.join(text for num_bytes, text in parts if num_bytes)} need "
            f"{size(needed)}, and the machine has {size(room)}, {size(needed - room)} too little",
            remedy=remedy,
        )
    if config.backend != "native" or config.kv_cache.endswith("%"):
        return
    # The native backend takes a fixed K/V only from memory that is free, and would refuse it once the weights are read.
    if is_cpu and plan.free is not None:
        room = plan.free + swap_bytes()
    kv = budget_of(config.kv_cache, 0)
    if weights <= room + unread and kv > room + unread - weights:
        raise ConfigurationError(
            f"--kv-cache {config.kv_cache}",
            f"does not fit: {size(kv)} beside weights of {size(weights)} need {size(kv + weights)}, and {size(room)} "
            f"are free on {plan.device}",
            remedy="give less, such as 20%",
        )


def _tokenizer_bytes(base: Path) -> int:
    path = base / "tokenizer.json"
    return path.stat().st_size if path.is_file() else 0
