"""Reads what a plan is asked about: a bundle, a config or a known base, and adapters that exist or are imagined."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from loraplex.bundle import Bundle, open_bundle, read_json
from loraplex.config import EngineConfig, resolve
from loraplex.errors import ConfigurationError, quoted
from loraplex.hardware.bases import known_base
from loraplex.machine import free_bytes
from loraplex.model.loader import DTYPES, read_config, resolve_dtype
from loraplex.planning.adapter_size import AdapterSize, adapter_of, read_adapter_size
from loraplex.planning.base_shape import BaseShape, shape_of
from loraplex.planning.plan import Plan, make_plan
from loraplex.planning.target import CPU, Target
from loraplex.planning.target import gpu as gpus
from loraplex.planning.timing import Traffic

DEFAULT_ADAPTERS = MOST_TOGETHER = 16
MOST_OF = {"hidden_size": 1_000_000, "num_hidden_layers": 1_000}  # sizes that a config.json must hold itself
DEFAULT_TOKENS = 500  # of a conversation, or fewer where the base takes fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, and its plan.

    plan_on:  returns the same plan on another target.
    backend:  the one that the bundle names.
    """

    name: str
    dtype: str
    plan: Plan
    plan_on: Callable[[Target], Plan]
    bundle: Bundle | None = None
    backend: str = "native"


def read_asked(
    *,
    bundle: str | None = None,
    config: Path | None = None,
    model: str | None = None,
    num_adapters: int | None = None,
    rank: int = 16,
    targets: str = "all-linear",
    gpu: str = CPU,
    count: int = 1,
    dtype: str | None = None,
    num_classifiers: int | None = None,
    conversation_tokens: int | None = None,
    suffix_tokens: int = 20,
    turns: int = 10,
    kv_cache: str | None = None,
    fits: bool = False,
    measure: Callable[[BaseShape, str], tuple[float, float]] | None = None,
) -> Asked:
    """Return the plan for one of a bundle, a config and a known model. measure: returns this machine's FLOP/s and
    bytes/s for a base and a number format. Raises ConfigurationError."""
    opened = None if bundle is None else open_bundle(bundle, require_all=False)
    if opened is not None:
        name, base, tokenizer = opened.base_name, _shape(opened.base), opened.base / "tokenizer.json"
    elif config is not None:
        name, base, tokenizer = str(config), _given_shape(config), config / "tokenizer.json"
    else:
        assert model is not None, "nothing is asked for"
        known = known_base(model)
        shape = shape_of(read_config(Path(known.name), values=known.config), Path(known.name))
        name, base, tokenizer = known.name, shape, Path("tokenizer.json")
    if conversation_tokens is None:
        conversation_tokens = max(1, min(DEFAULT_TOKENS, base.sizes.max_positions - suffix_tokens))
    longest = conversation_tokens + suffix_tokens
    if longest > base.sizes.max_positions:
        raise ConfigurationError(
            f"--conversation-tokens {conversation_tokens}",
            f"with {suffix_tokens} of a question are {longest:,}; {name} takes at most {base.sizes.max_positions:,}",
            remedy="give fewer, or plan a base with a longer context",
        )
    is_here = gpu.lower() == CPU
    number = dtype or (
        str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.") if is_here else "bfloat16"
    )
    rates = None if measure is None else measure(base, number)
    target = this_machine(rates) if is_here else gpus(gpu, count, number)
    adapters = _adapters(opened, base, num_adapters, rank, targets)
    traffic = Traffic(
        conversation_tokens=conversation_tokens,
        suffix_tokens=suffix_tokens,
        turns=turns,
        num_classifiers=num_classifiers or max(1, min(len(adapters), MOST_TOGETHER)),
    )
    settings = resolve(EngineConfig, {} if opened is None else opened.settings.engine, {"kv_cache": kv_cache})
    plan_on = partial(
        make_plan,
        base,
        adapters,
        traffic,
        settings,
        item_bytes=DTYPES[number].itemsize,
        tokenizer_bytes=tokenizer.stat().st_size if opened is not None and tokenizer.is_file() else None,
        fits=fits,
    )
    return Asked(
        name=name, dtype=number, plan=plan_on(target), plan_on=plan_on, bundle=opened, backend=settings.backend
    )


def this_machine(rates: tuple[float, float] | None = None) -> Target:
    """Return this machine's CPU and its free memory. rates: FLOP/s and bytes/s, where they were measured."""
    flops_per_s, bytes_per_s = rates or (None, None)
    return Target(
        name="this machine's CPU",
        is_cuda=False,
        memory_bytes=free_bytes(torch.device("cpu")) or None,
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
        source="measured now",
        is_here=True,
    )


def _shape(path: Path) -> BaseShape:
    return shape_of(read_config(path), path)


def _given_shape(path: Path) -> BaseShape:
    """Return the shape by a user's config.json, or the one in a folder. Missing sizes are refused, because transformers
    would take those of some base. Raises ConfigurationError."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(f"--config {path}", "is no file", remedy="give a config.json, or its folder")
    values = read_json(file)
    text = values.get("text_config", values)
    config = read_config(file)
    names = type(config.get_text_config()).attribute_map
    for key, most in MOST_OF.items():
        value = text.get(names.get(key, key), text.get(key))
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigurationError(
                file,
                f"key {quoted(names.get(key, key))} is {'missing' if value is None else quoted(value)}",
                remedy=f"give the base's own config.json; the key is a number from 1 to {most:,}",
            )
    return shape_of(config, file)


def _adapters(
    bundle: Bundle | None, base: BaseShape, num: int | None, rank: int, targets: str
) -> tuple[AdapterSize, ...]:
    if bundle is None or not bundle.adapters:
        return (adapter_of(base.layers, rank, targets),) * (DEFAULT_ADAPTERS if num is None else num)
    found = [read_adapter_size(source, base.layers) for source in bundle.adapters if source.error is None]
    if num is None or num == len(found):
        return tuple(found)
    return (max(found, key=lambda one: one.num_placed),) * num
