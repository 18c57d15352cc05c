"""Writes a plan as rows and sentences for people."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from loraplex.amounts import counted, milliseconds, size
from loraplex.hardware.instances import Instance
from loraplex.hardware.prices import read_prices
from loraplex.planning.asked import Asked
from loraplex.planning.memory import DEVICE, HOST
from loraplex.planning.plan import KV_CACHE, Plan
from loraplex.planning.target import Choice, Target, choices, of_instance
from loraplex.planning.timing import efficiency

Rows = list[tuple[str, ...]]

MOST_INSTANCES = 8
MIB = 2**20
# What `cli/plan_measure.py` measures -> the lines of the plan that it holds. The first of them shows the figure.
MEASURED = {
    "process": ("process",),
    "weights": ("weights",),
    "adapters": ("adapters", "adapters in host memory"),
    "traffic": ("stacked adapters", "workspace of a step"),
    KV_CACHE: (KV_CACHE,),
    "total": ("total",),
}


def title(asked: Asked) -> list[str]:
    plan = asked.plan
    sizes, one = plan.base.sizes, max(plan.adapters, key=lambda one: one.num_placed, default=None)
    found = [
        f"{asked.name}: {sizes.num_weights:,} parameters ({sizes.model_type}), {asked.dtype}, on "
        f"{f'{plan.target.count} x ' if plan.target.count > 1 else ''}{plan.target.name}"
    ]
    if one is not None:
        found.append(
            f"{counted(len(plan.adapters), 'adapter')} of at most {one.num_placed:,} parameters (rank {one.rank}): "
            f"{size(one.num_placed * plan.use.item_bytes)} each on the device"
        )
    if asked.backend != "native":
        found.append(
            f"memory and time are those of the native backend; the bundle names {asked.backend}, whose plan "
            "`loraplex serve` prints at its start"
        )
    return found


def memory_rows(asked: Asked, measured: Mapping[str, int] | None) -> Rows:
    plan = asked.plan
    found = {MEASURED[name][0]: num_bytes for name, num_bytes in (measured or {}).items()}

    def row(name: str, where: str, limit: int, expected: int, note: str) -> tuple[str, ...]:
        seen = found.get(name)
        return name, where, size(limit), size(expected), "" if seen is None else size(seen), note

    rows = [row(one.name, one.where, one.limit, one.expected, one.note) for one in plan.lines]
    whole = plan.target.memory_bytes
    note = "" if whole is None else f"of {size(whole)}{' free now' if plan.target.is_here else ''}"
    total = [plan.total(plan.on_target, what) for what in ("limit", "expected")]
    rows.append(row("total", "device" if plan.target.is_cuda else "", total[0], total[1], note))
    plain, shared = plan.kv_conversation_bytes
    tokens = f"{plan.traffic.conversation_tokens:,} tokens"
    rows.append(row("K/V a conversation", DEVICE, shared, shared, f"{tokens}, one copy: aLoRA"))
    rows.append(row("the same, plain", DEVICE, plain, plain, f"a copy for each of {plan.traffic.num_classifiers}"))
    return rows


def fit_sentences(asked: Asked, rate: float | None) -> list[str]:
    plan = asked.plan
    if plan.fits is None:
        return ["this machine does not say how much memory is free, so nothing is said of what fits"]
    found = []
    if plan.short_bytes:
        found.append(f"does not fit: {size(plan.short_bytes)} are missing")
        found += _remedies(asked)
    else:
        found.append("fits")
    plain, shared = plan.fits.conversations
    found.append(f"adapters of this size that fit on one device, beside one conversation's K/V: {plan.fits.adapters:,}")
    found.append(
        f"conversations of {plan.traffic.conversation_tokens:,} tokens whose K/V fits beside the planned adapters: "
        f"{shared:,} shared (aLoRA), {plain:,} plain; in the planned K/V cache {plan.fits.cached[1]:,} and "
        f"{plan.fits.cached[0]:,}"
    )
    [kv] = [line for line in plan.lines if line.name == KV_CACHE]
    if kv.expected < kv.limit:
        found.append(
            f"the K/V cache holds less than one conversation, so its next turn is computed in full: give --kv-cache "
            f"{-(-kv.limit // MIB)}MiB or more, or --fit"
        )
    if plan.num_placed < len(plan.adapters):
        found.append(
            f"--adapter-memory leaves {plan.num_placed} of {len(plan.adapters)} adapters a place at a time; the others "
            "wait in host memory, or --fit makes room"
        )
    if rate is not None and (most := plan.cases[0].most_per_s) and (best := plan.cases[1].most_per_s):
        low = efficiency(plan.target).low
        devices = [-(-rate // (low * one / plan.target.count)) for one in (most, best)]
        found.append(
            f"{rate:g} conversations/s take {devices[0]:.0f} devices with plain adapters, {devices[1]:.0f} with aLoRA, "
            f"at {low:.0%} of their limit"
        )
    elif rate is not None:
        found.append(f"for {rate:g} conversations/s the rates of {plan.target.name} must be measured: `loraplex bench`")
    return found


def _remedies(asked: Asked) -> list[str]:
    plan = asked.plan
    found = []
    if asked.dtype == "float32":
        found.append(f"--dtype bfloat16 saves {size(plan.lines[0].expected // 2)} of the weights")
    if plan.fits is not None and 0 < plan.fits.adapters < len(plan.adapters):
        found.append(f"--max-adapters {plan.fits.adapters} would fit; the others wait in host memory")
    found.append("--fit chooses smaller settings, where any fit")
    return found


def time_rows(asked: Asked) -> Rows:
    rows: Rows = []
    for case in asked.plan.cases:
        name = f"{case.name}, {'shared' if case.shares else 'plain'}"
        row = name, f"{case.num_tokens:,}", f"{case.work.total / 1e12:,.3f}"
        if case.floor_s is None or case.expected is None or case.most_per_s is None:
            rows.append((*row, "", "", ""))
            continue
        low, high = case.expected
        rows.append(
            (
                *row,
                milliseconds(case.floor_s),
                f"{milliseconds(low)} to {milliseconds(high)}",
                f"{case.most_per_s:,.1f}",
            )
        )
    return rows


def time_sentences(asked: Asked) -> list[str]:
    target = asked.plan.target
    if target.flops_per_s is None and target.is_cuda:
        return [f"the data do not say how fast {target.name} computes in {asked.dtype}: --dtype bfloat16 has rates"]
    if target.flops_per_s is None:
        return [f"the rates of {target.name} are not measured: --measure does, for a bundle"]
    found, digits = efficiency(target), 0 if target.is_cuda else 2
    how = f"measured {found.read} ({found.source})" if found.measured else f"{found.source}, not measured"
    return [
        f"floor: {target.flops_per_s / 1e12:,.{digits}f} TFLOP/s and {(target.bytes_per_s or 0) / 1e9:,.0f} GB/s; "
        + target.source,
        f"expected: {found.low:.0%} to {found.high:.0%} of these rates, with the last layer computed for every token; "
        f"{how}",
        "shared needs aLoRA adapters; plain adapters compute the conversation once for each classifier",
    ]


def fitting(asked: Asked) -> list[Choice]:
    """Return the instances that have room for weights, adapters, a step and one conversation, each planned for its own
    memory. For a plan of GPUs, those that have as many."""

    @cache  # many instances have the same device
    def planned(target: Target) -> Plan:
        return asked.plan_on(target)

    def has_room(one: Instance) -> bool:
        target, wanted = of_instance(one, asked.dtype), asked.plan.target
        if wanted.is_cuda and one.num_devices < wanted.count:
            return False
        plan = planned(target)
        has_host = not target.is_cuda or max(1, wanted.count) * plan.total(HOST) <= one.memory_bytes
        return has_host and plan.least_bytes <= (target.memory_bytes or 0)

    return choices(has_room, read_prices())


def instance_rows(asked: Asked) -> Rows:
    return [
        (
            one.instance.name,
            "CPU" if one.instance.device is None else f"{one.instance.num_devices} x {one.instance.device.title}",
            "unknown" if one.price is None else f"{one.price.usd_per_hour}",
            "" if one.price is None else str(one.price.read),
        )
        for one in fitting(asked)[:MOST_INSTANCES]
    ]


def settings_lines(asked: Asked) -> list[str]:
    """Return what `--fit` chose, as lines of `loraplex.yaml` and as options."""
    values = settings(asked)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
    return ["engine:  # in loraplex.yaml", *(f"  {name}: {value}" for name, value in values.items()), f"or: {options}"]


def settings(asked: Asked) -> dict[str, Any]:
    chosen = asked.plan.chosen
    return {
        "dtype": asked.dtype,
        "max_adapters": chosen.max_adapters,
        "adapter_memory": f"{-(-chosen.adapter_memory_bytes // MIB)}MiB",
        "kv_cache": f"{chosen.kv_cache_bytes // MIB}MiB",
        **({} if chosen.host_memory_bytes is None else {"host_memory": f"{-(-chosen.host_memory_bytes // MIB)}MiB"}),
        "max_step_tokens": chosen.max_step_tokens,
    }
