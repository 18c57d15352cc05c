"""The machine that a plan is for: its memory, and how fast it computes and reads, as far as anybody says."""

from collections.abc import Callable
from dataclasses import dataclass

from loraplex.hardware.devices import device
from loraplex.hardware.instances import Instance, instances
from loraplex.hardware.prices import InstancePrice, Prices

CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One device that holds a base and adapters, or a machine that computes on its CPUs.

    memory_bytes:      of the device in all, or free on this machine; None where nobody says.
    count:             devices, each with the base and adapters of its own.
    flops_per_s, bytes_per_s:  matrix products in the plan's number format, and memory; None where nobody has measured.
    source:            who says the rates.
    is_here:           whether the plan is for this machine.
    """

    name: str
    is_cuda: bool
    memory_bytes: int | None
    count: int = 1
    flops_per_s: float | None = None
    bytes_per_s: float | None = None
    source: str = ""
    is_here: bool = False


def gpu(name: str, count: int, dtype: str) -> Target:
    """Return `count` GPUs of the device data. Its rates are for bfloat16: PyTorch computes float32 products without
    tensor cores, and the data do not say how fast. Raises ConfigurationError for an unknown name."""
    found = device(name)
    return Target(
        name=found.title,
        is_cuda=True,
        memory_bytes=found.memory_bytes,
        count=count,
        flops_per_s=found.flops_per_s if dtype == "bfloat16" else None,
        bytes_per_s=found.bytes_per_s,
        source=f"its maker's sheet, read {found.read}; nobody has measured it",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An instance that has room, with its price where somebody says it."""

    instance: Instance
    price: InstancePrice | None


def of_instance(one: Instance, dtype: str) -> Target:
    """Return one device of an instance, or the instance's CPUs with all its memory."""
    if one.device_name is not None:
        return gpu(one.device_name, 1, dtype)
    return Target(name=one.name, is_cuda=False, memory_bytes=one.memory_bytes)


def choices(has_room: Callable[[Instance], bool], prices: Prices) -> list[Choice]:
    """Return the instances that have room, cheapest first; those whose price nobody says come last."""

    def order(one: Choice) -> tuple[bool, float, str]:
        price = float(one.price.usd_per_hour) if one.price is not None else one.instance.memory_bytes
        return one.price is None, price, one.instance.name

    found = [Choice(instance=one, price=prices.instances.get(name)) for name, one in instances().items()]
    return sorted((one for one in found if has_room(one.instance)), key=order)
