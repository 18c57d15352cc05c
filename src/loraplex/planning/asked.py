"""Reads what a plan is asked about: a bundle, a config or a known base, and adapters that exist or are imagined."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.bundle import Bundle, open_bundle
from loraplex.config import EngineConfig, resolve
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for, and its plan."""

    name: str
    dtype: str
    plan: Plan
    bundle: Bundle | None = None


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
    conversation_tokens: int = 500,
    suffix_tokens: int = 20,
    turns: int = 10,
    kv_cache: str | None = None,
    fits: bool = False,
) -> Asked:
    """Return the plan for one of a bundle, a config and a known model. Raises ConfigurationError."""
    opened = None if bundle is None else open_bundle(bundle, require_all=False)
    if opened is not None:
        name, base, tokenizer = opened.base_name, _shape(opened.base), opened.base / "tokenizer.json"
    elif config is not None:
        name, base, tokenizer = str(config), _shape(config), config / "tokenizer.json"
    else:
        assert model is not None, "nothing is asked for"
        known = known_base(model)
        name, base, tokenizer = known.name, _known_shape(known.config), Path("tokenizer.json")
    target = this_machine() if gpu.lower() == CPU else gpus(gpu, count)
    number = "bfloat16" if target.is_cuda else str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    number = dtype or number
    adapters = _adapters(opened, base, num_adapters, rank, targets)
    traffic = Traffic(
        conversation_tokens=conversation_tokens,
        suffix_tokens=suffix_tokens,
        turns=turns,
        num_classifiers=num_classifiers or max(1, min(len(adapters), MOST_TOGETHER)),
    )
    settings = resolve(EngineConfig, {} if opened is None else opened.settings.engine, {"kv_cache": kv_cache})
    plan = make_plan(
        base,
        adapters,
        target,
        traffic,
        settings,
        item_bytes=DTYPES[number].itemsize,
        tokenizer_bytes=tokenizer.stat().st_size if opened is not None and tokenizer.is_file() else None,
        fits=fits,
    )
    return Asked(name=name, dtype=number, plan=plan, bundle=opened)


def this_machine() -> Target:
    """Return this machine's CPU and its free memory. Its rates are not known before they are measured."""
    free = free_bytes(torch.device("cpu")) or None
    return Target(name="this machine's CPU", is_cuda=False, memory_bytes=free, is_here=True)


def _shape(path: Path) -> BaseShape:
    return shape_of(read_config(path), path)


def _known_shape(config: Mapping[str, Any]) -> BaseShape:
    with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        return _shape(Path(folder))


def _adapters(
    bundle: Bundle | None, base: BaseShape, num: int | None, rank: int, targets: str
) -> tuple[AdapterSize, ...]:
    if bundle is None or not bundle.adapters:
        return (adapter_of(base.layers, rank, targets),) * (DEFAULT_ADAPTERS if num is None else num)
    found = [read_adapter_size(source, base.layers) for source in bundle.adapters if source.error is None]
    if num is None or num == len(found):
        return tuple(found)
    return (max(found, key=lambda one: one.num_placed),) * num
